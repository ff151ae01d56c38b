"""Exact evaluation of a split, and the score that chooses the best checkpoint."""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from experiments.experiment import Experiment
from experiments.run import parallel
from nfnets_jax.data import pipeline


def eval_batch_size(experiment: Experiment) -> int:
    """Returns the examples of a step of evaluation, over all devices; a multiple of their number.

    It is the same for all splits, because the step is compiled once.
    """
    devices = parallel.device_count()
    longest = max(map(len, experiment.evaluated.values()))
    return -(-min(experiment.config.eval.batch_size, longest) // devices) * devices


def evaluate(
    experiment: Experiment, eval_step: Callable, variables: Mapping[str, tuple], split: str = 'test'
) -> dict[str, float]:
    """Evaluates on every readable example of a split, exactly once.

    The result does not depend on the batch size (rounded up to a multiple of the devices), nor on
    the number of devices or processes.

    Args:
      experiment: the experiment with the data.
      eval_step: from `make_eval_step`.
      variables: from `TrainState.variables`, placed by `parallel.replicate`.
      split: one of `experiment.splits`.

    Returns:
      {'<split>/loss', '<split>/top1', '<split>/top5'} and '<split>_ema/...': means over the
      examples. Where some may be skipped, '<split>/skipped_pictures' too. With several labels for
      an image, top1 counts images whose highest class is one of their labels, and instead of top5
      there are 'map' and 'auc': means over the classes, see `ranking`, without undefined ones.
    """
    found: dict[str, dict[str, list]] = {name: {} for name in variables}
    with open_eval_batches(experiment, split) as batches:
        for batch in batches:
            for name, values in jax.device_get(eval_step(variables, batch)).items():
                for key, value in values.items():
                    found[name].setdefault(key, []).append(value)
    metrics = {}
    for name, values in found.items():
        count = sum(map(float, values['count']))
        for key in ('loss', 'top1', 'top5'):
            if key in values:
                metrics[f'{split}{name}/{key}'] = sum(map(float, values[key])) / count
        if experiment.multi_label:
            from experiments.run import ranking  # here: scipy.stats is slow to import

            is_real = np.concatenate(values['mask']) == 1
            scores, labels = (np.concatenate(values[key])[is_real] for key in ('logits', 'label'))
            for key, of in (('map', ranking.average_precision), ('auc', ranking.roc_auc)):
                metrics[f'{split}{name}/{key}'] = float(np.nanmean(of(scores, labels)))
    if experiment.skip_bad:
        metrics[f'{split}/skipped_pictures'] = len(experiment.splits[split]) - count
    return metrics


def open_eval_batches(experiment: Experiment, split: str) -> pipeline.Prefetch:
    """Returns this process's batches of a split on its devices; see `pipeline.eval_batches`."""
    batches = pipeline.eval_batches(
        experiment.splits[split],
        batch_size=eval_batch_size(experiment),
        transform=experiment.image_spec.test_transform,
        bad=pipeline.UnreadableExamples(experiment.skip_bad),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return pipeline.Prefetch(batches, parallel.shard)


_IN_WORDS = {'map': 'mAP', 'auc': 'AUC', 'top1': 'top-1', 'top5': 'top-5'}


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
