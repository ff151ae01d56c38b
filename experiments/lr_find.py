"""Finds a learning rate by a range test (Smith, arXiv 1506.01186).

    python -m experiments.lr_find --config=configs/digits.py
    python -m experiments.lr_find --config=configs/digits.py --low=0.01 --high=100 --out=lr.png

The rate grows from --low to --high by the same factor at each step of a short training. It ends
early where the smoothed loss exceeds 4 times its least value, or the loss is not finite. A table,
and with --out a curve, show the loss over the rate; the suggestion is where it falls most steeply.
Nothing else is written. All rates are values of config.optimizer.learning_rate, before
config.optimizer.scale_lr_by_batch.
"""

import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict, config_flags

from experiments import config as schema
from experiments.experiment import Experiment, build, describe
from experiments.launch import cli
from experiments.run import curves, init_weights, parallel
from experiments.run.batches import open_batches
from experiments.run.progress import Progress
from experiments.train_step import init_state, make_train_step
from nfnets_jax.data import pipeline
from nfnets_jax.errors import UsageError

_DIVERGED = 4  # The test ends where the smoothed loss is so many times its minimum.
_ROWS = 20  # of the table


class Suggestion(NamedTuple):
    """Learning rates: where the loss falls most steeply, and where it is least."""

    steepest: float
    largest: float


def prepare(config: ConfigDict, steps: int) -> Experiment:
    """Returns the experiment of a config for a range test.

    Its learning rate is constant, and equal to the factor by which the batch scales it; nothing is
    frozen at first.
    """
    config = config.copy_and_resolve_references().unlock()
    optimizer = config.optimizer
    optimizer.learning_rate = 1.0
    optimizer.schedule.name, optimizer.schedule.warmup = 'constant', '0 steps'
    optimizer.schedule.end_value = 0.0
    optimizer.groups = tuple({**rule, 'freeze_for': 0} for rule in optimizer.groups)
    config.duration = f'{steps} steps'
    config.ema = 0.0
    return build(config)


def learning_rates(low: float, high: float, steps: int) -> np.ndarray:
    """Returns rates from `low` to `high`, each the same factor above the one before."""
    return np.geomspace(low, high, steps)


def range_test(experiment: Experiment, rates: np.ndarray) -> Iterator[float]:
    """Yields the training loss at each rate, before the update with it, until it diverges.

    Args:
      experiment: from `prepare`.
      rates: values of config.optimizer.learning_rate, one for each step.
    """
    weights = None
    if experiment.config.init.weights:
        weights = init_weights.load_weights(experiment)[:2]
    scale = float(np.asarray(experiment.optimizer.hyperparameters.learning_rate))
    train_step = make_train_step(experiment)
    state = parallel.replicate(init_state(experiment, weights))
    stop = {'stop': parallel.shard(np.zeros((len(parallel.local_devices()), 1), np.float32))}
    losses, best = [], np.inf
    with open_batches(experiment, 0, pipeline.UnreadableExamples(experiment.skip_bad)) as batches:
        for rate in rates:
            # The rate is data of the compiled step.
            numbers = state.numbers._replace(
                learning_rate=parallel.replicate(np.float32(rate) * scale)
            )
            state, metrics = train_step(state._replace(numbers=numbers), next(batches) | stop)
            loss = float(metrics['loss'])
            if not np.isfinite(loss):
                return
            yield loss
            losses.append(loss)
            latest = float(np.median(losses[-_half_window(len(rates)) - 1 :]))
            best = min(best, latest)
            if latest > _DIVERGED * best:
                return


def smooth(losses: Sequence[float], steps: int) -> np.ndarray:
    """Returns the median of the losses around each step, which no single one of them can move.

    Args:
      losses: one for each step so far.
      steps: steps of the whole test; a window has about a tenth of them, less at both ends.
    """
    half, array = _half_window(steps), np.asarray(losses, np.float64)
    return np.array([np.median(array[max(0, i - half) : i + half + 1]) for i in range(len(array))])


def _half_window(steps: int) -> int:
    return max(1, steps // 20)


def suggest(rates: np.ndarray, smoothed: np.ndarray, steps: int) -> Suggestion | None:
    """Returns where the smoothed loss falls most steeply, and where it is least.

    Args:
      rates: equally spaced in logarithm; falls are compared over equal parts of a decade.
      smoothed: from `smooth`.
      steps: steps of the whole test.

    Returns:
      None if the loss does not fall.
    """
    half, lowest = _half_window(steps), int(np.argmin(smoothed))
    falls = smoothed[: -2 * half] - smoothed[2 * half :]  # around the steps from `half` on
    falls = falls[: max(1, lowest - half + 1)]
    if not len(falls) or falls.max() <= 0:
        return None
    steepest = half + int(np.argmax(falls))
    return Suggestion(float(rates[steepest]), float(rates[max(lowest, steepest)]))


def table(
    rates: np.ndarray, losses: Sequence[float], smoothed: np.ndarray, found: Suggestion | None
) -> Iterator[str]:
    """Yields the lines of a table of at most `_ROWS` steps, and those of the suggestion."""
    yield f'{"learning_rate":>13}{"loss":>10}{"smoothed":>10}'
    chosen = {int(i) for i in np.linspace(0, len(rates) - 1, _ROWS)}
    marks = {}
    if found:
        marks = {found.steepest: '  steepest descent', found.largest: '  lowest loss'}
        chosen |= {int(np.argmin(abs(rates - rate))) for rate in found}
    for i in sorted(chosen):
        mark = marks.get(float(rates[i]), '')
        yield f'{rates[i]:13.3g}{losses[i]:10.4f}{smoothed[i]:10.4f}{mark}'


def draw(
    rates: np.ndarray, losses: Sequence[float], smoothed: np.ndarray, found: Suggestion | None
) -> Figure:
    """Draws the loss over the learning rate, and the suggestion."""
    figure = Figure(figsize=(8, 5), dpi=120, layout='constrained')
    axes = figure.subplots()
    axes.plot(rates, losses, color='#0072B2', alpha=0.25, linewidth=0.8)
    axes.plot(rates, smoothed, color='#0072B2', linewidth=1.8)
    axes.set_xscale('log')
    axes.set_xlabel('config.optimizer.learning_rate')
    axes.set_ylabel('training loss')
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='y', color='#dddddd', linewidth=0.8)
    # Outliers, and the end of a test that diverged, would hide the rest.
    low, fall = smoothed.min(), smoothed[0] - smoothed.min() or 1.0
    axes.set_ylim(low - 0.5 * fall, low + 1.4 * fall)
    if found:
        for rate, name, color, side in (
            (found.steepest, 'steepest', '#009E73', 'right'),
            (found.largest, 'lowest', '#D55E00', 'left'),
        ):
            axes.axvline(rate, color=color, linewidth=1.2, linestyle='--')
            place: dict[str, Any] = {'va': 'top', 'ha': side, 'fontweight': 'bold'}
            place['transform'] = axes.get_xaxis_transform()
            axes.text(rate, 1.0, f' {name} {rate:.2g} ', color=color, **place)
    return figure


def main() -> None:
    args = flags.FLAGS
    low, high, steps, config = args.low, args.high, args.steps, args.config
    if low >= high:
        raise UsageError(f'--low={low}: must be below --high={high}')
    if args.out is not None:
        cli.check_out(pathlib.Path(args.out), ('.png',))
    experiment = prepare(config, steps)
    for line in (*describe(experiment), *schema.take_adaptations(experiment.config), 'compiling'):
        print(line, file=sys.stderr, flush=True)
    rates, losses = learning_rates(low, high, steps), []
    with Progress(steps) as progress:
        for loss in range_test(experiment, rates):
            losses.append(loss)
            progress.update(len(losses), {'loss': loss})
    if not losses:
        raise UsageError('the loss is not finite before the first update: see the config and data')
    ended, rates = len(losses) < steps, rates[: len(losses)]
    smoothed = smooth(losses, steps)
    found = suggest(rates, smoothed, steps)
    for line in table(rates, losses, smoothed, found):
        print(line)
    if ended:
        print(f'diverged above {rates[-1]:.3g}')
    if found is None:
        print(f'no suggestion: the loss does not fall between {low:g} and {rates[-1]:.3g}; lower '
              '--low, or raise --high or --steps')  # fmt: skip
    else:
        print(f'suggestion: --config.optimizer.learning_rate={found.steepest:.2g}, and not above '
              f'{found.largest:.2g}')  # fmt: skip
        print(describe_scale(config))
    if args.out is not None:
        curves.write_figure(args.out, draw(rates, losses, smoothed, found))
        print(f'curve: {args.out}')


def describe_scale(config: ConfigDict) -> str:
    """Returns a line about the batch sizes that the suggestion is for."""
    if config.optimizer.scale_lr_by_batch:
        return (
            f'(it is multiplied by batch_size / 256 = {config.batch_size / 256:g}, so that it '
            'suits similar batch sizes too)'
        )
    return (
        f'(for config.batch_size={config.batch_size}; with another, change it in proportion, '
        'because scale_lr_by_batch is False)'
    )


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', None, 'The config.', lock_config=True)
    flags.mark_flag_as_required('config')
    flags.DEFINE_float('low', 1e-4, 'Learning rate of the first step.', lower_bound=1e-12)
    flags.DEFINE_float('high', 10.0, 'Learning rate of the last step.', lower_bound=1e-12)
    flags.DEFINE_integer('steps', 100, 'Steps from one to the other.', lower_bound=10)
    cli.define_path('out', None, 'A .png to draw the curve in.')
    cli.run(main)
