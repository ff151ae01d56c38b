"""Recovery: where a run resumes, and what a failing run saves."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import jax

from experiments.experiment import Experiment, computed_per_device
from experiments.run import metric_writers, parallel, step_metrics
from experiments.run.checkpoints import Checkpoints
from experiments.train_step import TrainState
from nfnets_jax.errors import UsageError
from nfnets_jax.weights.checkpoints import DamagedCheckpointError


def restore_newest(
    checkpoints: Checkpoints, template: TrainState, log: Callable[[str], None]
) -> tuple[int, TrainState] | None:
    """Returns the step and state of the newest whole checkpoint; None without checkpoints.

    Raises:
      UsageError: there are checkpoints, but none can be read.
    """
    try:
        return checkpoints.latest(template, on_damage=log)
    except DamagedCheckpointError as error:
        raise UsageError(f'{error}; to start anew give another --workdir') from error


def describe_resumption(
    experiment: Experiment, path: pathlib.Path, step: int, template: TrainState, then: str | None
) -> str:
    """Returns the line that names the step, and the devices if they have changed.

    `then` is `parallel.describe_devices` of the process that saved the checkpoint, if known.
    """
    line = f'resuming {path} at step {step:,} of {experiment.total_steps:,}'
    now = parallel.describe_devices()
    if then is None or then == now:
        return line
    line += f', with {now} instead of {then}: the same batches, equal up to rounding'
    local = computed_per_device(experiment.config, has_statistics=bool(template.state))
    if local and now.split()[0] != then.split()[0]:
        line += f', except for what each device computes by itself: {", ".join(local)}'
    return line


def recorded_metrics(path: pathlib.Path, step: int) -> dict[str, float]:
    """Returns the metrics that a run has written at a step; {} if it has written none."""
    if not step or not (path / metric_writers.METRICS_FILE).exists():
        return {}
    lines = [line for line in metric_writers.read_metrics(path) if line['step'] == step]
    return {name: x for line in lines for name, x in line.items() if name != 'step'}


class DivergedError(Exception):
    """The loss or the gradient is not finite."""

    keys = (  # in its message, as a UsageError has them
        'config.optimizer.learning_rate',
        'config.optimizer.schedule.warmup',
        'config.optimizer.clip.clipping',
    )


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
        '{}, a longer {} or a smaller {}, with another --workdir'.format(*DivergedError.keys)
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
      checkpoints, start_step: of the run; the step is saved already.
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
