"""The training batches of this process, on its devices."""

import functools

import jax
import numpy as np

from experiments.experiment import Experiment
from experiments.run import parallel
from experiments.run.device_cached import DeviceCachedBatches
from nfnets_jax.data import pipeline
from nfnets_jax.data.sampling import balanced_order
from nfnets_jax.data.sources import read_labels


def open_batches(
    experiment: Experiment, start_step: int, bad: pipeline.UnreadableExamples
) -> pipeline.Prefetch | DeviceCachedBatches:
    """Returns this process's training batches on its devices, from `start_step` on."""
    source, seed = experiment.train_source, experiment.config.seed
    process, rows = jax.process_index(), parallel.local_batch_size(experiment.images_per_step)
    options = {
        'batch_size': experiment.images_per_step,
        'seed': seed,
        'start_step': start_step,
        'transform': experiment.image_spec.train_transform,
        'process_index': process,
        'process_count': jax.process_count(),
        'bad': bad,
    }
    if experiment.config.data.get('sampling') == 'balanced':
        options['order'] = functools.partial(balanced_order, read_labels(source), seed)
    if experiment.on_device:
        return DeviceCachedBatches(source, **options)
    position = np.arange(process * rows, (process + 1) * rows, dtype=np.int32)
    batches = pipeline.train_batches(source, **options)
    return pipeline.Prefetch(batches, lambda b: parallel.shard(b | {'position': position}))
