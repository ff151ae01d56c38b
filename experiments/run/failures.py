"""What happens to a run that fails: divergence ends it, anything else costs no step."""

import contextlib
from collections.abc import Callable, Iterator

import jax

from experiments.run import parallel, step_metrics
from experiments.train_step import TrainState
from nfnets_jax.errors import UsageError
from nfnets_jax.weights.checkpoints import Checkpoints


class DivergedError(Exception):
    """The loss or the gradient is not finite."""


def assert_finite(state: TrainState, checkpoints: Checkpoints) -> None:
    """Raises a DivergedError if too many consecutive steps were non-finite."""
    bad = step_metrics.lost_at(state.window)
    if bad is None:
        return
    checkpoints.wait()
    saved = checkpoints.steps()
    good = f'the last good checkpoint is step {saved[-1]:,}' if saved else 'nothing was saved yet'
    raise DivergedError(
        f'the loss or the gradient was not finite at step {bad:,}; {good}. Try a lower '
        'config.optimizer.learning_rate, a longer config.optimizer.schedule.warmup or a smaller '
        'config.optimizer.clip.clipping, with another --workdir'
    )


@contextlib.contextmanager
def saving_at_failure(
    current: Callable[[], tuple[int, TrainState]],
    checkpoints: Checkpoints,
    start_step: int,
    log: Callable[[str], None],
) -> Iterator[None]:
    """Saves the last complete step if anything else fails: an evaluation, a disk, an image.

    Args:
      current: returns the step and its state.
      checkpoints: checkpoints of the run.
      start_step: step that is saved already.
      log: receives a line about it, unless the exception itself carries it.
    """
    try:
        yield
    except DivergedError:
        raise  # A non-finite state is not worth keeping.
    except Exception as error:
        step, state = current()
        saved = ''
        # If no checkpoint can be written, or the device has failed, report the first failure.
        with contextlib.suppress(Exception):
            if step > start_step and step_metrics.lost_at(jax.device_get(state.window)) is None:
                checkpoints.save(step, state, note=parallel.describe_devices())
                checkpoints.wait()
                saved = f'step {step:,} is saved, and the same command continues from there'
        if saved and isinstance(error, UsageError):
            raise UsageError(f'{error}; {saved}') from error
        if saved:
            log(saved)
        raise
