"""Sums of training metrics since the last line of the log, kept on the device.

No step waits for the host to read a metric, and since the sums are part of the training state a
resumed run logs what the uninterrupted one would have.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

METRICS = ('loss', 'top1', 'gradient_norm', 'clipped_fraction')
_NEVER = np.iinfo(np.int32).max

Window = dict[str, jax.Array]


def empty() -> Window:
    """Returns the window before the first step."""
    sums = {name: jnp.zeros((), jnp.float32) for name in (*METRICS, 'count')}
    steps = {name: jnp.zeros((), jnp.int32) for name in ('nonfinite', 'nonfinite_in_a_row')}
    return sums | steps | {'lost_at': jnp.full((), _NEVER, jnp.int32)}


def is_finite(metrics: Mapping[str, jax.Array]) -> jax.Array:
    """Returns whether a step went well, a bool scalar.

    The gradient counts too: parameters can be lost in the update of a step whose loss was finite.
    """
    return jnp.isfinite(metrics['loss']) & jnp.isfinite(metrics['gradient_norm'])


def add(
    window: Window,
    metrics: Mapping[str, jax.Array],
    step: jax.Array,
    every: int,
    patience: int = 0,
) -> Window:
    """Adds the metrics of one step, if it is finite; every `every` steps a new window begins.

    Args:
      window: the sums so far.
      metrics: float32 scalars, named as in `METRICS`.
      step: int32 scalar, the number of steps before this one.
      every: steps in a window.
      patience: how many steps in a row may not be finite before the run is lost.
    """
    finite, fresh = is_finite(metrics), step % every == 0
    added: dict[str, jax.typing.ArrayLike] = {**metrics, 'count': 1.0}
    sums = {
        name: jnp.where(fresh, 0.0, window[name]) + jnp.where(finite, value, 0.0)
        for name, value in added.items()
    }
    in_a_row = jnp.where(finite, 0, window['nonfinite_in_a_row'] + 1)
    lost_at = jnp.where(in_a_row > patience, step + 1, _NEVER)
    return sums | {
        'nonfinite': window['nonfinite']
        + (~finite).astype(jnp.int32),  # of the whole run, not of this window
        'nonfinite_in_a_row': in_a_row,
        'lost_at': jnp.minimum(window['lost_at'], lost_at),
    }


def means(window: Window) -> dict[str, float]:
    """Returns the means over the finite steps of the window; NaN if there was none."""
    sums = jax.device_get(window)
    return {
        name: float(sums[name] / sums['count']) if sums['count'] else math.nan for name in METRICS
    }


def nonfinite_steps(window: Window) -> int:
    """Returns how many steps of the run were not finite so far."""
    return int(jax.device_get(window['nonfinite']))


def lost_at(window: Window) -> int | None:
    """Returns the step of the run at which patience with non-finite steps ended; None so far."""
    step = int(jax.device_get(window['lost_at']))
    return None if step == _NEVER else step
