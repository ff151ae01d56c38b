"""Convolution in the form that is fastest on the platform; the numbers differ by rounding only.

XLA runs some convolutions on the CPU far slower than the machine could (measured by
benchmarks/convolution.py): grouped ones, and 1x1 ones, weight gradients most of all. `conv2d` is
one function; the form is chosen when it is lowered, so a program exported for another platform
has that platform's form.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
# 'SYMMETRIC' is PyTorch's: K // 2 zeros at both ends, where 'SAME' may put one more at the end.
Padding = Literal['SAME', 'VALID', 'SYMMETRIC']


def conv2d(
    x: Array, w: Array, stride: int = 1, *, groups: int = 1, padding: Padding = 'SAME'
) -> Array:
    """Convolves [N, H, W, in] with [K, K, in / groups, out] -> [N, H', W', out].

    Reverse-mode differentiable any number of times. Where another form than XLA's own is at hand
    (groups > 1 or K = 1) jax.jvp applies to its gradient only, not to itself.
    """
    shape = ConvShape(stride, groups, padding)
    if groups > 1:
        return _per_platform(split, shape, x, w)
    if w.shape[:2] == (1, 1):
        return _per_platform(pointwise, shape, x, w)
    return plain(shape, x, w)


class ConvShape(NamedTuple):
    """What of a convolution is not an array."""

    stride: int
    groups: int
    padding: Padding


# Forward and backward pass ask for the platform on their own. Left to differentiation, the
# backward pass of a jitted function would receive the answer as an argument, XLA would meet the
# convolutions inside a conditional, and run them twenty times slower on the CPU.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _per_platform(cpu_form: Callable[..., Array], shape: ConvShape, x: Array, w: Array) -> Array:
    return jax.lax.platform_dependent(
        x,
        w,
        cpu=functools.partial(cpu_form, shape),
        default=functools.partial(plain, shape),
    )


def _forward(cpu_form, shape, x, w):
    return _per_platform(cpu_form, shape, x, w), (x, w)


def _backward(cpu_form, shape, residuals, cotangent):
    def gradients(form, x, w, cotangent):
        return jax.vjp(functools.partial(form, shape), x, w)[1](cotangent)

    return jax.lax.platform_dependent(
        *residuals,
        cotangent,
        cpu=functools.partial(gradients, cpu_form),
        default=functools.partial(gradients, plain),
    )


_per_platform.defvjp(_forward, _backward)


def plain(shape: ConvShape, x: Array, w: Array) -> Array:
    """The convolution as XLA knows it."""
    return jax.lax.conv_general_dilated(
        x,
        w,
        (shape.stride, shape.stride),
        [(n // 2, n // 2) for n in w.shape[:2]] if shape.padding == 'SYMMETRIC' else shape.padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=shape.groups,
    )


def pointwise(shape: ConvShape, x: Array, w: Array) -> Array:
    """A 1x1 convolution as a matrix product; it needs no padding."""
    return x[:, :: shape.stride, :: shape.stride] @ w[0, 0]


def split(shape: ConvShape, x: Array, w: Array) -> Array:
    """A grouped convolution as dense ones over one group, or several narrow groups, each.

    Narrow groups are merged up to CHUNK channels, with zeros for weights between them: a
    convolution over 8 channels leaves the machine idle anyway, and one for each of 43 groups, or
    of 204, takes longer to compile than a network is worth.
    """
    inputs, outputs = w.shape[2], w.shape[3] // shape.groups
    dense = shape._replace(groups=1)
    merged = max(1, CHUNK // inputs)
    parts = []
    for first in range(0, shape.groups, merged):
        last = min(first + merged, shape.groups)
        x_part = x[..., first * inputs : last * inputs]
        w_part = _block_diagonal(w[..., first * outputs : last * outputs], last - first)
        parts.append(plain(dense, x_part, w_part))
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
