"""The batches of this process, on its devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.experiment import Experiment
from experiments.run import device_cached, parallel
from experiments.run.device_cached import DeviceCachedBatches
from experiments.run.metric_writers import Writer
from nfnets_jax import augment
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


def eval_batch_size(experiment: Experiment) -> int:
    """Returns the examples of a step of evaluation, over all devices; a multiple of their number.

    It is the same for all splits, because the step is compiled once.
    """
    devices = parallel.device_count()
    longest = max(map(len, experiment.evaluated.values()))
    return -(-min(experiment.config.eval.batch_size, longest) // devices) * devices


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


def write_images(
    writer: Writer, experiment: Experiment, batch: dict[str, jax.Array], *, augmented: bool
) -> None:
    """Writes images of a run's first batch, on process 0; `augmented` ones need a compilation."""
    if parallel.is_primary():
        writer.write_images('images_before_augmentation', some_images(batch))
        if augmented:
            images = augmented_images(experiment, batch)
            writer.write_images('images_after_augmentation', images)


def some_images(batch: dict[str, jax.Array], most: int = 32) -> np.ndarray:
    """Returns the first images of a training batch on this process, uint8 [N, H, W, C].

    They are what the step reads: after cropping, before the augmentation on the device. Where all
    images are on the device they are the first of the data.
    """
    images = batch['image'].addressable_data(0)
    return np.asarray(images[(0,) * (images.ndim - 4)][:most])


def augmented_images(
    experiment: Experiment, batch: dict[str, jax.Array], most: int = 32
) -> np.ndarray:
    """Returns the first images that the network sees in step 0, uint8 [N, H, W, C].

    The augmentation runs on the whole share of this process's first device, because MixUp and
    CutMix mix the images of a share; the normalization is undone.
    """
    share = {name: value.addressable_data(0)[0] for name, value in batch.items()}
    if experiment.on_device:
        share = device_cached.take(share, jnp.int32(0), experiment.images_per_step)
    keys = augment.example_keys(experiment.config.seed, 0, share['position'])
    images, _ = jax.jit(experiment.augmentation)(keys, share['image'], share['label'])
    spec = experiment.image_spec
    pixels = np.asarray(images[:most], np.float32) * np.array(spec.std) + np.array(spec.mean)
    return np.rint(pixels).clip(0, 255).astype(np.uint8)
