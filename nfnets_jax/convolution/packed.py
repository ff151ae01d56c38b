"""Convolutions on few channels, with the pixels of a square as channels: for TPUs.

A TPU's matrix unit is 128 channels wide, and the stem of an NFNet has 3 to 64. With squares of 2x2
or 4x4 pixels moved into the channels ("space to depth") its convolutions have 48 to 256, stride 1,
and kernels that are mostly zeros. They compute more and take half the time. Sums are the same up
to rounding.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nfnets_jax.convolution import conv

Array = jax.Array
Kernel = tuple[Array, Array]  # weight [K, K, in, out] and bias [out], in the dtype of the images


class ChainOptions(NamedTuple):
    """Static parameters of `chain`."""

    strides: tuple[int, ...]
    padding: conv.Padding
    activation: Callable[[Array], Array]
    name: str  # with an index, of each convolution in profiles and compiled programs


def can_pack(strides: Sequence[int], padding: conv.Padding, height: int, width: int) -> bool:
    """Returns whether `chain` is faster than its convolutions one by one, and can compute them."""
    square = math.prod(strides)
    return square > 1 and padding != 'VALID' and height % square == 0 and width % square == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chain(options: ChainOptions, x: Array, kernels: Sequence[Kernel]) -> Array:
    """Computes convolutions with an activation between two, packed where that is faster.

    Args:
      options: static parameters; `can_pack` must hold.
      x: images, [N, H, W, C].
      kernels: one for each stride.

    Returns:
      The output of the last convolution, [N, H / s, W / s, out] for the product s of the strides.
    """
    return _forward(options, x, kernels)[0]


# JAX's own derivative of a choice by platform would be a conditional (see conv.py). Each form keeps
# its own activations; XLA deletes the zeros that stand for those of the other.
def _forward(options, x, kernels):
    def outputs(packed: bool) -> list[Array]:
        outs = [x]
        for i, kernel in enumerate(kernels):
            outs.append(_convolve(options, packed, i, outs[-1], kernel))
        return outs[1:]

    shapes = {form: jax.eval_shape(functools.partial(outputs, form))[:-1] for form in (True, False)}

    def kept(packed: bool) -> tuple[Array, dict[bool, list[Array]]]:
        *hidden, out = outputs(packed)
        others = [jnp.zeros(shape.shape, shape.dtype) for shape in shapes[not packed]]
        return out, {packed: hidden, not packed: others}

    out, hidden = _by_platform(kept)
    return out, (x, kernels, hidden)


def _backward(options, residuals, cotangent):
    x, kernels, hidden = residuals

    def gradients(packed: bool) -> tuple[Array, list[Kernel]]:
        gradient, of_kernels = cotangent, []
        for i in reversed(range(len(kernels))):
            before = hidden[packed][i - 1] if i else x
            convolve = functools.partial(_convolve, options, packed, i)
            gradient, of_kernel = jax.vjp(convolve, before, kernels[i])[1](gradient)
            of_kernels.append(of_kernel)
        return gradient, of_kernels[::-1]

    return _by_platform(gradients)


chain.defvjp(_forward, _backward)


def _by_platform(function: Callable[[bool], Any]) -> Any:
    """Returns function(packed), packed on a TPU only."""
    return jax.lax.platform_dependent(tpu=lambda: function(True), default=lambda: function(False))


def _convolve(options: ChainOptions, packed: bool, i: int, x: Array, kernel: Kernel) -> Array:
    """Computes the activation, except of the images, and then convolution `i` of the chain."""
    w, b = kernel
    with jax.named_scope(f'{options.name}{i}'):
        if i:
            x = options.activation(x)
        stride = options.strides[i]
        if not packed:
            return conv.conv2d(x, w, stride, padding=options.padding) + b
        outer, inner = (math.prod(options.strides[start:]) for start in (i, i + 1))
        if i == 0:
            x = space_to_depth(x, outer)
        w, pads = dense_kernel(w, stride, inner, options.padding)
        out = jax.lax.conv_general_dilated(
            x, w, (1, 1), (pads, pads), dimension_numbers=conv.LAYOUT
        )
        return out + jnp.tile(b, inner * inner)


def space_to_depth(x: Array, side: int) -> Array:
    """Moves squares into channels: [N, H, W, C] -> [N, H / side, W / side, side * side * C]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // side, width // side, -1)


def dense_kernel(
    w: Array, stride: int, side: int, padding: conv.Padding
) -> tuple[Array, tuple[int, int]]:
    """Returns the kernel of a convolution between packed arrays, and its padding.

    Args:
      w: [K, K, in, out].
      stride: of the convolution; the kernel's own is 1.
      side: of the squares of the output. Those of the input have `stride * side`.
      padding: of the convolution.

    Returns:
      [K', K', (stride * side)^2 * in, side^2 * out], and the numbers of zeros before and after.
    """
    kernel, outer = w.shape[0], stride * side
    # Output pixel p * side + a of a row reads input pixels p * outer + a * stride + k - low.
    low, _ = conv.zeros_around(conv.ConvOptions(stride, 1, padding), kernel, outer)
    reads = {(a, k): a * stride + k - low for a in range(side) for k in range(kernel)}
    first, last = min(reads.values()) // outer, max(reads.values()) // outer
    ones = np.zeros((last - first + 1, outer, kernel, side), np.float32)
    for (a, k), pixel in reads.items():
        ones[pixel // outer - first, pixel % outer, k, a] = 1
    places = jnp.asarray(ones, w.dtype)
    # Each sum has one term that is not zero, so the values are those of w.
    highest = jax.lax.Precision.HIGHEST
    rows = jnp.einsum('trka,klio->tralio', places, w, precision=highest)
    dense = jnp.einsum('uslb,tralio->tursiabo', places, rows, precision=highest)
    inputs, outputs = w.shape[2:]
    shape = *dense.shape[:2], outer * outer * inputs, side * side * outputs
    return dense.reshape(shape), (-first, last)
