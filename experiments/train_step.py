"""What one training step computes, on every device: from a batch of images to new parameters.

Augmentation, forward and backward pass on each device -> mean gradient -> clip, decay, momentum ->
parameters -> their moving average. Frozen parameters go into the forward pass and nowhere else.
All randomness is a function of (seed, step, position in the batch).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from experiments.experiment import Task, TrainState, make_eval_step, make_init
from experiments.run import device_cached, parallel, step_metrics
from nfnets_jax import augment, models, optimizers
from nfnets_jax.sam import sam_value_and_grad

# Keeps the randomness of dropout and stochastic depth apart from that of the augmentations, which
# are numbered from 0. It is the device's own: these masks do depend on the number of devices.
_MODEL_STREAM = 1 << 16
# Names of parts of the step, in profiles and compiled programs.
AUGMENTATION, EXCHANGE, UPDATE, EMA = 'augmentation', 'exchange', 'update', 'moving_average'


def make_train_step(task: Task) -> jax.stages.Wrapped:
    """Returns the parallel update: (state, batch of images, labels, positions) -> (state, stop).

    The batch is of `task.images_per_step` images, from which the augmentation makes the examples.
    The batch also holds `stop`, float32 [devices, 1], and its mean is returned: see `preemption`.
    """
    config = task.config
    rows = config.batch_size // (parallel.device_count() * config.accumulate)
    value_and_grad = (
        functools.partial(_accumulated_value_and_grad, rows)
        if config.accumulate > 1
        else jax.value_and_grad
    )

    def loss_fn(trained, batch, frozen, state, key):
        params = optimizers.combine(trained, frozen)
        outputs, state = task.model.apply(params, state, key, batch['image'], True)
        losses = optax.softmax_cross_entropy(outputs['logits'], batch['target'])
        return jnp.mean(losses), (state, outputs['logits'])

    def loss_and_gradient(trained, batch, frozen, state, key):
        """Returns (loss, (state, logits)), gradient; of this device's examples."""
        if not config.sam.rho:
            return value_and_grad(loss_fn, has_aux=True)(trained, batch, frozen, state, key)
        sam = sam_value_and_grad(
            loss_fn,
            config.sam.rho,
            ascent_fraction=config.sam.ascent_fraction,
            has_aux=True,
            both_aux=True,
            value_and_grad=value_and_grad,
        )
        # Statistics are those of the parameters that are kept, so of the first of the two passes.
        (loss, ((state, _), (_, logits))), gradient = sam(trained, batch, frozen, state, key)
        return (loss, (state, logits)), gradient

    def train_step(s: TrainState, batch: dict) -> tuple[TrainState, jax.Array]:
        stop = batch['stop'][0]
        if task.on_device:
            batch = device_cached.take(batch, s.step, task.images_per_step)
        with jax.named_scope(AUGMENTATION):
            keys = augment.example_keys(s.seed, s.step, batch['position'])
            images, targets = task.augmentation(keys, batch['image'], batch['label'])
        key = jax.random.fold_in(keys[0], _MODEL_STREAM)

        # Whatever follows sees the trained parameters alone.
        trained, frozen = optimizers.partition(s.params, task.optimizer.groups)
        (loss, (state, logits)), gradients = loss_and_gradient(
            trained, {'image': images, 'target': targets}, frozen, s.state, key
        )
        hits = jnp.argmax(logits, axis=-1) == jnp.argmax(targets, axis=-1)
        gradients, state, metrics = _mean_over_devices(
            gradients,
            state,
            {'loss': loss, 'top1': jnp.mean(hits), 'stop': stop},
            config.gradient_dtype,
        )
        stop = metrics.pop('stop')

        optimizer = task.optimizer.with_hyperparameters(s.numbers)
        with jax.named_scope(UPDATE):
            updates, opt_state = optimizer.update(gradients, s.opt_state, trained)
            trained = optax.apply_updates(trained, updates)
        params = optimizers.combine(trained, frozen)

        ema_params, ema_state = s.ema_params, s.ema_state
        if config.ema:
            decay = optimizers.ema_decay(s.step, config.ema)
            average, constant = optimizers.partition(ema_params, task.optimizer.groups)
            with jax.named_scope(EMA):
                average, ema_state = optimizers.ema_update(
                    (average, ema_state), (trained, state), decay
                )
            ema_params = optimizers.combine(average, constant)

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
            window=step_metrics.add(
                s.window, metrics, s.step, task.log_every, config.skip_nonfinite
            ),
        )
        if not config.skip_nonfinite:
            return new, stop
        left_out = s._replace(step=new.step, window=new.window)
        finite = step_metrics.is_finite(metrics)
        return jax.tree.map(functools.partial(jnp.where, finite), new, left_out), stop

    return parallel.parallelize(train_step, donate_replicated=True)


def _accumulated_value_and_grad(rows: int, loss_fn: Callable, *, has_aux: bool) -> Callable:
    """`jax.value_and_grad`, computed in parts of `rows` examples that are taken in turn.

    The last part is smaller where `rows` does not divide the batch: that of SAM's ascent is a share
    of the whole. Each part sees the state that the one before has left, and has randomness of its
    own.

    Args:
      rows: examples in a part.
      loss_fn: (params, batch, frozen, state, key) -> (mean loss over the batch, (state, output for
        each example)).
      has_aux: must be True, as `loss_fn` has it.

    Returns:
      A function with the arguments of `loss_fn` -> ((loss, (state, outputs)), gradient), all of the
      whole batch.
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


@jax.named_scope(EXCHANGE)
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


def computed_per_device(task: Task, model_state: hk.State) -> list[str]:
    """Names what depends on which examples share a device, and so on the number of devices.

    Args:
      task: what is trained.
      model_state: of the network, or its shapes; empty without batch norm.
    """
    options = task.config.model
    published = models.variant_info(options.name)

    def rate(option: str) -> float:
        given = options.get(option)
        return getattr(published, option) if given is None else given

    holds = {
        'the ascent of SAM': task.config.sam.rho > 0,
        'the statistics of batch norm': model_state and not options.get('cross_replica_axis'),
        'dropout': rate('drop_rate') > 0,
        'stochastic depth': rate('stochdepth_rate') > 0,
    }
    return [name for name, held in holds.items() if held]


class Programs(NamedTuple):
    """What of a task is compiled."""

    init_state: Callable[..., TrainState]
    train_step: jax.stages.Wrapped  # (state, batch) -> (state, stop)
    eval_step: jax.stages.Wrapped  # (variables by name, batch) -> sums of metrics by name


def program_key(config: ConfigDict) -> str:
    """Returns what configs that need the same programs have in common, and no others.

    The numbers that are data make no difference: the seed and `optimizers.Hyperparameters`.
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
