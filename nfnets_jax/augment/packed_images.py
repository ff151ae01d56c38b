"""The image operations for TPUs: one image at a time, without access to single elements.

A TPU has no fast gather or scatter of single elements, but it skips the branches of a conditional
that it does not take. So each image runs its own operations alone, as arithmetic, moves of whole
rows and columns, or products with one-hot matrices. An image is int32 [H, W], red in the lowest
8 bits, then green, then blue, so that a warp moves all three channels at once.

On a TPU, an instruction on a whole image costs little more than the smallest instruction. So each
operation with its argument has its own branch, and nothing is looked up at run time.

Results are bit for bit those of `nfnets_jax.augment.operations`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nfnets_jax.augment import shears
from nfnets_jax.augment.definitions import (
    FILL,
    WARPS,
    Operation,
    autocontrast_exceptions,
    equalize_table,
    luma,
    rounded_mean,
    warp_sources,
)

_GRAY = 0x010101  # times a value: that value in all channels


def apply_operations(operations: Sequence[Operation], images, choice, sign, center) -> jax.Array:
    """Implements `nfnets_jax.augment.operations.apply_operations`; `choice` is [N, L]."""
    count, layers = choice.shape
    branches, indices = _branches(operations, images.shape[1:3])
    chosen = (choice[..., None] == jnp.arange(len(operations)))[..., None]
    chosen &= (sign < 0)[..., None, None] == np.array([False, True])
    index = jnp.where(chosen, indices, 0).sum((-2, -1))
    # Pack as many indices as fit in a word: reading a number takes as long as reading an image.
    bits = max(1, (len(branches) - 1).bit_length())
    per_word = max(1, min(layers, 31 // bits))
    index = jnp.pad(index, ((0, 0), (0, -layers % per_word)))
    words = (index.reshape(count, -1, per_word) << bits * jnp.arange(per_word)).sum(-1)
    center = center.astype(jnp.int32).clip(-(2**14), 2**14)
    centers = (center[..., 0] << 16 | center[..., 1] & 0xFFFF).ravel()  # Packed as well.

    def one_image(i, packed):
        image = jax.lax.dynamic_index_in_dim(packed, i, keepdims=False)

        def one_word(j, image):
            word = jax.lax.dynamic_slice(words, (i, j), (1, 1)).reshape(())

            def one_operation(k, carry):
                image, word = carry
                position = i * layers + j * per_word + k
                image = jax.lax.switch(word & (1 << bits) - 1, branches, image, centers, position)
                return image, word >> bits

            return jax.lax.fori_loop(0, per_word, one_operation, (image, word))[0]

        image = jax.lax.fori_loop(0, words.shape[1], one_word, image)
        return jax.lax.dynamic_update_index_in_dim(packed, image, i, 0)

    return unpack(jax.lax.fori_loop(0, count, one_image, pack(images)))


def pack(images: jax.Array) -> jax.Array:
    """Returns uint8 [..., H, W, 3] as int32 [..., H, W]."""
    return (images.astype(jnp.int32) << np.array([0, 8, 16])).sum(-1)


def unpack(packed: jax.Array) -> jax.Array:
    """Returns int32 [..., H, W] as uint8 [..., H, W, 3]."""
    return (packed[..., None] >> np.array([0, 8, 16]) & 255).astype(jnp.uint8)


def _join(channels: jax.Array | Sequence[jax.Array]) -> jax.Array:
    red, green, blue = channels
    return red | green << 8 | blue << 16


def _split(packed: jax.Array) -> list[jax.Array]:
    # Three arrays rather than one, so that XLA fuses what follows into a single instruction.
    return [packed >> shift & 255 for shift in (0, 8, 16)]


def _branches(
    operations: Sequence[Operation], size: tuple[int, int]
) -> tuple[list[Callable], np.ndarray]:
    """Returns the branches and the index of each operation's branch.

    Branches are functions (image, centers, position in `centers`) -> image; the first one is the
    identity. Indices are int32 [operations, 2]; the last axis is 1 for a negative sign.
    """
    branches: dict[tuple, Callable] = {('none',): lambda image, centers, position: image}
    key: tuple
    make: Callable
    indices = np.zeros((len(operations), 2), np.int32)
    for i, operation in enumerate(operations):
        for negative in (False, True):
            if operation.name in WARPS:
                key = (operation, negative)
                make = functools.partial(_make_warp, size=size, sign=-1 if negative else 1)
            else:
                key, make = (operation,), _MAKE[operation.name]
            if key not in branches:
                branches[key] = make(operation)
            indices[i, int(negative)] = list(branches).index(key)
    return list(branches.values()), indices


def _make_warp(operation: Operation, size: tuple[int, int], sign: int) -> Callable:
    sources = warp_sources(operation, size, sign)
    if operation.name == 'Rotate':
        plan = shears.plan_rotation(sign * operation.argument, sources)
    else:
        plan = shears.plan_axis(0 if operation.name.endswith('Y') else 1, sources)
    return lambda image, centers, position: shears.warp(plan, image, FILL * _GRAY)


def _pointwise(change: Callable) -> Callable:
    """Returns make(operation) -> branch for operations on each value alone.

    Args:
      change: (argument, values int32 [H, W]) -> int32 [H, W].
    """

    def make(operation):
        return lambda image, centers, position: _join(
            [change(operation.argument, values) for values in _split(image)]
        )

    return make


def _blending(degenerate: Callable) -> Callable:
    """Returns make(operation) -> branch for blends of an image with a degenerate one.

    Args:
      degenerate: three channels int32 [H, W] -> three arrays that broadcast to them.
    """

    def make(operation):
        def branch(image, centers, position):
            channels = _split(image)
            pairs = zip(channels, degenerate(channels), strict=True)
            return _join([_blend(operation.argument, own, other) for own, other in pairs])

        return branch

    return make


def _blend(factor: float, values: jax.Array, degenerate: jax.Array) -> jax.Array:
    """Returns degenerate + factor * (values - degenerate), int32, from integers in 0..255.

    The factor is split into two numbers of 12 bits. The product of each with an integer in
    -255..255 is exact, so their sum is rounded once, like Pillow's product, whether or not a
    compiler fuses multiplications with additions.
    """
    whole = np.float32(factor)
    high = (whole.view(np.int32) & ~0xFFF).view(np.float32)
    difference = (values - degenerate).astype(jnp.float32)
    product = high * difference + (whole - high) * difference
    return jnp.clip(degenerate.astype(jnp.float32) + product, 0, 255).astype(jnp.int32)


def _make_sharpness(operation: Operation) -> Callable:
    def branch(image, centers, position):
        if min(image.shape) < 3:  # only a border
            return image
        # Red and blue share a word: their sums have less than 16 bits.
        red_blue, green = (
            _blur(image >> shift & mask) for shift, mask in ((0, 0xFF00FF), (8, 255))
        )
        smooth = (red_blue & 0xFFFF, green, red_blue >> 16)
        inner = [
            _blend(operation.argument, own, divide_by_26(2 * weighted + 13))
            for own, weighted in zip(_split(image[1:-1, 1:-1]), smooth, strict=True)
        ]
        return jax.lax.dynamic_update_slice(image, _join(inner), (1, 1))

    return branch


def _blur(values: jax.Array) -> jax.Array:
    """Returns sums with 3x3 weights, 5 in the center and 1 around it, [H - 2, W - 2]."""
    rows = values[:-2] + values[1:-1] + values[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * values[1:-1, 1:-1]


def divide_by_26(numerator):
    """Returns numerator // 26 for integers in 0..6643, the range of the blur."""
    return numerator * 20165 >> 19


def _make_cutout(operation: Operation) -> Callable:
    half = int(operation.argument)

    def branch(image, centers, position):
        # Slice the mask from a larger one that has the square in its center.
        around = [size + half for size in image.shape]
        rows, columns = (abs(np.arange(2 * n) - n + 0.5) < half for n in around)
        square = jnp.asarray(np.outer(rows, columns), jnp.int32)
        packed = jax.lax.dynamic_slice(centers, (position,), (1,))[0]
        center = packed >> 16, packed << 16 >> 16
        # Clip: a square outside the image may be at any distance.
        start = [n - jnp.clip(at, -half, n) for n, at in zip(around, center, strict=True)]
        inside = jax.lax.dynamic_slice(square, start, image.shape)
        return jnp.where(inside == 1, FILL * _GRAY, image)

    return branch


def _autocontrast(image, centers, position):
    # The exceptions as 256 bits for each pair of lowest and highest value.
    exceptions = autocontrast_exceptions()
    bits = np.left_shift(1, exceptions & 31, dtype=np.int64).astype(np.uint32).view(np.int32)
    stretched = []
    for values in _split(image):
        low, high = values.min(), values.max()
        extent = jnp.maximum(high - low, 1)
        # The float quotient may be off by one; the integer remainder corrects it.
        numerator = (values - low) * 255
        quotient = (numerator.astype(jnp.float32) * (1 / extent.astype(jnp.float32))).astype(
            jnp.int32
        )
        remainder = numerator - quotient * extent
        quotient += (remainder >= extent).astype(int) - (remainder < 0).astype(int)

        affected = jnp.where(low * 256 + high == exceptions >> 8, bits, 0)
        words = [jnp.where(exceptions >> 5 & 7 == word, affected, 0).sum() for word in range(8)]
        exception = _select(values >> 5, words) >> (values & 31) & 1
        stretched.append(jnp.where(high > low, quotient - exception, values))
    return _join(stretched)


def _equalize(image, centers, position):
    # A histogram as a product of the one-hot nibbles: exact, as bfloat16 has 0 and 1 and sums are
    # float32.
    values = jnp.stack(_split(image)).reshape(3, 1, -1)
    digits = jnp.arange(16)[:, None]
    high, low = ((nibbles == digits).astype(jnp.bfloat16) for nibbles in (values >> 4, values & 15))
    counts = jnp.einsum('chp,clp->chl', high, low, preferred_element_type=jnp.float32)
    counts = counts.astype(jnp.int32).reshape(3, 256)
    value, other = (jax.lax.broadcasted_iota(jnp.int32, (256, 256), axis) for axis in (0, 1))
    below = jnp.where(other < value, counts[:, None], 0).sum(-1)
    table = equalize_table(counts, below)
    # Four table entries in each word.
    words = jnp.asarray(sum(table[:, 64 * i : 64 * (i + 1)] << 8 * i for i in range(4)))
    channels = jnp.stack(_split(image))
    found = _select(channels & 63, [words[:, i, None, None] for i in range(64)])
    return _join(found >> (channels >> 6 << 3) & 255)


def _select(index: jax.Array, words: Sequence[jax.Array]) -> jax.Array:
    """Returns words[index] elementwise, by a binary tree over the bits of `index`.

    With 64 words this is faster than a product with a one-hot matrix.
    """
    words, bit = list(words), 0
    while len(words) > 1:
        odd = (index >> bit & 1) == 1
        words = [jnp.where(odd, b, a) for a, b in zip(words[::2], words[1::2], strict=True)]
        bit += 1
    return words[0]


_MAKE: dict[str, Callable[[Operation], Callable]] = {
    'AutoContrast': lambda operation: _autocontrast,
    'Brightness': _blending(lambda channels: [jnp.int32(0)] * 3),
    'Color': _blending(lambda channels: [luma(channels)] * 3),
    'Contrast': _blending(lambda channels: [rounded_mean(luma(channels))] * 3),
    'Cutout': _make_cutout,
    'Equalize': lambda operation: _equalize,
    'Invert': lambda operation: lambda image, centers, position: image ^ 255 * _GRAY,
    'Posterize': _pointwise(lambda bits, values: values & 256 - (1 << 8 - int(bits))),
    'Sharpness': _make_sharpness,
    'Solarize': _pointwise(
        lambda threshold, values: jnp.where(values < threshold, values, 255 - values)
    ),
    'SolarizeAdd': _pointwise(
        lambda added, values: jnp.where(values < 128, jnp.clip(values + int(added), 0, 255), values)
    ),
}
