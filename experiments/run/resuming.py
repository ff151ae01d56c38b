"""Where a run continues: its newest checkpoint, its recorded metrics, and changed devices."""

import pathlib
from collections.abc import Callable
from typing import Any

from experiments.experiment import Experiment
from experiments.run import metric_writers, parallel
from experiments.train_step import TrainState
from nfnets_jax import models
from nfnets_jax.errors import UsageError
from nfnets_jax.weights.checkpoints import Checkpoints, DamagedCheckpointError


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
    """Returns the line that names the step, and devices other than those of the checkpoint.

    Args:
      experiment: the experiment.
      path: directory of the run.
      step: step of the checkpoint.
      template: shapes of the state.
      then: `parallel.describe_devices` of the process that saved the checkpoint.
    """
    line = f'resuming {path} at step {step:,} of {experiment.total_steps:,}'
    now = parallel.describe_devices()
    if then is None or then == now:
        return line
    line += f', with {now} instead of {then}: the same batches, equal up to rounding'
    local = computed_per_device(experiment, template.state)
    if local and now.split()[0] != then.split()[0]:
        line += f', except for what each device computes by itself: {", ".join(local)}'
    return line


def computed_per_device(experiment: Experiment, model_state: Any) -> list[str]:
    """Names what depends on which examples share a device, and so on the number of devices.

    Args:
      experiment: the experiment.
      model_state: state of the network, or its shapes; empty without batch norm.
    """
    options = experiment.config.model
    published = models.variant_info(options.name)

    def rate(option: str) -> float:
        given = options.get(option)
        return getattr(published, option) if given is None else given

    holds = {
        'the ascent of SAM': experiment.config.sam.rho > 0,
        'the statistics of batch norm': model_state and not options.get('cross_replica_axis'),
        'dropout': rate('drop_rate') > 0,
        'stochastic depth': rate('stochdepth_rate') > 0,
    }
    return [name for name, held in holds.items() if held]


def recorded_metrics(path: pathlib.Path, step: int) -> dict[str, float]:
    """Returns the metrics that a run has written at a step; {} if it has written none."""
    if not step or not (path / metric_writers.METRICS_FILE).exists():
        return {}
    lines = [line for line in metric_writers.read_metrics(path) if line['step'] == step]
    return {name: x for line in lines for name, x in line.items() if name != 'step'}
