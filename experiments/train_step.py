"""What one training step computes, on every device: from a batch of pictures to new parameters.

Augmentation, forward and backward pass on each device -> mean gradient -> clip, decay, momentum ->
parameters -> their moving average. All randomness is a function of (seed, step, position in the
batch).
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from experiments import window
from experiments.task import Task, TrainState, make_eval_step, make_init
from nfnets_jax import augment, optimizers, parallel
from nfnets_jax.data import resident
from nfnets_jax.sam import sam_value_and_grad

# Keeps the randomness of dropout and stochastic depth apart from that of the augmentations, which
# are numbered from 0. It is the device's own: these masks do depend on the number of devices.
_MODEL_STREAM = 1 << 16


def make_train_step(task: Task) -> Callable[[TrainState, dict], tuple[TrainState, jax.Array]]:
    """Returns the parallel update: (state, batch of images, labels, positions) -> (state, stop).

    The batch is of `task.images_per_step` images, from which the augmentation makes the examples.
    The batch also holds `stop`, float32 [devices, 1], and its mean is returned: see `stopping`.
    """
    config = task.config

    def loss_fn(params, batch, state, key):
        outputs, state = task.model.apply(params, state, key, batch['image'], True)
        losses = optax.softmax_cross_entropy(outputs['logits'], batch['target'])
        return jnp.mean(losses), (state, outputs['logits'])

    def value_and_gradient(params, batch, state, key):
        if not config.sam.rho:
            (loss, (state, logits)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
                params, batch, state, key
            )
            return (loss, gradients), state, logits
        # Statistics are those of the parameters that are kept, so of the first of the two passes.
        sam = sam_value_and_grad(
            loss_fn,
            config.sam.rho,
            ascent_fraction=config.sam.ascent_fraction,
            has_aux=True,
            both_aux=True,
        )
        (loss, ((state, _), (_, logits))), gradients = sam(params, batch, state, key)
        return (loss, gradients), state, logits

    def train_step(s: TrainState, batch: dict) -> tuple[TrainState, jax.Array]:
        stop = batch['stop'][0]
        if task.on_device:
            batch = resident.take(batch, s.step, task.images_per_step)
        keys = augment.example_keys(s.seed, s.step, batch['position'])
        images, targets = task.augmentation(keys, batch['image'], batch['label'])
        key = jax.random.fold_in(keys[0], _MODEL_STREAM)

        (loss, gradients), state, logits = _in_parts(
            config.accumulate,
            functools.partial(value_and_gradient, s.params),
            {'image': images, 'target': targets},
            s.state,
            key,
        )
        hits = jnp.argmax(logits, axis=-1) == jnp.argmax(targets, axis=-1)
        gradients, state, metrics = _mean_over_devices(
            gradients,
            state,
            {'loss': loss, 'top1': jnp.mean(hits), 'stop': stop},
            config.gradient_dtype,
        )
        stop = metrics.pop('stop')

        optimizer = task.optimizer.with_numbers(s.numbers)
        updates, opt_state = optimizer.update(gradients, s.opt_state, s.params)
        params = optax.apply_updates(s.params, updates)

        ema_params, ema_state = s.ema_params, s.ema_state
        if config.ema:
            decay = optimizers.ema_decay(s.step, config.ema)
            ema_params, ema_state = optimizers.ema_update(
                (ema_params, ema_state), (params, state), decay
            )

        metrics |= {
            'gradient_norm': optax.tree.norm(gradients),
            'clipped_fraction': optax.tree.get(opt_state, 'clipped_fraction', jnp.zeros(())),
        }
        new = s._replace(
            step=s.step + 1,
            params=params,
            state=state,
            opt_state=opt_state,
            ema_params=ema_params,
            ema_state=ema_state,
            window=window.add(s.window, metrics, s.step, task.log_every, config.skip_nonfinite),
        )
        if not config.skip_nonfinite:
            return new, stop
        left_out = s._replace(step=new.step, window=new.window)
        finite = window.is_finite(metrics)
        return jax.tree.map(functools.partial(jnp.where, finite), new, left_out), stop

    return parallel.parallelise(train_step, donate_replicated=True)


def _in_parts(parts: int, value_and_gradient: Callable, batch: dict, state: hk.State, key):
    """Returns the mean value and gradient over `parts` equal parts of a batch, taken in turn.

    Each part sees the state that the one before has left, and has randomness of its own.

    Args:
      parts: how many.
      value_and_gradient: (batch, state, key) -> (value and gradient, state, output for each
        example).
      batch: a tree of arrays [b, ...], b divisible by `parts`.
      state, key: for `value_and_gradient`.

    Returns:
      As `value_and_gradient`, for the whole batch.
    """
    if parts == 1:
        return value_and_gradient(batch, state, key)

    def add(carry, part):
        total, state = carry
        index, examples = part
        one, state, outputs = value_and_gradient(examples, state, jax.random.fold_in(key, index))
        return (jax.tree.map(jnp.add, total, one), state), outputs

    examples = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    one, *_ = jax.eval_shape(value_and_gradient, jax.tree.map(lambda x: x[0], examples), state, key)
    (total, state), outputs = jax.lax.scan(
        add,
        (jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one), state),
        (jnp.arange(parts), examples),
    )
    mean = jax.tree.map(lambda x: x / parts, total)
    return mean, state, outputs.reshape(-1, *outputs.shape[2:])


def _mean_over_devices(gradients, state: hk.State, metrics: dict, dtype: str):
    """Returns the means of all three, in one all-reduce if `dtype` is float32.

    Batch norm's running statistics differ where each device has its own; its counters do not.
    """
    low = jax.tree.map(lambda x: x.astype(dtype), gradients)
    floats, counters = hk.data_structures.partition(
        lambda _module, _name, x: jnp.issubdtype(x.dtype, jnp.floating), state
    )
    low, floats, metrics = jax.lax.pmean((low, floats, metrics), parallel.AXIS)
    gradients = jax.tree.map(lambda x, like: x.astype(like.dtype), low, gradients)
    return gradients, hk.data_structures.merge(floats, counters), metrics


class Programs(NamedTuple):
    """What of a task is compiled."""

    init_state: Callable[..., TrainState]
    train_step: Callable[[TrainState, dict], tuple[TrainState, jax.Array]]
    eval_step: Callable[[Mapping, dict], dict]


def program_key(config: ConfigDict) -> str:
    """Returns what configs that need the same programs have in common, and no others.

    The numbers that are data make no difference: the seed and `optimizers.Numbers`.
    """
    config = config.copy_and_resolve_references().unlock()
    for key in ('init', 'checkpoint', 'profile', 'wandb'):
        del config[key]
    config.seed = config.optimizer.learning_rate = config.optimizer.weight_decay = 0
    config.optimizer.clip.clipping = 0
    return config.to_json_best_effort(sort_keys=True)


def compile_programs(task: Task, cache: dict[str, Programs]) -> Programs:
    """Returns the programs of a task, those of an earlier one from the cache if they are the same.

    They are compiled where they are first called.
    """
    key = program_key(task.config)
    if key not in cache:
        cache[key] = Programs(make_init(task), make_train_step(task), make_eval_step(task))
    return cache[key]
