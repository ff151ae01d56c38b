"""The training batches of this process, on its devices."""

import jax
import numpy as np

from experiments.experiment import Experiment
from experiments.run import parallel
from experiments.run.device_cached import DeviceCachedBatches
from nfnets_jax.data import pipeline


def open_batches(
    experiment: Experiment, start_step: int, bad: pipeline.UnreadableExamples
) -> pipeline.Prefetch | DeviceCachedBatches:
    """Returns this process's training batches on its devices, from `start_step` on."""
    process, rows = jax.process_index(), parallel.local_batch_size(experiment.images_per_step)
    options = {
        'batch_size': experiment.images_per_step,
        'seed': experiment.config.seed,
        'start_step': start_step,
        'transform': experiment.image_spec.train_transform,
        'process_index': process,
        'process_count': jax.process_count(),
        'bad': bad,
    }
    if experiment.on_device:
        return DeviceCachedBatches(experiment.train_source, **options)
    position = np.arange(process * rows, (process + 1) * rows, dtype=np.int32)
    batches = pipeline.train_batches(experiment.train_source, **options)
    return pipeline.Prefetch(batches, lambda b: parallel.shard(b | {'position': position}))
