"""Sums of training metrics since the last line of metrics, kept on the device.

No step waits for the host to read a metric. The sums are part of the training state, so a resumed
run logs what the uninterrupted one would have.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

METRICS = ('loss', 'top1', 'gradient_norm', 'clipped_fraction')
BY_LAYER = ('clipped_fraction_by_layer', 'gradient_to_weight_by_layer')
_NEVER = np.iinfo(np.int32).max

StepMetrics = dict[str, jax.Array]


def zeros(layers: int = 0) -> StepMetrics:
    """Returns the sums before the first step; with those of `BY_LAYER` if there are layers."""
    sums = {name: jnp.zeros((), jnp.float32) for name in (*METRICS, 'count')}
    steps = {name: jnp.zeros((), jnp.int32) for name in ('nonfinite', 'nonfinite_in_a_row')}
    by_layer = {name: jnp.zeros(layers, jnp.float32) for name in BY_LAYER if layers}
    return sums | by_layer | steps | {'lost_at': jnp.full((), _NEVER, jnp.int32)}


def is_finite(metrics: Mapping[str, jax.Array]) -> jax.Array:
    """Returns whether a step is finite, a bool scalar.

    The gradient counts too: the update of a step with a finite loss can destroy the parameters.
    """
    return jnp.isfinite(metrics['loss']) & jnp.isfinite(metrics['gradient_norm'])


def add(
    sums: StepMetrics,
    metrics: Mapping[str, jax.Array],
    step: jax.Array,
    every: int,
    patience: int = 0,
) -> StepMetrics:
    """Adds the metrics of one step if it is finite; starts from zero every `every` steps.

    Args:
      sums: the sums so far.
      metrics: float32 scalars; those named in `METRICS` are added, and vectors of `BY_LAYER`.
      step: int32 scalar, the number of steps before this one.
      every: steps between two lines of metrics.
      patience: how many consecutive steps may be non-finite.
    """
    finite, fresh = is_finite(metrics), step % every == 0
    added: dict[str, jax.typing.ArrayLike] = {
        name: metrics[name] for name in (*METRICS, *BY_LAYER) if name in sums
    }
    added['count'] = 1.0
    new = {
        name: jnp.where(fresh, 0.0, sums[name]) + jnp.where(finite, value, 0.0)
        for name, value in added.items()
    }
    in_a_row = jnp.where(finite, 0, sums['nonfinite_in_a_row'] + 1)
    lost_at = jnp.where(in_a_row > patience, step + 1, _NEVER)
    return new | {
        'nonfinite': sums['nonfinite'] + (~finite).astype(jnp.int32),  # of the whole run
        'nonfinite_in_a_row': in_a_row,
        'lost_at': jnp.minimum(sums['lost_at'], lost_at),
    }


def means(sums: StepMetrics) -> dict[str, float]:
    """Returns the means over the finite steps; NaN if there was none."""
    sums = jax.device_get(sums)
    return {
        name: float(sums[name] / sums['count']) if sums['count'] else math.nan for name in METRICS
    }


def means_by_layer(sums: StepMetrics, layers: Sequence[str]) -> dict[str, float]:
    """Returns {'clipped_fraction/LAYER': mean, ...} over the finite steps; {} if not recorded."""
    sums = jax.device_get(sums)
    return {
        f'{name.removesuffix("_by_layer")}/{layer}': float(value / sums['count'])
        for name in BY_LAYER
        if name in sums and sums['count']
        for layer, value in zip(layers, sums[name], strict=True)
    }


def nonfinite_steps(sums: StepMetrics) -> int:
    """Returns the number of non-finite steps of the run so far."""
    return int(jax.device_get(sums['nonfinite']))


def lost_at(sums: StepMetrics) -> int | None:
    """Returns the step at which too many consecutive steps were non-finite, if there is one."""
    step = int(jax.device_get(sums['lost_at']))
    return None if step == _NEVER else step
