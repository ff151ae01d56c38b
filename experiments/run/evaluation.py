"""Exact evaluation of a split, and the score that chooses the best checkpoint."""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from experiments.experiment import Experiment
from experiments.run.batches import open_eval_batches
from experiments.run.predictions import Predictions, predict
from nfnets_jax.data.sources import Source

# (split, such as 'test' or 'test_ema'; is_correct, bool [N] in the source's order; the source)
OnCorrect = Callable[[str, np.ndarray, Source], None]


def evaluate(
    experiment: Experiment,
    eval_step: Callable,
    variables: Mapping[str, tuple],
    split: str = 'test',
    on_correct: OnCorrect | None = None,
) -> dict[str, float]:
    """Evaluates on every readable example of a split, exactly once.

    The result does not depend on the batch size (rounded up to a multiple of the devices), nor on
    the number of devices or processes.

    Args:
      experiment: the experiment with the data.
      eval_step: from `make_eval_step`.
      variables: from `TrainState.variables`, placed by `parallel.replicate`.
      split: one of `experiment.splits`.
      on_correct: called for each of the variables if all images can be read and have one label.

    Returns:
      {'<split>/loss', '<split>/top1', '<split>/top5'} and '<split>_ema/...': means over the
      examples; top5 with ten classes or more. Where some may be skipped, '<split>/skipped_pictures'
      too. With several labels for an image, top1 counts images whose highest class is one of their
      labels, and instead of top5 there are 'map' and 'auc': means over the classes, see `ranking`,
      without undefined ones.
    """
    metrics = {}
    if experiment.multi_label:
        for name, predictions in predict(experiment, eval_step, variables, split).items():
            count = len(predictions.labels)
            for key, value in multi_label_metrics(predictions).items():
                metrics[f'{split}{name}/{key}'] = value
    else:
        sums: dict[str, dict[str, list]] = {name: {} for name in variables}
        correct: dict[str, list] = {name: [] for name in variables}
        indices = []
        with open_eval_batches(experiment, split) as batches:
            for batch in batches:
                found = jax.device_get(eval_step(variables, batch))
                real = found['mask'] == 1
                indices.append(found['index'][real])
                for name, values in found['sums'].items():
                    correct[name].append(found['correct'][name][real] == 1)
                    for key, value in values.items():
                        sums[name].setdefault(key, []).append(float(value))
        for name, values in sums.items():
            count = sum(values.pop('count'))
            metrics |= {f'{split}{name}/{key}': sum(x) / count for key, x in values.items()}
        source = experiment.splits[split]
        if on_correct and count == len(source):
            order = np.argsort(np.concatenate(indices))
            for name, parts in correct.items():
                on_correct(split + name, np.concatenate(parts)[order], source)
    if experiment.skip_bad:
        metrics[f'{split}/skipped_pictures'] = len(experiment.splits[split]) - count
    return metrics


def multi_label_metrics(predictions: Predictions) -> dict[str, float]:
    """Returns 'loss', 'top1', 'map' and 'auc' where images may have several labels.

    They are those that `evaluate` describes; without any defined class 'map' and 'auc' are NaN.
    """
    by_class = {'map': predictions.average_precision, 'auc': predictions.roc_auc}
    figures = {'loss': predictions.losses.mean(), 'top1': predictions.is_correct.mean()}
    figures |= {name: values[~np.isnan(values)].mean() for name, values in by_class.items()}
    return {name: float(value) for name, value in figures.items()}


_IN_WORDS = {
    'map': 'mAP',
    'auc': 'AUC',
    'top1': 'top-1',
    'top5': 'top-5',
    'real_top1': 'ReaL top-1',
}


def describe_accuracy(metrics: Mapping[str, float]) -> str:
    """Returns a line like 'test top-1 98.88 %, top-5 100.00 % (EMA 99.16 %, 100.00 %)'.

    The order of the splits is train, validation, test; with several labels for an image that of the
    metrics is mAP, AUC, top-1.
    """
    parts = []
    for split in ('train', 'validation', 'test'):
        shown = [name for name in _IN_WORDS if f'{split}/{name}' in metrics]
        if not shown:
            continue
        raw = ', '.join(f'{_IN_WORDS[name]} {metrics[f"{split}/{name}"]:.2%}' for name in shown)
        part = f'{split} {raw}'
        if f'{split}_ema/top1' in metrics:
            averaged = ', '.join(f'{metrics[f"{split}_ema/{name}"]:.2%}' for name in shown)
            part += f' (EMA {averaged})'
        parts.append(part)
    return '; '.join(parts)


def score(metrics: Mapping[str, float], split: str) -> float:
    """Returns the score that chooses the best checkpoint, of the EMA if there is one.

    It is the mean average precision with several labels for an image, else top-1.
    """
    name = 'map' if f'{split}/map' in metrics else 'top1'
    return metrics.get(f'{split}_ema/{name}', metrics[f'{split}/{name}'])
