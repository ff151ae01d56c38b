"""What a config describes and every command needs: the data, the model, its exact evaluation."""

import collections
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments import config as schema
from experiments.run import parallel, step_metrics
from experiments.run.data import Pictures, open_data
from nfnets_jax import augment, models, optimizers
from nfnets_jax.data import pipeline, sources
from nfnets_jax.data.sources import Source
from nfnets_jax.errors import UsageError
from nfnets_jax.schedules import num_steps
from nfnets_jax.weights import pretrained

PyTree = Any


class TrainState(NamedTuple):
    """All that a run is, besides its config: what a checkpoint holds."""

    seed: jax.Array  # int32 scalar, as data: runs that differ by it alone share a program
    numbers: optimizers.Hyperparameters  # float32 scalars, data for the same reason
    step: jax.Array  # int32 scalar, steps done
    params: hk.Params
    state: hk.State  # batch norm's statistics; empty without
    opt_state: PyTree
    ema_params: hk.Params
    ema_state: hk.State
    window: dict[str, jax.Array]  # sums of metrics since the last line of the log

    def variables(self) -> dict[str, tuple[hk.Params, hk.State]]:
        """The networks to evaluate: '' is the trained one, '_ema' the average where there is one.

        The key follows the name of the split in the names of metrics: 'test_ema/top1'.
        """
        raw = {'': (self.params, self.state)}
        return raw | ({'_ema': (self.ema_params, self.ema_state)} if self.ema_params else {})


class Task(NamedTuple):
    """What a config asks for, checked: nothing has been written or computed yet."""

    config: ConfigDict
    train_source: Source
    validation_source: Source | None  # to choose the best checkpoint on; None: the test source
    test_source: Source
    pictures: Pictures
    model: hk.TransformedWithState
    optimizer: optimizers.Optimizer
    augmentation: Callable  # (keys, images, labels) -> (normalised images, soft targets)
    images_per_step: int  # read for one step: the batch size, or twice that where pairs are mixed
    on_device: bool  # whether the training pictures live on the devices
    skip_bad: int  # pictures that cannot be read to skip
    total_steps: int
    log_every: int
    eval_every: int
    checkpoint_every: int
    profile_steps: int  # to trace
    num_parameters: int

    @property
    def splits(self) -> dict[str, Source]:
        """The sources by split; without 'validation' where there is none."""
        return {'train': self.train_source} | self.evaluated

    @property
    def evaluated(self) -> dict[str, Source]:
        """The sources to evaluate on, the one that is watched during training first."""
        validation = self.validation_source
        watched = {} if validation is None else {'validation': validation}
        return watched | {'test': self.test_source}

    @property
    def watched(self) -> str:
        """The split that is evaluated during training and that checkpoints are chosen on."""
        return next(iter(self.evaluated))


def prepare(
    config: ConfigDict,
    *,
    training: bool = True,
    open_source: Callable[..., Source] = sources.open_source,
) -> Task:
    """Opens the data and builds the model and the optimizer that a config describes.

    Args:
      config: as in `experiments.config.default_config`.
      training: whether the batch has to fit the devices there are.
      open_source: (name, split, **options) -> the source.

    Raises:
      UsageError: naming the config key that is wrong.
    """
    schema.check(config)
    with naming('model'):
        models.variant_info(config.model.name)  # The sizes of images follow from it.
    with naming('data'):
        train_source, validation_source, test_source, pictures = open_data(config, open_source)
    num_classes = len(train_source.class_names)
    skip_bad = config.data.get('skip_bad', 0)
    if not isinstance(skip_bad, int) or isinstance(skip_bad, bool) or skip_bad < 0:
        raise UsageError(f'config.data.skip_bad={skip_bad!r}: must be an integer >= 0')
    steps_per_epoch = len(train_source) / config.batch_size
    if steps_per_epoch < 1:
        raise UsageError(
            f'config.batch_size={config.batch_size} is larger than {train_source.name}, '
            f'which has {len(train_source)} examples'
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
            f'config.model.cross_replica_axis={axis!r}: must be {parallel.AXIS!r}, or None'
        )
    model = _build_model(config, num_classes)
    with naming('model'):
        params, _ = jax.eval_shape(lambda: _init_variables(model, config.seed, pictures.shape))
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    with naming('augment'):
        augmentation = augment.make_augment(
            config.augment,
            num_classes,
            mean=pictures.mean,
            std=pictures.std,
            dtype=config.precision,
        )
        images_per_step = config.batch_size * augment.images_per_example(config.augment)
        if images_per_step > len(train_source):
            raise UsageError(
                f"config.augment.mix_pairs='distinct': a step of config.batch_size="
                f'{config.batch_size} reads {images_per_step} images, but {train_source.name} has '
                f"{len(train_source)}: halve the batch, or choose 'batch'"
            )
        if training:
            _check_rows(config, augmentation, images_per_step, pictures)
    optimizer = optimizers.create(
        config.optimizer,
        params,
        batch_size=config.batch_size,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        key='config.optimizer',
    )
    return Task(
        config,
        train_source,
        validation_source,
        test_source,
        pictures,
        model,
        optimizer,
        augmentation,
        images_per_step,
        _is_on_device(config, pictures),
        skip_bad,
        total_steps,
        log_every=steps('log_every', config.log_every, total_steps),
        eval_every=steps('eval.every', config.eval.every, total_steps),
        checkpoint_every=steps('checkpoint.every', config.checkpoint.every, total_steps),
        profile_steps=steps('profile', config.profile, total_steps, minimum=0),
        num_parameters=num_parameters,
    )


def describe_network(task: Task) -> str:
    """Returns a line like 'network: NF-ResNet-8, 78,045 parameters'."""
    name = models.variant_info(task.config.model.name).name
    return f'network: {name}, {task.num_parameters:,} parameters'


def describe_data(task: Task) -> Iterator[str]:
    """Yields what there is to say of the data: what was found where, and what is left out."""
    found = task.splits
    origins = list(dict.fromkeys(source.origin for source in found.values()))
    counts = [
        f'{len(source):,} {"training" if split == "train" else split} images'
        + (f' in {source.origin}' if len(origins) > 1 else '')
        for split, source in found.items()
    ]
    place = f', from {origins[0]}' if len(origins) == 1 else ''
    classes = len(task.train_source.class_names)
    yield f'data: {classes:,} classes; {", ".join(counts)}{place}'
    # Splits that share a directory share what is left out.
    by_origin = {source.origin: source.left_out for source in found.values()}
    left_out = sum(map(collections.Counter, by_origin.values()), collections.Counter())
    if left_out:
        kinds = ', '.join(f'{count:,} {kind}' for kind, count in sorted(left_out.items()))
        yield f'left out, for their names are not those of images: {kinds}'


def describe_steps(task: Task) -> str:
    """Returns the line that says how long the training is and what it runs on."""
    config = task.config
    epochs = task.total_steps * config.batch_size / len(task.train_source)
    return (
        f'steps: {task.total_steps:,} of {config.batch_size:,} images ({epochs:,.3g} epochs) in '
        f'{config.precision}, on {describe_devices()}'
    )


def describe_devices() -> str:
    """Returns a text like '8 devices in 2 processes (TPU v4)'."""
    return f'{parallel.describe_devices()} ({jax.devices()[0].device_kind})'


def make_init(task: Task) -> Callable[..., TrainState]:
    """Returns a compiled function (seed, numbers, weights or None) -> the state before training."""

    @jax.jit  # One program, instead of one for each kind of leaf.
    def init(seed: jax.Array, numbers: optimizers.Hyperparameters, weights) -> TrainState:
        params, state = weights or _init_variables(task.model, seed, task.pictures.shape)
        ema_params, ema_state = (params, state) if task.config.ema else ({}, {})
        return TrainState(
            seed=seed,
            numbers=numbers,
            step=jnp.zeros((), jnp.int32),
            params=params,
            state=state,
            opt_state=task.optimizer.transformation.init(params),
            ema_params=ema_params,
            ema_state=ema_state,
            window=step_metrics.empty(),
        )

    return init


def init_state(
    task: Task,
    weights: tuple[hk.Params, hk.State] | None = None,
    init: Callable[..., TrainState] | None = None,
) -> TrainState:
    """Returns the state before the first step: a function of the config's seed, and `weights`.

    Args:
      task: what to train.
      weights: parameters and state to begin with; None: random ones.
      init: from `make_init`, of this task or one that differs in numbers only.
    """
    numbers = jax.tree.map(jnp.float32, task.optimizer.hyperparameters)
    return (init or make_init(task))(jnp.int32(task.config.seed), numbers, weights)


def load_weights(
    task: Task, directory: str | os.PathLike = ''
) -> tuple[hk.Params, hk.State, pretrained.Report]:
    """Reads what `config.init.weights` names, for `init_state`; a new head is random.

    Args:
      task: what to train.
      directory: of the run. '{study}' in the name is the study it is a trial of, so that a trial's
        config does not depend on where the study is.

    Raises:
      UsageError: they cannot be read, or are those of another network.
    """
    options = task.config.model
    study = os.path.normpath(os.path.join(directory, os.pardir, os.pardir))
    path = task.config.init.weights.replace('{study}', study)
    with naming('init.weights'):
        weights = pretrained.load_pretrained(path)
    if weights.metadata.model not in (None, models.variant_info(options.name).name):
        raise UsageError(
            f'config.init.weights={path}: weights of {weights.metadata.model}, but '
            f'config.model.name={options.name!r}'
        )
    for option, value in weights.metadata.options.items():
        here = options.get(option)
        here = list(here) if isinstance(here, tuple) else here
        if option not in _FREE_OPTIONS and here != value:
            raise UsageError(
                f'config.model.{option}={here!r}: config.init.weights={path} are of '
                f'a network with {value!r}'
            )
    for key in ('mean', 'std'):
        here, value = getattr(task.pictures, key), getattr(weights.metadata, key)
        if not np.allclose(here, value, rtol=0, atol=0.01):  # Of 255: files round it otherwise.
            raise UsageError(
                f'config.data.{key}={here}: config.init.weights={path} were trained with {value}'
            )
    variables = jax.jit(_init_variables, static_argnums=(0, 2))(
        task.model, task.config.seed, task.pictures.shape
    )
    *variables, report = pretrained.fit_weights(
        weights, *variables, new_head=task.config.init.new_head
    )
    if not report.fits:
        raise UsageError(f'config.init.weights={path} do not fit {options.name}: {report}')
    return *variables, report


# Options of a model that weights trained with another value fit all the same.
_FREE_OPTIONS = frozenset(
    {'drop_rate', 'stochdepth_rate', 'bn_decay_rate', 'fc_init', 'skipinit_gain', 'remat', 'scan'}
)


def describe_weights(task: Task) -> pretrained.Metadata:
    """Returns what one must know to use the weights of a run: its model.json."""
    options, classes = task.config.model.to_dict(), task.train_source.class_names
    return pretrained.Metadata(
        model=models.variant_info(options.pop('name')).name,
        options=options,
        num_classes=len(classes),
        class_names=tuple(classes),
        train_size=task.pictures.shape[0],
        test_size=task.pictures.test_size,
        eval_mode=task.pictures.test_mode,
        mean=task.pictures.mean,
        std=task.pictures.std,
    )


def _build_model(config: ConfigDict, num_classes: int) -> hk.TransformedWithState:
    options = config.model.to_dict()
    name = options.pop('name')

    def forward(images, is_training):
        return models.create_model(name, num_classes, **options)(images, is_training)

    return hk.transform_with_state(forward)


def _check_rows(
    config: ConfigDict, augmentation: Callable, images_per_step: int, pictures: Pictures
) -> None:
    """Raises a UsageError if a device's share of the batch is none that can be augmented."""
    parallel.local_batch_size(config.batch_size)
    rows = config.batch_size // parallel.device_count()
    if rows % config.accumulate:
        raise UsageError(
            f'config.accumulate={config.accumulate}: must divide the {rows} examples that each of '
            f'the {parallel.device_count()} devices has of config.batch_size={config.batch_size}'
        )
    rows = images_per_step // parallel.device_count()
    jax.eval_shape(
        augmentation,
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)),
        jax.ShapeDtypeStruct((rows, *pictures.shape), jnp.uint8),
        jax.ShapeDtypeStruct((rows,), jnp.int32),
    )


@contextlib.contextmanager
def naming(node: str) -> Iterator[None]:
    """Puts the config's node before a UsageError of the library, which does not know of configs."""
    try:
        yield
    except UsageError as error:
        message = str(error)
        if message.startswith((f'{node}.', f'{node}: ')):
            message = f'config.{message}'
        elif not message.startswith('config.'):
            message = f'config.{node}: {message}'
        raise UsageError(message) from error


def _is_on_device(config: ConfigDict, pictures: Pictures) -> bool:
    on_device = config.data.get('on_device', False)
    if on_device and pictures.train_transform is not None:
        raise UsageError(
            f'config.data.on_device=True: the pictures of {config.data.name!r} are cropped at '
            'random on the host; leave it False'
        )
    return on_device


def _init_variables(
    model: hk.TransformedWithState, seed: int | jax.Array, image_shape: tuple[int, int, int]
) -> tuple[hk.Params, hk.State]:
    return model.init(jax.random.key(seed), jnp.zeros((1, *image_shape)), True)


def flops_per_image(task: Task) -> float:
    """Returns the operations of a forward and a backward pass for one image of the training set.

    As is usual: two for each multiply-accumulate of convolutions and linear layers. Gradients that
    frozen parameters save do not count, nor does what SAM and recomputation do besides.
    """
    options = task.config.model.to_dict()
    cost = models.model_cost(options.pop('name'), len(task.train_source.class_names), **options)
    groups = task.optimizer.groups
    trained = {name.rpartition('/')[0] for name, group in groups.items() if not group.freeze}
    frozen = {module.name for module in cost.modules} - trained
    return 2 * cost.training_macs(task.pictures.shape[0], frozen)


def make_eval_step(task: Task) -> jax.stages.Wrapped:
    """Returns a parallel function (variables by name, batch) -> sums of metrics by name."""

    def eval_step(variables: Mapping[str, tuple], batch: dict) -> dict[str, dict]:
        precision = schema.eval_precision(task.config)
        mean, std = task.pictures.mean, task.pictures.std
        images = augment.normalize(batch['image'], mean, std, precision)
        labels, mask = batch['label'], batch['mask']

        def sums(params, state):
            outputs, _ = task.model.apply(params, state, None, images, False)
            logits = outputs['logits']
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            _, ranked = jax.lax.top_k(logits, min(5, logits.shape[-1]))
            hits = ranked == labels[:, None]
            return {
                'loss': jnp.sum(losses * mask),
                'top1': jnp.sum(jnp.where(hits[:, 0], mask, 0)),
                'top5': jnp.sum(jnp.where(hits.any(axis=1), mask, 0)),
                'count': jnp.sum(mask),
            }

        totals = {name: sums(*pair) for name, pair in variables.items()}
        return jax.lax.psum(totals, parallel.AXIS)

    return parallel.parallelize(eval_step)


def eval_batch_size(task: Task) -> int:
    """Returns the examples of a step of evaluation, over all devices; a multiple of their number.

    One for all splits, for the step is compiled once.
    """
    devices = parallel.device_count()
    batch_size = min(task.config.eval.batch_size, max(map(len, task.evaluated.values())))
    return -(-batch_size // devices) * devices


def evaluate(
    task: Task, eval_step: Callable, variables: Mapping[str, tuple], split: str = 'test'
) -> dict[str, float]:
    """Evaluates on every example of a split that can be read, exactly once.

    Neither the batch size (here rounded up to a multiple of the devices) nor the number of
    devices or processes has an influence on the result.

    Args:
      task: with the data.
      eval_step: from `make_eval_step`.
      variables: from `TrainState.variables`, placed by `parallel.replicate`.
      split: one of `task.evaluated`.

    Returns:
      {'<split>/loss', '<split>/top1', '<split>/top5'} and '<split>_ema/...': means over these
      examples; where some may be skipped, '<split>/skipped_pictures' too.
    """
    source = task.evaluated[split]
    batches = pipeline.eval_batches(
        source,
        batch_size=eval_batch_size(task),
        transform=task.pictures.test_transform,
        bad=pipeline.UnreadableExamples(task.skip_bad),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    totals: dict[str, dict[str, float]] = {name: {} for name in variables}
    with pipeline.Prefetch(batches, parallel.shard) as prefetched:
        for batch in prefetched:
            for name, sums in jax.device_get(eval_step(variables, batch)).items():
                for key, value in sums.items():
                    totals[name][key] = totals[name].get(key, 0.0) + float(value)
    results = {
        f'{split}{name}/{key}': sums[key] / sums['count']
        for name, sums in totals.items()
        for key in ('loss', 'top1', 'top5')
    }
    if task.skip_bad:
        results[f'{split}/skipped_pictures'] = len(source) - totals['']['count']
    return results


def describe(results: Mapping[str, float]) -> str:
    """Returns a line like 'test top-1 98.88 %, top-5 100.00 % (EMA 99.16 %, 100.00 %)'.

    Where there are results on validation data, they come first.
    """
    lines = []
    for split in ('validation', 'test'):
        if f'{split}/top1' not in results:
            continue
        top1, top5 = (results[f'{split}/{name}'] for name in ('top1', 'top5'))
        line = f'{split} top-1 {top1:.2%}, top-5 {top5:.2%}'
        if f'{split}_ema/top1' in results:
            top1, top5 = (results[f'{split}_ema/{name}'] for name in ('top1', 'top5'))
            line += f' (EMA {top1:.2%}, {top5:.2%})'
        lines.append(line)
    return '; '.join(lines)


def score(results: Mapping[str, float], split: str) -> float:
    """Returns what the best checkpoint is the best in: top-1, of the EMA where there is one."""
    return results.get(f'{split}_ema/top1', results[f'{split}/top1'])
