"""Sums of training metrics since the last line of the log, kept on the device.

No step waits for the host to read a metric, and since the sums are part of the training state a
resumed run logs what the uninterrupted one would have.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

METRICS = ('loss', 'top1', 'gradient_norm', 'clipped_fraction')
_NEVER = np.iinfo(np.int32).max

Window = dict[str, jax.Array]


def empty() -> Window:
    """Returns the window before the first step."""
    sums = {name: jnp.zeros(()) for name in (*METRICS, 'count')}
    return sums | {'first_nonfinite': jnp.full((), _NEVER, jnp.int32)}


def add(window: Window, metrics: Mapping[str, jax.Array], step: jax.Array, every: int) -> Window:
    """Adds the metrics of one step; every `every` steps a new window begins.

    Args:
      window: the sums so far.
      metrics: float32 scalars, named as in `METRICS`.
      step: int32 scalar, the number of updates before this one.
      every: steps in a window.
    """
    fresh = step % every == 0
    sums = {
        name: jnp.where(fresh, 0.0, window[name]) + value
        for name, value in {**metrics, 'count': 1.0}.items()
    }
    # The gradient too: parameters can be lost in the update of a step whose loss was still finite.
    finite = jnp.isfinite(metrics['loss']) & jnp.isfinite(metrics['gradient_norm'])
    nonfinite = jnp.where(finite, _NEVER, step + 1)
    return sums | {'first_nonfinite': jnp.minimum(window['first_nonfinite'], nonfinite)}


def means(window: Window) -> dict[str, float]:
    """Returns the means over the window."""
    sums = jax.device_get(window)
    return {name: float(sums[name] / max(sums['count'], 1)) for name in METRICS}


def first_nonfinite(window: Window) -> int | None:
    """Returns the first step of the run whose loss or gradient was not finite; None so far."""
    step = int(jax.device_get(window['first_nonfinite']))
    return None if step == _NEVER else step
