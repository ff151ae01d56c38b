"""Convolution by the fastest implementation on each platform; results differ by rounding only.

XLA runs some convolutions far slower than the machine could: on the CPU grouped ones, 1x1 ones, and
all gradients inside loops, weight gradients most. `conv2d` has several implementations. The table
in table.py holds the one measured fastest for each of the three passes, by platform and signature.
The lookup happens when the function is lowered, so a program exported for another platform uses
that platform's implementation.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nfnets_jax.convolution import split_concat
from nfnets_jax.convolution.table import TABLE
from nfnets_jax.errors import UsageError

Array = jax.Array
# 'SYMMETRIC' is PyTorch's: K // 2 zeros at both ends. 'SAME' may put one more zero at the end.
Padding = Literal['SAME', 'VALID', 'SYMMETRIC']
LAYOUT = ('NHWC', 'HWIO', 'NHWC')


def conv2d(
    x: Array, w: Array, stride: int = 1, *, groups: int = 1, padding: Padding = 'SAME'
) -> Array:
    """Convolves [N, H, W, in] with [K, K, in / groups, out] -> [N, H', W', out].

    Reverse mode works any number of times. Forward mode (jax.jvp) fails where any platform's table
    selects another implementation than XLA's own.

    Raises:
      UsageError: x holds integers, as images that were not normalised do. The weights are cast to
        its dtype, so they would all become zero.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UsageError(f'images must be normalised floats, not {x.dtype}')
    options = ConvOptions(stride, groups, padding)
    signature = conv_signature(options, x.shape, w.shape)
    choices = {platform: lookup(entries, signature) for platform, entries in TABLE.items()}
    choices = {platform: impl for platform, impl in choices.items() if impl != XLA}
    if not choices:
        return xla(options, x, w)
    return _traced_once(tuple(choices.items()), options, x, w)


class ConvOptions(NamedTuple):
    """Static parameters of a convolution."""

    stride: int
    groups: int
    padding: Padding


class ConvSignature(NamedTuple):
    """Key of the table: everything that the time of a convolution depends on."""

    kernel: int
    stride: int
    groups: int
    inputs: int  # channels of one group
    outputs: int  # channels of one group
    positions: int  # N * H' * W'; 0 where the batch size is symbolic, as in an exported program


class Impl(NamedTuple):
    """Implementation of each pass, as a name in IMPLS."""

    forward: str = 'xla'
    input_gradient: str = 'xla'
    weight_gradient: str = 'xla'


XLA = Impl()


def conv_signature(options: ConvOptions, x: tuple[int, ...], w: tuple[int, ...]) -> ConvSignature:
    """Returns the signature of the convolution of arrays of shapes `x` and `w`."""
    kernel, _, inputs, outputs = w
    positions = x[0] if isinstance(x[0], int) else 0
    for length in x[1:3]:
        low, high = zeros_around(options, kernel, length)
        positions *= (length + low + high - kernel) // options.stride + 1
    return ConvSignature(
        kernel, options.stride, options.groups, inputs, outputs // options.groups, positions
    )


def lookup(
    entries: Mapping[tuple[int, ...], tuple[str, str, str]], signature: ConvSignature
) -> Impl:
    """Returns the implementations of the nearest entry of a platform's table.

    Distance: the sum of absolute log2 ratios. Only entries with the same candidates count. Returns
    XLA's own implementation if there is no such entry.
    """

    def distance(entry: ConvSignature) -> float:
        pairs = zip(entry, signature, strict=True)
        return sum(abs(math.log2(a / b)) for a, b in pairs if a and b)

    wanted = candidates(signature)
    comparable = [key for key in map(ConvSignature._make, entries) if candidates(key) == wanted]
    if not comparable:
        return XLA
    nearest = min(comparable, key=distance)
    return Impl(*entries[nearest])


# The forward and the backward pass each query the platform. If JAX differentiated the query, the
# backward pass of a jitted function would receive the platform index as an argument. XLA would then
# see the convolutions inside a conditional and run them twenty times slower on the CPU.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _per_platform(choices: tuple[tuple[str, Impl], ...], options: ConvOptions, x: Array, w: Array):
    def forward(impl: Impl, x: Array, w: Array) -> Array:
        return IMPLS[impl.forward](options, x, w)

    return _lower(forward, choices, x, w)


def _forward(choices, options, x, w):
    return _per_platform(choices, options, x, w), (x, w)


def _backward(choices, options, residuals, cotangent):
    return _gradients(choices, options, *residuals, cotangent)


# A network repeats its convolutions. `inline`: the program is as without jit, only its trace is
# shared.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _gradients(choices, options, x, w, cotangent):
    def gradients(impl: Impl, x: Array, w: Array, cotangent: Array) -> tuple[Array, Array]:
        if impl.input_gradient == impl.weight_gradient:  # One trace is a tenth faster.
            _, to_both = jax.vjp(functools.partial(IMPLS[impl.input_gradient], options), x, w)
            return to_both(cotangent)
        _, to_x = jax.vjp(lambda x: IMPLS[impl.input_gradient](options, x, w), x)
        _, to_w = jax.vjp(lambda w: IMPLS[impl.weight_gradient](options, x, w), w)
        return *to_x(cotangent), *to_w(cotangent)

    return _lower(gradients, choices, x, w, cotangent)


_per_platform.defvjp(_forward, _backward)
_traced_once = jax.jit(_per_platform, static_argnums=(0, 1), inline=True)


def _lower(function: Callable, choices: tuple[tuple[str, Impl], ...], *arrays: Array):
    """Returns function(impl, *arrays), with the `impl` of the platform it is lowered for."""
    branches = {platform: functools.partial(function, impl) for platform, impl in choices}
    return jax.lax.platform_dependent(*arrays, **branches, default=functools.partial(function, XLA))


def xla(options: ConvOptions, x: Array, w: Array) -> Array:
    """Computes the convolution by XLA's own operation."""
    return jax.lax.conv_general_dilated(
        x,
        w,
        (options.stride, options.stride),
        [zeros_around(options, w.shape[0], length) for length in x.shape[1:3]],
        dimension_numbers=LAYOUT,
        feature_group_count=options.groups,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def nhwc_grads(options: ConvOptions, x: Array, w: Array) -> Array:
    """Convolves one group, with gradients that are NHWC x HWIO -> NHWC convolutions too.

    The CPU has fast code only for this order of axes. The gradients of `xla` have other orders. XLA
    transposes these itself, but not in the body of a loop: there weight gradients take 10 to 100
    times as long.
    """
    return xla(options, x, w)


def _nhwc_grads_forward(options, x, w):
    # XLA writes a padded array as fast as an unpadded one; both passes read it.
    lengths = x.shape[1:3]
    pads = [(0, 0, 0), *((*zeros_around(options, w.shape[0], n), 0) for n in lengths), (0, 0, 0)]
    padded = jax.lax.pad(x, jnp.zeros((), x.dtype), pads)
    return xla(options._replace(padding='VALID'), padded, w), (padded, lengths, w)


def _nhwc_grads_backward(options, residuals, cotangent):
    """Returns convolutions with stride 1 only: the stride dilates the cotangent."""
    x, lengths, w = residuals
    stride, kernel = options.stride, w.shape[0]
    around = []
    for length, out in zip(lengths, cotangent.shape[1:3], strict=True):
        low, _ = zeros_around(options, kernel, length)
        around.append((kernel - 1 - low, length - ((out - 1) * stride + 1) + low))
    to_x = jax.lax.conv_general_dilated(
        cotangent,
        jnp.flip(w, (0, 1)).swapaxes(2, 3),
        (1, 1),
        around,
        lhs_dilation=(stride, stride),
        dimension_numbers=LAYOUT,
    )
    return to_x, _weight_gradient(stride, kernel, x, cotangent).astype(w.dtype)


# Numbers in the patches of one part of `_weight_gradient`: 4 MB, about what a core's cache holds.
PATCHES = 1 << 20


def _weight_gradient(stride: int, kernel: int, x: Array, cotangent: Array) -> Array:
    """Returns the gradient [K, K, in, out] in at least float32, a sum over parts of the batch.

    A part is some rows of up to 16 examples. With a cache of 2 MB a core the parts take 12 instead
    of 23 ms for 128 images of 32 px and 16 channels, and 55 instead of 159 ms for 32 images of
    24 px and 128 channels (processor time).

    Args:
      stride: between places of the kernel.
      kernel: its height and width.
      x: [N, H, W, in], padded: the kernel is inside at each of its places.
      cotangent: [N, H', W', out].
    """
    batch, height, width, outputs = cotangent.shape
    inputs = x.shape[-1]
    examples = _largest_divisor(batch, 16) if isinstance(batch, int) else 1
    if examples < 4:  # The batch size is symbolic or nearly prime.
        examples = batch
    rows = _largest_divisor(height, PATCHES // (kernel * kernel * inputs * width * 16))
    cotangent_size = (examples, rows, width, outputs)
    x_size = (examples, *((n - 1) * stride + kernel for n in (rows, width)), inputs)

    def part(example: int | Array, row: int | Array) -> Array:
        x_part = jax.lax.dynamic_slice(x, (example, row * stride, 0, 0), x_size)
        cotangent_part = jax.lax.dynamic_slice(cotangent, (example, row, 0, 0), cotangent_size)
        # The sum is over the examples, so they take the place of channels; each channel of x
        # becomes an example.
        return jax.lax.conv_general_dilated(
            x_part.transpose(3, 1, 2, 0),
            cotangent_part.transpose(1, 2, 0, 3),
            (1, 1),
            'VALID',
            rhs_dilation=(stride, stride),
            dimension_numbers=LAYOUT,
            preferred_element_type=np.promote_types(x.dtype, np.float32),
        )

    total = part(0, 0)
    first_examples = range(0, batch, examples) if isinstance(batch, int) else [0]
    starts = [(i, j) for i in first_examples for j in range(0, height, rows)][1:]
    if starts:
        total, _ = jax.lax.scan(lambda sum, at: (sum + part(*at), None), total, np.array(starts))
    return total.transpose(1, 2, 0, 3)


def _largest_divisor(number: int, limit: int) -> int:
    """Returns the largest divisor of a number that is at most `limit`, or 1."""
    return next((d for d in range(min(number, limit), 1, -1) if number % d == 0), 1)


nhwc_grads.defvjp(_nhwc_grads_forward, _nhwc_grads_backward)


def pointwise(options: ConvOptions, x: Array, w: Array) -> Array:
    """Computes a 1x1 convolution, which needs no padding, as a matrix product."""
    return x[:, :: options.stride, :: options.stride] @ w[0, 0]


def per_group(options: ConvOptions, x: Array, w: Array) -> Array:
    """Computes a grouped convolution as dense ones, each over one group or several narrow groups.

    Narrow groups are merged up to CHUNK channels, with zero weights between them. A convolution
    over 8 channels leaves the machine idle anyway, and one convolution for each of 43 or 204 groups
    takes too long to compile.
    """
    inputs, outputs = w.shape[2], w.shape[3] // options.groups
    dense = options._replace(groups=1)
    merged = max(1, CHUNK // inputs)
    sizes = [min(merged, options.groups - first) for first in range(0, options.groups, merged)]
    xs = split_concat.split(x, tuple(size * inputs for size in sizes), -1)
    ws = split_concat.split(w, tuple(size * outputs for size in sizes), -1)
    return split_concat.join(
        [
            nhwc_grads(dense, x_part, _block_diagonal(w_part, size))
            for x_part, w_part, size in zip(xs, ws, sizes, strict=True)
        ],
        -1,
    )


# Channels of a dense convolution made of narrow groups. At 8 channels per group, 64 takes 1.7-2.2
# times as long as one convolution per group and compiles in less than a quarter of the time; 128 is
# slower by another third and compiles in half the time again.
CHUNK = 64


def _block_diagonal(w: Array, groups: int) -> Array:
    """Returns the dense weight [K, K, groups * in, groups * out] of [K, K, in, groups * out]."""
    if groups == 1:
        return w
    *kernel, inputs, outputs = w.shape
    blocks = w.reshape(*kernel, 1, inputs, groups, outputs // groups)
    diagonal = jnp.eye(groups, dtype=w.dtype).reshape(groups, 1, groups, 1)
    return (blocks * diagonal).reshape(*kernel, groups * inputs, outputs)


def im2col(options: ConvOptions, x: Array, w: Array) -> Array:
    """Computes one batched matrix product of patches for all groups: [G, NH'W', KKI] @ [G, KKI, O].

    The size of the program does not depend on the number of groups, so it compiles fastest.
    """
    kernel, _, inputs, outputs = w.shape
    groups, stride = options.groups, options.stride
    pads = [zeros_around(options, kernel, length) for length in x.shape[1:3]]
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    x = x.reshape(*x.shape[:3], groups, inputs).transpose(3, 0, 1, 2, 4)
    x = jax.lax.optimization_barrier(x)  # Else each of the K * K slices pads again.
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


def zeros_around(options: ConvOptions, kernel: int, length: int) -> tuple[int, int]:
    """Returns the number of zeros before and after a row of `length` pixels."""
    if options.padding == 'SYMMETRIC':
        return kernel // 2, kernel // 2
    return jax.lax.padtype_to_pads((length,), (kernel,), (options.stride,), options.padding)[0]


IMPLS: Mapping[str, Callable[[ConvOptions, Array, Array], Array]] = {
    'xla': xla,
    'nhwc_grads': nhwc_grads,
    'pointwise': pointwise,
    'per_group': per_group,
    'im2col': im2col,
}


def candidates(signature: ConvSignature) -> list[str]:
    """Returns the names of the implementations that can compute this convolution."""
    if signature.groups > 1:
        return ['xla', 'per_group', 'im2col']
    if signature.kernel == 1:
        return ['xla', 'pointwise']
    return ['xla', 'nhwc_grads', 'im2col']
