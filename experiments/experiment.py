"""The experiment that a config describes: its data, model, optimizer and durations, all checked."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import config as schema
from experiments.config import naming
from experiments.run import parallel
from experiments.run.data import ImageSpec, open_data
from nfnets_jax import augment, models, optimizers
from nfnets_jax.data import sampling, sources
from nfnets_jax.data.sources import Source, read_labels
from nfnets_jax.errors import UsageError
from nfnets_jax.schedules import num_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """What a config describes, checked; nothing has been computed or written yet."""

    config: ConfigDict
    train_source: Source
    validation_source: Source | None  # chooses the best checkpoint; None: the test source does
    test_source: Source
    image_spec: ImageSpec
    model: hk.TransformedWithState
    optimizer: optimizers.Optimizer
    augmentation: Callable  # (keys, images, labels) -> (normalized images, soft targets)
    class_weights: np.ndarray | None  # float32 [classes], in the training loss; None: all 1
    images_per_step: int  # images read for a step: the batch size, twice that with distinct pairs
    on_device: bool  # whether the training images are cached on the devices
    skip_bad: int  # how many unreadable images each process may skip
    total_steps: int
    log_every: int  # steps
    eval_every: int
    checkpoint_every: int
    profile_steps: int
    num_parameters: int
    devices: Sequence[jax.Device]  # of a split CPU; elsewhere (), which means all

    @property
    def label_spec(self) -> jax.ShapeDtypeStruct:
        """What the label of an example is: an integer, or one number for each class."""
        labels = self.train_source.labels
        if labels is None:
            return jax.ShapeDtypeStruct((), np.int32)
        return jax.ShapeDtypeStruct(labels.shape[1:], labels.dtype)

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several labels."""
        return bool(self.label_spec.shape)

    @property
    def splits(self) -> dict[str, Source]:
        """The sources by split; without 'validation' where there is none."""
        return {'train': self.train_source} | self.evaluated

    @property
    def evaluated(self) -> dict[str, Source]:
        """The sources to evaluate on, the watched split first."""
        validation = self.validation_source
        watched = {} if validation is None else {'validation': validation}
        return watched | {'test': self.test_source}

    @property
    def watched(self) -> str:
        """The split that is evaluated during training and chooses the best checkpoint."""
        return next(iter(self.evaluated))


def build(
    config: ConfigDict,
    *,
    training: bool = True,
    open_source: Callable[..., Source] = sources.open_source,
) -> Experiment:
    """Opens the data and builds the model and the optimizer that a config describes.

    Args:
      config: see `experiments.config.default_config`.
      training: whether to check that the training batch fits the devices.
      open_source: (name, split, **options) -> the source.

    Raises:
      UsageError: naming the config key that is wrong.
    """
    schema.check(config)
    with naming('data'):
        train_source, validation_source, test_source, image_spec = open_data(config, open_source)
    skip_bad = config.data.get('skip_bad', 0)
    _check_sampling(config, train_source)
    num_classes = len(train_source.class_names)
    steps_per_epoch = len(train_source) / config.batch_size
    if steps_per_epoch < 1:
        raise UsageError(
            f'config.batch_size={config.batch_size} is larger than {train_source.name}, '
            f'which has {len(train_source)} examples',
            'config.batch_size',
        )

    def steps(key: str, duration: str | int, total: int | None, minimum: int = 1) -> int:
        return num_steps(
            duration,
            steps_per_epoch=steps_per_epoch,
            total_steps=total,
            key=f'config.{key}',
            minimum=minimum,
        )

    total_steps = steps('duration', config.duration, None)
    if (axis := config.model.get('cross_replica_axis')) not in (None, parallel.AXIS):
        raise UsageError(
            f'config.model.cross_replica_axis={axis!r}: must be {parallel.AXIS!r}, or None',
            'config.model.cross_replica_axis',
        )
    options = config.model.to_dict()
    if parallel.cpu_is_split() and 'cross_replica_axis' in models.model_options(options['name']):
        options['cross_replica_axis'] = parallel.AXIS  # Else its cores would not equal one device.
    model = models.build(options.pop('name'), num_classes, **options)
    with naming('model'):
        params, _ = jax.eval_shape(lambda: init_variables(model, config.seed, image_spec.shape))
    with naming('augment'):
        augmentation = augment.make_augment(
            config.augment,
            num_classes,
            mean=image_spec.mean,
            std=image_spec.std,
            dtype=config.precision,
        )
    images_per_step = config.batch_size * augment.images_per_example(config.augment)
    if images_per_step > len(train_source):
        raise UsageError(
            f"config.augment.mix_pairs='distinct': a step of config.batch_size="
            f'{config.batch_size} reads {images_per_step} images, but {train_source.name} has '
            f"{len(train_source)}: halve the batch, or choose 'batch'",
            'config.augment.mix_pairs',
            'config.batch_size',
        )
    class_weights = None
    devices = _cpu_devices(config)
    if training:
        with parallel.using(devices):
            _check_batch_fits_devices(config, images_per_step, image_spec)
        if config.class_weights == 'balanced':
            class_weights = sampling.class_weights(read_labels(train_source), num_classes)
    optimizer = optimizers.create(
        config.optimizer,
        params,
        batch_size=config.batch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        key='config.optimizer',
    )
    return Experiment(
        config=config,
        train_source=train_source,
        validation_source=validation_source,
        test_source=test_source,
        image_spec=image_spec,
        model=model,
        optimizer=optimizer,
        augmentation=augmentation,
        class_weights=class_weights,
        images_per_step=images_per_step,
        on_device=_is_on_device(config, image_spec),
        skip_bad=skip_bad,
        total_steps=total_steps,
        log_every=steps('log_every', config.log_every, total_steps),
        eval_every=steps('eval.every', config.eval.every, total_steps),
        checkpoint_every=steps('checkpoint.every', config.checkpoint.every, total_steps),
        profile_steps=steps('profile', config.profile, total_steps, minimum=0),
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        devices=devices,
    )


def init_variables(
    model: hk.TransformedWithState, seed: int | jax.Array, image_shape: tuple[int, int, int]
) -> tuple[hk.Params, hk.State]:
    """Returns the random parameters and the state that a seed gives."""
    return model.init(jax.random.key(seed), jnp.zeros((1, *image_shape)), True)


def _check_batch_fits_devices(
    config: ConfigDict, images_per_step: int, image_spec: ImageSpec
) -> None:
    """Raises a UsageError if the batch cannot be split over the devices, or a share not mixed."""
    parallel.local_batch_size(config.batch_size)
    rows = config.batch_size // parallel.device_count()
    if rows % config.accumulate:
        raise UsageError(
            f'config.accumulate={config.accumulate}: must divide the {rows} examples that each of '
            f'the {parallel.device_count()} devices has of config.batch_size={config.batch_size}',
            'config.accumulate',
            'config.batch_size',
        )
    # Only mixing needs a multiple of images. Tracing the distortions would take half a second.
    undistorted = {**config.augment, 'randaugment_layers': 0, 'autoaugment': False}
    rows = images_per_step // parallel.device_count()
    with naming('augment'):
        jax.eval_shape(
            augment.make_augment(undistorted, 2, mean=image_spec.mean, std=image_spec.std),
            jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)),
            jax.ShapeDtypeStruct((rows, *image_spec.shape), jnp.uint8),
            jax.ShapeDtypeStruct((rows,), jnp.int32),
        )


def _cpu_devices(config: ConfigDict) -> Sequence[jax.Device]:
    """Returns the cores of a split CPU that together compute what one device does, up to rounding.

    Each takes a multiple of 4 images, as MixUp and CutMix together need. () means all devices.
    """
    if not parallel.cpu_is_split():
        return ()
    cores = jax.local_devices()
    if config.accumulate > 1 or computed_per_device(config, has_statistics=False):
        return cores[:1]
    fitting = (n for n in range(len(cores), 1, -1) if config.batch_size % (4 * n) == 0)
    return cores[: next(fitting, 1)]


def computed_per_device(config: ConfigDict, *, has_statistics: bool) -> list[str]:
    """Names what depends on which examples share a device, and so on the number of devices.

    Args:
      config: of an experiment.
      has_statistics: whether the network has batch norm's.
    """
    options = config.model
    published = models.variant_info(options.name)

    def rate(option: str) -> float:
        given = options.get(option)
        return getattr(published, option) if given is None else given

    synchronized = parallel.cpu_is_split() or options.get('cross_replica_axis')
    holds = {
        'the ascent of SAM': config.sam.rho > 0,
        'the statistics of batch norm': has_statistics and not synchronized,
        'dropout': rate('drop_rate') > 0,
        'stochastic depth': rate('stochdepth_rate') > 0,
    }
    return [name for name, held in holds.items() if held]


def _check_sampling(config: ConfigDict, source: Source) -> None:
    several = source.labels is not None and source.labels.ndim == 2
    if several and config.data.get('sampling') == 'balanced':
        raise UsageError(
            f"config.data.sampling='balanced': images of {source.name} may have several labels, "
            "and so no class to be drawn by; choose config.class_weights='balanced'",
            'config.data.sampling',
            'config.class_weights',
        )


def _is_on_device(config: ConfigDict, image_spec: ImageSpec) -> bool:
    on_device = config.data.get('on_device', False)
    if on_device and image_spec.train_transform is not None:
        raise UsageError(
            f'config.data.on_device=True: the images of {config.data.name!r} are cropped at '
            'random on the host; leave it False',
            'config.data.on_device',
        )
    return on_device


def describe(experiment: Experiment) -> Iterator[str]:
    """Yields the lines with which a training run begins."""
    yield describe_network(experiment)
    yield from describe_data(experiment)
    yield from describe_imbalance(experiment)
    yield describe_steps(experiment)


def describe_network(experiment: Experiment) -> str:
    """Returns a line like 'network: NF-ResNet-8, 78,045 parameters'."""
    name = models.variant_info(experiment.config.model.name).name
    return f'network: {name}, {experiment.num_parameters:,} parameters'


def describe_data(experiment: Experiment) -> Iterator[str]:
    """Yields lines about the data: classes, images and where they are, and files left out."""
    splits = experiment.splits
    origins = list(dict.fromkeys(source.origin for source in splits.values()))
    counts = [
        f'{len(source):,} {"training" if split == "train" else split} images'
        + (f' in {source.origin}' if len(origins) > 1 else '')
        for split, source in splits.items()
    ]
    place = f', from {origins[0]}' if len(origins) == 1 else ''
    classes = len(experiment.train_source.class_names)
    several = ', of which an image may have several' if experiment.multi_label else ''
    yield f'data: {classes:,} classes{several}; {", ".join(counts)}{place}'
    # Splits that share a directory share the files that are left out.
    by_origin = {source.origin: source.left_out for source in splits.values()}
    left_out = sum(map(collections.Counter, by_origin.values()), collections.Counter())
    if left_out:
        kinds = ', '.join(f'{count:,} {kind}' for kind, count in sorted(left_out.items()))
        yield f'left out, because their names are not those of images: {kinds}'


_UNEQUAL = 10  # times the images of another class


def describe_imbalance(experiment: Experiment) -> Iterator[str]:
    """Yields a line if one class has ten times the images of another: their names and numbers."""
    source, config = experiment.train_source, experiment.config
    if source.labels is None:  # Counting them would read all the data.
        return
    counts = sampling.class_counts(source.labels, len(source.class_names))
    most, fewest = counts.argmax(), counts.argmin()
    if counts[most] < _UNEQUAL * counts[fewest]:
        return
    line = (
        f'unequal classes: {source.class_names[most]!r} has {counts[most]:,} training images, '
        f'{source.class_names[fewest]!r} {counts[fewest]:,}'
    )
    remedies = {'--config.class_weights=balanced': config.class_weights}
    if not experiment.multi_label:
        remedies = {'--config.data.sampling=balanced': config.data.get('sampling')} | remedies
    given = [option for option, value in remedies.items() if value == 'balanced']
    yield (
        f'{line}; with {" and ".join(given)}'
        if given
        else f'{line}; consider {" or ".join(remedies)}'
    )


def describe_steps(experiment: Experiment) -> str:
    """Returns a line with the length of the training, its precision and its devices."""
    config = experiment.config
    epochs = experiment.total_steps * config.batch_size / len(experiment.train_source)
    return (
        f'steps: {experiment.total_steps:,} of {config.batch_size:,} images ({epochs:,.3g} epochs) '
        f'in {config.precision}, on {describe_devices()}'
    )


def describe_devices() -> str:
    """Returns a text like '8 devices in 2 processes (TPU v4)'."""
    kind = jax.devices()[0].device_kind
    cores = parallel.cpu_is_split() and parallel.device_count() > 1
    return f'{parallel.describe_devices()} ({f"cores of one {kind}" if cores else kind})'
