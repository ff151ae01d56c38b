"""Exact evaluation of a split, and the score that chooses the best checkpoint."""

from collections.abc import Callable, Mapping

import jax

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
      examples. Where some may be skipped, '<split>/skipped_pictures' too.
    """
    totals: dict[str, dict[str, float]] = {name: {} for name in variables}
    with open_eval_batches(experiment, split) as batches:
        for batch in batches:
            for name, sums in jax.device_get(eval_step(variables, batch)).items():
                for key, value in sums.items():
                    totals[name][key] = totals[name].get(key, 0.0) + float(value)
    metrics = {
        f'{split}{name}/{key}': sums[key] / sums['count']
        for name, sums in totals.items()
        for key in ('loss', 'top1', 'top5')
    }
    if experiment.skip_bad:
        metrics[f'{split}/skipped_pictures'] = len(experiment.splits[split]) - totals['']['count']
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


def describe_accuracy(metrics: Mapping[str, float]) -> str:
    """Returns a line like 'test top-1 98.88 %, top-5 100.00 % (EMA 99.16 %, 100.00 %)'.

    The order of the splits is train, validation, test.
    """
    parts = []
    for split in ('train', 'validation', 'test'):
        if f'{split}/top1' not in metrics:
            continue
        top1, top5 = (metrics[f'{split}/{name}'] for name in ('top1', 'top5'))
        part = f'{split} top-1 {top1:.2%}, top-5 {top5:.2%}'
        if f'{split}_ema/top1' in metrics:
            top1, top5 = (metrics[f'{split}_ema/{name}'] for name in ('top1', 'top5'))
            part += f' (EMA {top1:.2%}, {top5:.2%})'
        parts.append(part)
    return '; '.join(parts)


def score(metrics: Mapping[str, float], split: str) -> float:
    """Returns the score that chooses the best checkpoint: top-1, of the EMA if there is one."""
    return metrics.get(f'{split}_ema/top1', metrics[f'{split}/top1'])
