"""The compiled programs of an experiment: initial state, training step and evaluation step.

A training step, on every device: augmentation, forward and backward pass -> mean gradient over the
devices -> clipping, decay, momentum -> parameters -> their moving average. Frozen parameters enter
the forward pass only. All randomness is a function of (seed, step, position in the batch).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from experiments import config as schema
from experiments.experiment import Experiment, init_variables
from experiments.run import device_cached, parallel, step_metrics
from experiments.run.losses import cross_entropy
from experiments.run.predictions import LogitsFn, make_predict_step
from nfnets_jax import agc, augment, optimizers
from nfnets_jax.sam import sam_value_and_grad

# Separates the randomness of dropout and stochastic depth from that of the augmentations, which
# count from 0. Each device has its own, so these masks depend on the number of devices.
_MODEL_STREAM = 1 << 16
# Names of parts of the step, in profiles and compiled programs.
AUGMENTATION, EXCHANGE, UPDATE, EMA = 'augmentation', 'exchange', 'update', 'moving_average'


class TrainState(NamedTuple):
    """The state of a run: everything but its config. The content of a checkpoint.

    Checkpoints store the fields by name. Renaming one would need a conversion of earlier runs.
    """

    seed: jax.Array  # int32 scalar, as data: runs that differ only in the seed share a program
    numbers: optimizers.Hyperparameters  # float32 scalars, as data for the same reason
    step: jax.Array  # int32 scalar, steps done
    params: hk.Params
    state: hk.State  # statistics of batch norm; empty without
    opt_state: Any
    ema_params: hk.Params
    ema_state: hk.State
    window: step_metrics.StepMetrics  # sums since the last line of metrics

    def variables(self) -> dict[str, tuple[hk.Params, hk.State]]:
        """Returns the variables to evaluate: '' trained ones, '_ema' the average if there is one.

        The key follows the name of the split in the names of metrics: 'test_ema/top1'.
        """
        raw = {'': (self.params, self.state)}
        return raw | ({'_ema': (self.ema_params, self.ema_state)} if self.ema_params else {})


class Programs(NamedTuple):
    """The compiled functions of an experiment."""

    init: Callable[..., TrainState]
    train_step: jax.stages.Wrapped
    eval_step: jax.stages.Wrapped


def compile_programs(experiment: Experiment, cache: dict[str, Programs]) -> Programs:
    """Returns the programs of an experiment, from the cache if an earlier one had the same.

    They are compiled when they are first called.
    """
    key = program_key(experiment.config)
    if key not in cache:
        cache[key] = Programs(
            make_init(experiment), make_train_step(experiment), make_eval_step(experiment)
        )
    return cache[key]


def program_key(config: ConfigDict) -> str:
    """Returns the cache key of the programs: equal if and only if the compiled programs are.

    The seed and `optimizers.Hyperparameters` are data, so they are not part of it.
    """
    config = config.copy_and_resolve_references().unlock()
    for key in ('init', 'checkpoint', 'profile', 'wandb'):
        del config[key]
    config.seed = config.optimizer.learning_rate = config.optimizer.weight_decay = 0
    config.optimizer.clip.clipping = 0
    return config.to_json_best_effort(sort_keys=True)


# ------------------------------------------------------------------------------------------- init


def make_init(experiment: Experiment) -> Callable[..., TrainState]:
    """Returns a compiled function (seed, hyperparameters, weights or None) -> initial state."""

    @jax.jit  # One program instead of one for each kind of leaf.
    def init(seed: jax.Array, numbers: optimizers.Hyperparameters, weights) -> TrainState:
        params, state = weights or init_variables(
            experiment.model, seed, experiment.image_spec.shape
        )
        ema_params, ema_state = (params, state) if experiment.config.ema else ({}, {})
        return TrainState(
            seed=seed,
            numbers=numbers,
            step=jnp.zeros((), jnp.int32),
            params=params,
            state=state,
            opt_state=experiment.optimizer.transformation.init(params),
            ema_params=ema_params,
            ema_state=ema_state,
            window=step_metrics.zeros(len(layers(experiment.config, params))),
        )

    return init


def layers(config: ConfigDict, params: hk.Params) -> list[str]:
    """Returns the names of the layers that metrics are written of; [] without `log_by_layer`."""
    return agc.clipping_groups(params) if config.log_by_layer else []


def init_state(
    experiment: Experiment,
    weights: tuple[hk.Params, hk.State] | None = None,
    init: Callable[..., TrainState] | None = None,
) -> TrainState:
    """Returns the state before the first step, with random parameters or the given weights.

    `init` is from `make_init` of this experiment or one that differs in hyperparameters only.
    """
    numbers = jax.tree.map(jnp.float32, experiment.optimizer.hyperparameters)
    return (init or make_init(experiment))(jnp.int32(experiment.config.seed), numbers, weights)


# ------------------------------------------------------------------------------------------- loss


def _make_loss_and_gradient(experiment: Experiment) -> Callable:
    """Returns (trained, batch, frozen, state, key) -> (loss, (state, logits)), gradient.

    All are of this device's examples. The gradient is that of the trained parameters.
    """
    config = experiment.config

    def loss_fn(trained, batch, frozen, state, key):
        params = optimizers.combine(trained, frozen)
        outputs, state = experiment.model.apply(params, state, key, batch['image'], True)
        losses = cross_entropy(
            outputs['logits'],
            batch['target'],
            experiment.class_weights,
            multi_label=experiment.multi_label,
        )
        return jnp.mean(losses), (state, outputs['logits'])

    value_and_grad: Callable = jax.value_and_grad
    if config.accumulate > 1:
        rows = config.batch_size // (parallel.device_count() * config.accumulate)
        value_and_grad = functools.partial(_accumulated_value_and_grad, rows)
    if not config.sam.rho:
        return value_and_grad(loss_fn, has_aux=True)
    sam = sam_value_and_grad(
        loss_fn,
        config.sam.rho,
        ascent_fraction=config.sam.ascent_fraction,
        has_aux=True,
        both_aux=True,
        value_and_grad=value_and_grad,
    )

    def loss_and_gradient(*args):
        # The statistics of batch norm are those of the first pass, with the parameters themselves.
        (loss, ((state, _), (_, logits))), gradient = sam(*args)
        return (loss, (state, logits)), gradient

    return loss_and_gradient


def _accumulated_value_and_grad(rows: int, loss_fn: Callable, *, has_aux: bool) -> Callable:
    """Returns `jax.value_and_grad`, computed in parts of `rows` examples, one after the other.

    The last part is smaller if `rows` does not divide the batch, as in SAM's ascent, which takes a
    share of the batch. Each part starts from the state that the part before left, and has its own
    randomness.

    Args:
      rows: examples in a part.
      loss_fn: (params, batch, frozen, state, key) -> (mean loss over the batch, (state, output of
        each example)).
      has_aux: must be True.

    Returns:
      A function of the arguments of `loss_fn` -> ((loss, (state, outputs)), gradient) of the whole
      batch.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=has_aux)

    def accumulated(params, batch, frozen, state, key):
        def add(carry, part):
            total, state = carry
            index, examples = part
            (loss, (state, outputs)), gradient = value_and_grad(
                params, examples, frozen, state, jax.random.fold_in(key, index)
            )
            share = len(outputs) / rows
            total = jax.tree.map(lambda x, y: x + share * y, total, (loss, gradient))
            return (total, state), outputs

        size = len(jax.tree.leaves(batch)[0])
        parts, rest = divmod(size, rows)
        carry = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params)), state
        outputs = []
        if parts:
            split = jax.tree.map(
                lambda x: x[: parts * rows].reshape(parts, rows, *x.shape[1:]), batch
            )
            carry, stacked = jax.lax.scan(add, carry, (jnp.arange(parts), split))
            outputs.append(stacked.reshape(-1, *stacked.shape[2:]))
        if rest:
            carry, last = add(carry, (parts, jax.tree.map(lambda x: x[parts * rows :], batch)))
            outputs.append(last)
        total, state = carry
        loss, gradient = jax.tree.map(lambda x: x / (size / rows), total)
        return (loss, (state, jnp.concatenate(outputs))), gradient

    return accumulated


# ----------------------------------------------------------------------------------------- update


def make_train_step(experiment: Experiment) -> jax.stages.Wrapped:
    """Returns the parallel update: (state, batch) -> (state, metrics of this step).

    The batch holds `experiment.images_per_step` images, labels and positions, and 'stop', float32
    [devices, 1]. The metrics are the means over all devices of `step_metrics.METRICS` and 'stop'.
    """
    config = experiment.config
    loss_and_gradient = _make_loss_and_gradient(experiment)

    def train_step(s: TrainState, batch: dict) -> tuple[TrainState, dict[str, jax.Array]]:
        stop = batch['stop'][0]
        if experiment.on_device:
            batch = device_cached.take(batch, s.step, experiment.images_per_step)
        with jax.named_scope(AUGMENTATION):
            keys = augment.example_keys(s.seed, s.step, batch['position'])
            images, targets = experiment.augmentation(keys, batch['image'], batch['label'])
        key = jax.random.fold_in(keys[0], _MODEL_STREAM)

        trained, frozen = optimizers.partition(s.params, experiment.optimizer.groups)
        (loss, (state, logits)), gradients = loss_and_gradient(
            trained, {'image': images, 'target': targets}, frozen, s.state, key
        )
        hits = jnp.argmax(logits, axis=-1) == jnp.argmax(targets, axis=-1)
        if experiment.multi_label:
            hits = _has_label(targets, logits)
        gradients, state, metrics = _mean_over_devices(
            gradients,
            state,
            {'loss': loss, 'top1': jnp.mean(hits), 'stop': stop},
            config.gradient_dtype,
        )

        optimizer = experiment.optimizer.with_hyperparameters(s.numbers)
        before = trained
        with jax.named_scope(UPDATE):
            updates, opt_state = optimizer.update(
                gradients, s.opt_state, trained, value=metrics['loss']
            )
            trained = optax.apply_updates(trained, updates)

        ema_params, ema_state = s.ema_params, s.ema_state
        if config.ema:
            decay = optimizers.ema_decay(s.step, config.ema)
            average, constant = optimizers.partition(ema_params, experiment.optimizer.groups)
            with jax.named_scope(EMA):
                average, ema_state = optimizers.ema_update(
                    (average, ema_state), (trained, state), decay
                )
            ema_params = optimizers.combine(average, constant)

        metrics |= {
            'gradient_norm': optax.tree.norm(gradients),
            'clipped_fraction': optax.tree.get(opt_state, 'clipped_fraction', jnp.zeros(())),
        }
        if config.log_by_layer:
            ratios = agc.gradient_to_weight(gradients, before, config.optimizer.clip.eps)
            clipped = optax.tree.get(opt_state, 'clipped_fraction_by_group', jnp.zeros_like(ratios))
            metrics |= dict(zip(step_metrics.BY_LAYER, (clipped, ratios), strict=True))
        new = s._replace(
            step=s.step + 1,
            params=optimizers.combine(trained, frozen),
            state=state,
            opt_state=opt_state,
            ema_params=ema_params,
            ema_state=ema_state,
            window=step_metrics.add(
                s.window, metrics, s.step, experiment.log_every, config.skip_nonfinite
            ),
        )
        if config.skip_nonfinite:
            skipped = s._replace(step=new.step, window=new.window)
            finite = step_metrics.is_finite(metrics)
            new = jax.tree.map(functools.partial(jnp.where, finite), new, skipped)
        return new, metrics

    return parallel.parallelize(train_step, donate_replicated=True)


@jax.named_scope(EXCHANGE)
def _mean_over_devices(gradients, state: hk.State, metrics: dict, dtype: str):
    """Returns the means of all three, in one all-reduce if `dtype` is float32.

    The running statistics of batch norm differ between devices unless they are synchronized; its
    counters do not.
    """
    # Divided before the sum, in the operation that ends the backward pass of each leaf. Behind the
    # all-reduce the division would be another pass over all gradients: 1.06 of the 36.97 million
    # cycles of an NFNet-F0's step on a TPU v5e.
    count = jax.lax.axis_size(parallel.AXIS)
    low = jax.tree.map(lambda x: (x / count).astype(dtype), gradients)
    floats, counters = hk.data_structures.partition(
        lambda _module, _name, x: jnp.issubdtype(x.dtype, jnp.floating), state
    )
    low, *others = jax.lax.psum((low, floats, metrics), parallel.AXIS)
    floats, metrics = jax.tree.map(lambda x: x / count, others)
    gradients = jax.tree.map(lambda x, full: x.astype(full.dtype), low, gradients)
    return gradients, hk.data_structures.merge(floats, counters), metrics


def _has_label(targets: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns whether the highest class of each example is one of its labels, bool [N]."""
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    return jnp.take_along_axis(targets, best, axis=-1)[:, 0] > 0.5  # mixed and smoothed, too


# --------------------------------------------------------------------------------------- evaluate


def make_eval_step(experiment: Experiment, *, flip: bool = False) -> jax.stages.Wrapped:
    """Returns a parallel function (variables by name, batch) -> metrics, and what is correct.

    The batch holds 'image', 'label', 'index' and 'mask', which is 0 for examples that do not count.
    The result holds 'sums' and 'correct' by name, and 'index' and 'mask' of all examples. For
    `flip` see `make_logits_fn`. With several labels for an image it is that of `make_predict_step`,
    because average precision needs the order of all images.
    """
    logits_fn = make_logits_fn(experiment, flip=flip)
    if experiment.multi_label:
        return make_predict_step(logits_fn)

    def eval_step(variables: Mapping[str, tuple], batch: dict) -> dict[str, dict]:
        examples = {
            name: _metrics(logits_fn(params, state, batch['image']), batch['label'], batch['mask'])
            for name, (params, state) in variables.items()
        }
        rest = {name: batch[name] for name in ('index', 'mask')}
        rest['correct'] = {name: values['top1'] for name, values in examples.items()}
        sums = jax.lax.psum(jax.tree.map(jnp.sum, examples), parallel.AXIS)
        return {'sums': sums} | jax.lax.all_gather(rest, parallel.AXIS, tiled=True)

    return parallel.parallelize(eval_step)


# With fewer classes top-5 says nothing: a guess among nine is right in more than half of the cases.
FEWEST_CLASSES_FOR_TOP5 = 10


def _metrics(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Returns the metrics of each example, [n]; 0 where it does not count."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    ranks = (1, 5) if logits.shape[-1] >= FEWEST_CLASSES_FOR_TOP5 else (1,)
    _, ranked = jax.lax.top_k(logits, ranks[-1])
    hits = ranked == labels[:, None]
    right = {f'top{k}': jnp.where(hits[:, :k].any(1), mask, 0) for k in ranks}
    return {'loss': losses * mask, **right, 'count': mask}


def make_logits_fn(experiment: Experiment, *, flip: bool = False) -> LogitsFn:
    """Returns the function (params, state, images of the data) -> logits of evaluation.

    Args:
      experiment: the experiment with the network.
      flip: whether to average the probabilities over each image and its mirror image. The logits
        are then log probabilities, or log odds where images may have several labels.
    """
    precision = schema.eval_precision(experiment.config)
    mean, std = experiment.image_spec.mean, experiment.image_spec.std

    def logits_fn(params: hk.Params, state: hk.State, images: jax.Array) -> jax.Array:
        def forward(images: jax.Array) -> jax.Array:
            return experiment.model.apply(params, state, None, images, False)[0]['logits']

        images = augment.normalize(images, mean, std, precision)
        if not flip:
            return forward(images)
        both = jnp.stack([forward(images), forward(images[:, :, ::-1])])
        if experiment.multi_label:
            there, absent = (jax.nn.logsumexp(jax.nn.log_sigmoid(x), axis=0) for x in (both, -both))
            return there - absent
        return jax.nn.logsumexp(jax.nn.log_softmax(both), axis=0) - jnp.log(2.0)

    return logits_fn
