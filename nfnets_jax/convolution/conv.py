"""Convolution in the form that is fastest on the platform; the numbers differ by rounding only.

XLA runs some convolutions far slower than the machine could: on the CPU grouped ones, 1x1 ones, and
the gradients of all inside loops, those of weights most. `conv2d` is one function of several forms;
which one each of its three passes takes is measured, and stands in table.py by platform
and shape. It is chosen when the function is lowered, so a program exported for another platform has
that platform's.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from nfnets_jax.convolution import split_concat
from nfnets_jax.convolution.table import TABLE
from nfnets_jax.errors import UsageError

Array = jax.Array
# 'SYMMETRIC' is PyTorch's: K // 2 zeros at both ends, where 'SAME' may put one more at the end.
Padding = Literal['SAME', 'VALID', 'SYMMETRIC']
LAYOUT = ('NHWC', 'HWIO', 'NHWC')


def conv2d(
    x: Array, w: Array, stride: int = 1, *, groups: int = 1, padding: Padding = 'SAME'
) -> Array:
    """Convolves [N, H, W, in] with [K, K, in / groups, out] -> [N, H', W', out].

    Reverse-mode differentiable any number of times; where another form than XLA's own is chosen on
    any platform forward mode (jax.jvp) does not apply.

    Raises:
      UsageError: x holds integers, as pictures that were not normalised do: the weights, which take
        its dtype, would all become zero.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UsageError(f'images must be normalised floats, not {x.dtype}')
    shape = ConvShape(stride, groups, padding)
    size = measure(shape, x.shape, w.shape)
    choices = {platform: choose(entries, size) for platform, entries in TABLE.items()}
    choices = {platform: forms for platform, forms in choices.items() if forms != PLAIN}
    if not choices:
        return plain(shape, x, w)
    return _per_platform(tuple(choices.items()), shape, x, w)


class ConvShape(NamedTuple):
    """What of a convolution is not an array."""

    stride: int
    groups: int
    padding: Padding


class Size(NamedTuple):
    """What the time of a convolution depends on; a key of the table."""

    kernel: int
    stride: int
    groups: int
    inputs: int  # channels of one group
    outputs: int
    positions: int  # N * H' * W'; 0 where the batch is free, as in an exported program


class Forms(NamedTuple):
    """Names in FORMS, one for each pass."""

    forward: str = 'plain'
    input_gradient: str = 'plain'
    weight_gradient: str = 'plain'


PLAIN = Forms()


def measure(shape: ConvShape, x: tuple[int, ...], w: tuple[int, ...]) -> Size:
    """Returns the size of a convolution of arrays of these shapes."""
    kernel, _, inputs, outputs = w
    positions = x[0] if isinstance(x[0], int) else 0
    for length in x[1:3]:
        low, high = _pads(shape, kernel, length)
        positions *= (length + low + high - kernel) // shape.stride + 1
    return Size(kernel, shape.stride, shape.groups, inputs, outputs // shape.groups, positions)


def choose(entries: Mapping[tuple[int, ...], tuple[str, str, str]], size: Size) -> Forms:
    """Returns the forms at the entry of a platform's table that is nearest to a size.

    Near is what differs by small factors. Only entries with the same candidates count; where there
    is none, XLA's own form is taken.
    """

    def distance(entry: Size) -> float:
        pairs = zip(entry, size, strict=True)
        return sum(abs(math.log2(a / b)) for a, b in pairs if a and b)

    alike = [key for key in map(Size._make, entries) if candidates(key) == candidates(size)]
    if not alike:
        return PLAIN
    nearest = min(alike, key=distance)
    return Forms(*entries[nearest])


# Forward and backward pass ask for the platform on their own. Left to differentiation, the
# backward pass of a jitted function would receive the answer as an argument, XLA would meet the
# convolutions inside a conditional, and run them twenty times slower on the CPU.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _per_platform(choices: tuple[tuple[str, Forms], ...], shape: ConvShape, x: Array, w: Array):
    def forward(forms: Forms, x: Array, w: Array) -> Array:
        return FORMS[forms.forward](shape, x, w)

    return _lower(forward, choices, x, w)


def _forward(choices, shape, x, w):
    return _per_platform(choices, shape, x, w), (x, w)


def _backward(choices, shape, residuals, cotangent):
    def gradients(forms: Forms, x: Array, w: Array, cotangent: Array) -> tuple[Array, Array]:
        if forms.input_gradient == forms.weight_gradient:  # Traced once, which is a tenth faster.
            _, to_both = jax.vjp(functools.partial(FORMS[forms.input_gradient], shape), x, w)
            return to_both(cotangent)
        _, to_x = jax.vjp(lambda x: FORMS[forms.input_gradient](shape, x, w), x)
        _, to_w = jax.vjp(lambda w: FORMS[forms.weight_gradient](shape, x, w), w)
        return *to_x(cotangent), *to_w(cotangent)

    return _lower(gradients, choices, *residuals, cotangent)


_per_platform.defvjp(_forward, _backward)


def _lower(function: Callable, choices: tuple[tuple[str, Forms], ...], *arrays: Array):
    """Returns function(forms, *arrays), with the forms of the platform it is lowered for."""
    branches = {platform: functools.partial(function, forms) for platform, forms in choices}
    return jax.lax.platform_dependent(
        *arrays, **branches, default=functools.partial(function, PLAIN)
    )


def plain(shape: ConvShape, x: Array, w: Array) -> Array:
    """The convolution as XLA knows it."""
    return jax.lax.conv_general_dilated(
        x,
        w,
        (shape.stride, shape.stride),
        [_pads(shape, w.shape[0], length) for length in x.shape[1:3]],
        dimension_numbers=LAYOUT,
        feature_group_count=shape.groups,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def canonical(shape: ConvShape, x: Array, w: Array) -> Array:
    """A convolution of one group whose gradients are NHWC with HWIO -> NHWC too, as written.

    The CPU has fast code for this order of axes alone. XLA brings others, which the gradients of
    `plain` have, into it by itself, but not in the body of a loop: there weight gradients take 10
    to 100 times as long.
    """
    return plain(shape, x, w)


def _canonical_forward(shape, x, w):
    return plain(shape, x, w), (x, w)


def _canonical_backward(shape, residuals, cotangent):
    """Both are convolutions with stride 1: the stride spreads the cotangent, with zeros between."""
    x, w = residuals
    stride, kernel = shape.stride, w.shape[0]
    around_cotangent, around_x = [], []
    for length, out in zip(x.shape[1:3], cotangent.shape[1:3], strict=True):
        low, _ = _pads(shape, kernel, length)
        spread = (out - 1) * stride + 1
        around_cotangent.append((kernel - 1 - low, length - spread + low))
        around_x.append((low, spread + kernel - 1 - length - low))
    to_x = jax.lax.conv_general_dilated(
        cotangent,
        jnp.flip(w, (0, 1)).swapaxes(2, 3),
        (1, 1),
        around_cotangent,
        lhs_dilation=(stride, stride),
        dimension_numbers=LAYOUT,
    )
    # The examples are summed over, like channels; each channel of x is a picture of its own.
    to_w = jax.lax.conv_general_dilated(
        x.transpose(3, 1, 2, 0),
        cotangent.transpose(1, 2, 0, 3),
        (1, 1),
        around_x,
        rhs_dilation=(stride, stride),
        dimension_numbers=LAYOUT,
    )
    return to_x, to_w.transpose(1, 2, 0, 3)


canonical.defvjp(_canonical_forward, _canonical_backward)


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
    sizes = [min(merged, shape.groups - first) for first in range(0, shape.groups, merged)]
    xs = split_concat.split(x, tuple(size * inputs for size in sizes), -1)
    ws = split_concat.split(w, tuple(size * outputs for size in sizes), -1)
    return split_concat.join(
        [
            canonical(dense, x_part, _block_diagonal(w_part, size))
            for x_part, w_part, size in zip(xs, ws, sizes, strict=True)
        ],
        -1,
    )


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


def batched(shape: ConvShape, x: Array, w: Array) -> Array:
    """One matrix product of the patches for all groups: [G, NH'W', KKI] @ [G, KKI, O].

    Its program has one size whatever the number of groups, so it compiles fastest.
    """
    kernel, _, inputs, outputs = w.shape
    groups, stride = shape.groups, shape.stride
    pads = [_pads(shape, kernel, length) for length in x.shape[1:3]]
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    x = x.reshape(*x.shape[:3], groups, inputs).transpose(3, 0, 1, 2, 4)
    x = jax.lax.optimization_barrier(x)  # Or each of the K * K slices would pad anew.
    height, width = ((length - kernel) // stride + 1 for length in x.shape[2:4])
    starts = [(i, j) for i in range(kernel) for j in range(kernel)]
    taps = [
        x[:, :, i : i + stride * height : stride, j : j + stride * width : stride]
        for i, j in starts
    ]
    patches = jnp.concatenate([tap[:, :, :height, :width] for tap in taps], axis=-1)
    w = w.reshape(-1, groups, outputs // groups).transpose(1, 0, 2)
    out = patches.reshape(groups, -1, w.shape[1]) @ w
    return out.transpose(1, 0, 2).reshape(x.shape[1], height, width, outputs)


def space_to_depth(shape: ConvShape, x: Array, w: Array) -> Array:
    """A strided convolution of one group as one with stride 1 over stride^2 times the channels.

    For stems: three channels fill no matrix unit.
    """
    kernel, _, channels, outputs = w.shape
    stride = shape.stride
    reach = -(-kernel // stride)  # of the new kernel
    w = jnp.pad(w, ((0, reach * stride - kernel),) * 2 + ((0, 0),) * 2)
    w = w.reshape(reach, stride, reach, stride, channels, outputs).transpose(0, 2, 1, 3, 4, 5)

    ends = []
    for length in x.shape[1:3]:
        low, high = _pads(shape, kernel, length)
        blocks = (length + low + high - kernel) // stride + reach
        ends.append((low, blocks * stride - low - length, 0))
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *ends, (0, 0, 0)))
    batch, height, width = (n // d for n, d in zip(x.shape[:3], (1, stride, stride), strict=True))
    x = x.reshape(batch, height, stride, width, stride, channels).transpose(0, 1, 3, 2, 4, 5)
    return plain(
        ConvShape(1, 1, 'VALID'),
        x.reshape(batch, height, width, -1),
        w.reshape(reach, reach, -1, outputs),
    )


def _pads(shape: ConvShape, kernel: int, length: int) -> tuple[int, int]:
    """Returns the zeros before and after a row of pixels."""
    if shape.padding == 'SYMMETRIC':
        return kernel // 2, kernel // 2
    return jax.lax.padtype_to_pads((length,), (kernel,), (shape.stride,), shape.padding)[0]


FORMS: Mapping[str, Callable[[ConvShape, Array, Array], Array]] = {
    'plain': plain,
    'canonical': canonical,
    'pointwise': pointwise,
    'split': split,
    'batched': batched,
    'space_to_depth': space_to_depth,
}


def candidates(size: Size) -> list[str]:
    """Returns the names of the forms that can compute a convolution of this size."""
    if size.groups > 1:
        return ['plain', 'split', 'batched']
    if size.kernel == 1:
        return ['plain', 'pointwise']
    return ['plain', 'canonical', 'batched'] + (['space_to_depth'] if size.stride > 1 else [])
