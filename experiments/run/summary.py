"""The end of a run: summary.json, curves.png, reports, and the text that names them."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from experiments.experiment import Experiment
from experiments.run import metric_writers, parallel
from experiments.run.evaluation import describe_accuracy, score
from experiments.run.predictions import LogitsFn
from experiments.run.throughput import Throughput
from experiments.train_step import TrainState
from nfnets_jax import files
from nfnets_jax.errors import first_line

SUMMARY_FILE = 'summary.json'
_PACKAGES = ('jax', 'jaxlib', 'dm-haiku', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def read_summary(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns the summary of a complete run; None if there is none, or it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((path / SUMMARY_FILE).read_text())
    return None


def write_summary(
    state: TrainState,
    path: pathlib.Path,
    final: Mapping[str, float],
    throughput: Throughput,
    watched: str,
) -> dict[str, Any] | None:
    """Writes and returns the summary on process 0: final and best metrics, speed, size, versions.

    `final` is the last evaluation, and `watched` the split that chooses the best checkpoint.
    """
    if not parallel.is_primary():
        return None
    summary = {
        'step': int(state.step),
        'final': dict(final),
        'best': _best(metric_writers.read_metrics(path), watched),
        'parameters': sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        # If the run was resumed, these are of this session only.
        'images_per_second': throughput.images / throughput.seconds if throughput.images else None,
        'training_seconds': throughput.seconds,
        'compile_seconds': throughput.compile_seconds,
        'devices': f'{parallel.device_count()} x {jax.devices()[0].device_kind}',
        'versions': {'python': platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    files.atomic_write(path / SUMMARY_FILE, json.dumps(summary, indent=2) + '\n')
    return summary


def draw_curves(experiment: Experiment, path: pathlib.Path, log: Callable[[str], None]) -> None:
    """Draws curves.png on process 0. A failure is logged and does not fail the run."""
    if not parallel.is_primary():
        return
    try:
        from experiments.run import curves  # here: importing Matplotlib takes 0.2 s

        metrics = metric_writers.read_metrics(path)
        curves.draw_curves(
            metrics,
            path / 'curves.png',
            title=f'{experiment.config.model.name} on {_data_name(experiment)}: {path}',
            best=describe_best(metrics, experiment.watched),
            note=describe_loss(experiment),
        )
    except Exception as error:  # Matplotlib's fonts and caches may be anywhere.
        log(f'curves.png cannot be drawn: {first_line(error)}')


def _data_name(experiment: Experiment) -> str:
    data = experiment.config.data
    return data.get('dataset') or pathlib.Path(data.get('path') or '').name or data.name


def describe_best(metrics: Sequence[Mapping[str, float]], watched: str) -> str:
    """Returns a text like 'best test EMA top-1: 99.16% at step 500'; '' without an evaluation."""
    best = _best(metrics, watched)
    if best is None:
        return ''
    measure = 'mAP' if f'{watched}/map' in best else 'top-1'
    average = ' EMA' if f'{watched}_ema/top1' in best else ''
    return f'best {watched}{average} {measure}: {score(best, watched):.2%} at step {best["step"]:,}'


def _best(metrics: Sequence[Mapping[str, float]], watched: str) -> Mapping[str, float] | None:
    """Returns the first of the best evaluations; None without any."""
    evaluations = [line for line in metrics if f'{watched}/top1' in line]
    return max(evaluations, key=lambda x: (score(x, watched), -x['step']), default=None)


def describe_loss(experiment: Experiment) -> str:
    """Returns a sentence that says what the training loss includes."""
    augment = experiment.config.augment
    mixes = [name for name, key in (('MixUp', 'mixup'), ('CutMix', 'cutmix')) if augment[key]]
    parts = [
        f'label smoothing {augment.label_smoothing:g}' if augment.label_smoothing else '',
        f'labels mixed by {" and ".join(mixes)}' if mixes else '',
        'class weights' if experiment.class_weights is not None else '',
    ]
    included = [part for part in parts if part]
    beside = f' and includes {", ".join(included)}' if included else ''
    return f'The train loss is of augmented images{beside}; weight decay is not in it.'


def write_reports(
    experiment: Experiment,
    logits_fn: LogitsFn,
    variables: Mapping[str, tuple],
    path: pathlib.Path,
    log: Callable[[str], None],
) -> None:
    """Writes a report of every evaluated split if the config wants it; see `report_split`."""
    if not experiment.config.eval.report:
        return
    from experiments.run import evaluation_report  # here: importing Matplotlib takes 0.2 s

    for split in experiment.evaluated:
        directory = path / 'report' / split
        evaluation_report.report_split(experiment, logits_fn, variables, split, directory)
        log(f'report: {directory}')


def describe_next_steps(summary: Mapping[str, Any], path: str) -> str:
    """Returns the accuracy of a complete run, and commands that look closer at it."""
    python = os.path.relpath(sys.executable)
    if python.startswith(os.pardir):
        python = sys.executable
    path = shlex.quote(path)
    return f"""
{describe_accuracy(summary['final'])}  (after {summary['step']:,} steps)

curves:       {path}/curves.png
look closer:  {os.path.join(os.path.dirname(python), 'tensorboard')} --logdir={path}
evaluate:     {python} -m experiments.evaluate --workdir={path}
continue:     the same command resumes a stopped run; to train for longer,
              give another --workdir and --config.duration
"""
