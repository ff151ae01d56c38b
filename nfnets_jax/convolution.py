"""Convolution in the form that is fastest on the platform; the numbers differ by rounding only.

XLA runs some convolutions on the CPU far slower than the machine could (measured by
benchmarks/convolution.py): grouped ones, and 1x1 ones, weight gradients most of all. `conv2d` is
one function; the form is chosen when it is lowered, so a program exported for another platform
has that platform's form.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

Array = jax.Array
Padding = Literal['SAME', 'VALID']


def conv2d(
    x: Array, w: Array, stride: int = 1, *, groups: int = 1, padding: Padding = 'SAME'
) -> Array:
    """Convolves [N, H, W, in] with [K, K, in / groups, out] -> [N, H', W', out]."""
    options = {'stride': stride, 'groups': groups, 'padding': padding}
    if w.shape[:2] == (1, 1) and groups == 1:
        form = pointwise
    elif groups > 1:
        form = split
    else:
        return plain(x, w, **options)
    return jax.lax.platform_dependent(
        x, w, cpu=functools.partial(form, **options), default=functools.partial(plain, **options)
    )


def plain(x: Array, w: Array, *, stride: int, groups: int, padding: Padding) -> Array:
    """The convolution as XLA knows it."""
    return jax.lax.conv_general_dilated(
        x,
        w,
        (stride, stride),
        padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
    )


def pointwise(x: Array, w: Array, *, stride: int, groups: int, padding: Padding) -> Array:
    """A 1x1 convolution as a matrix product; it needs no padding."""
    del groups, padding
    return x[:, ::stride, ::stride] @ w[0, 0]


def split(x: Array, w: Array, *, stride: int, groups: int, padding: Padding) -> Array:
    """A grouped convolution as dense ones over one group, or several narrow groups, each.

    Narrow groups are merged up to CHUNK channels, with zeros for weights between them: a
    convolution over 8 channels leaves the machine idle anyway, and one for each of 43 groups, or
    of 204, takes longer to compile than a network is worth.
    """
    inputs, outputs = w.shape[2], w.shape[3] // groups
    merged = max(1, min(groups, CHUNK // inputs))
    parts = []
    for first in range(0, groups, merged):
        last = min(first + merged, groups)
        x_part = x[..., first * inputs : last * inputs]
        w_part = _block_diagonal(w[..., first * outputs : last * outputs], last - first)
        parts.append(plain(x_part, w_part, stride=stride, groups=1, padding=padding))
    return jnp.concatenate(parts, axis=-1)


# Channels of a dense convolution made of narrow groups. At 8 channels a group, 64 costs 1.7-2.2
# times the time of one convolution per group and less than a quarter of the compilation; 128 is
# slower by another third and compiles in half the time again.
CHUNK = 64


def _block_diagonal(w: Array, groups: int) -> Array:
    """[K, K, in, groups * out] of a grouped convolution -> [K, K, groups * in, groups * out]."""
    if groups == 1:
        return w
    *kernel, inputs, outputs = w.shape
    blocks = w.reshape(*kernel, 1, inputs, groups, outputs // groups)
    diagonal = jnp.eye(groups, dtype=w.dtype).reshape(groups, 1, groups, 1)
    return (blocks * diagonal).reshape(*kernel, groups * inputs, outputs)
