"""Max pooling, with a gradient that a CPU computes fast.

XLA's CPU backend turns the gradient of a max pool (select-and-scatter) into four arrays of indices
and a scatter of single elements. Comparing the elements of each window with their maximum takes an
eighth of that time for 2x2 windows, two fifths for 3x3 windows with stride 2.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from nfnets_jax.convolution import conv

Array = jax.Array


def max_pool(x: Array, window: int, stride: int, padding: conv.Padding = 'SAME') -> Array:
    """Returns the maximum of [N, H, W, C] over square windows, [N, H', W', C].

    The gradient of a window goes to the first of its largest elements, in order of rows. Forward
    mode (jax.jvp) fails.

    Args:
      x: float, [N, H, W, C].
      window: side of the windows.
      stride: distance of one window from the next.
      padding: as in `conv.conv2d`, with -inf for zeros.
    """
    if padding == 'SYMMETRIC':
        ends, padding = (window // 2, window // 2), 'VALID'
        x = jnp.pad(x, ((0, 0), ends, ends, (0, 0)), constant_values=-jnp.inf)
    return _max_pool(window, stride, padding, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _max_pool(window: int, stride: int, padding: str, x: Array) -> Array:
    return _reduce(window, stride, padding, x)


def _reduce(window, stride, padding, x):
    sides, strides = (1, window, window, 1), (1, stride, stride, 1)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, sides, strides, padding)


def _forward(window, stride, padding, x):
    out = _reduce(window, stride, padding, x)
    return out, (x, out)


def _backward(window, stride, padding, residuals, cotangent):
    options = window, stride, padding
    return (
        jax.lax.platform_dependent(
            *residuals,
            cotangent,
            cpu=functools.partial(_by_comparison, *options),
            default=functools.partial(_by_selection, *options),
        ),
    )


_max_pool.defvjp(_forward, _backward)


def _by_selection(window, stride, padding, x, out, cotangent):
    """Returns the gradient as XLA computes it."""
    del out
    return jax.vjp(functools.partial(_reduce, window, stride, padding), x)[1](cotangent)[0]


def _by_comparison(window, stride, padding, x, out, cotangent):
    """Returns the gradient from the elements that equal the maximum of their window."""
    image, windows = np.array(x.shape[1:3]), np.array(out.shape[1:3])
    pads = jax.lax.padtype_to_pads(image, (window, window), (stride, stride), padding)
    before = np.array([start for start, _ in pads])
    first_to_last = (windows - 1) * stride + 1  # from the first window's start to the last one's
    after = first_to_last + window - 1 - before - image  # Negative where windows leave pixels out.

    def pad(array, value, before, after, between=0):
        rows, columns = ((*ends, between) for ends in zip(before, after, strict=True))
        value = jnp.array(value, array.dtype)
        return jax.lax.pad(array, value, [(0, 0, 0), rows, columns, (0, 0, 0)])

    padded = pad(x, -jnp.inf, before, after)
    taken = jnp.zeros(out.shape, bool)
    gradient = jnp.zeros((), x.dtype)
    for offset in itertools.product(range(window), repeat=2):
        rows, columns = (
            slice(start, start + length, stride)
            for start, length in zip(offset, first_to_last, strict=True)
        )
        is_first = (padded[:, rows, columns] == out) & ~taken
        taken |= is_first
        own = jnp.where(is_first, cotangent, 0)
        gradient += pad(own, 0, offset, window - 1 - np.array(offset), stride - 1)
    return pad(gradient, 0, -before, -after)
