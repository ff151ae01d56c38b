"""Pillow's image operations on the device, on batches of uint8, a different one for each image.

Results equal Pillow's bit for bit, except where a warp has two source pixels that are about equally
near. Pillow rounds the steps of a rotation to 1 / 65536 of a pixel, and may take the other one. Of
the 360 rotations by whole degrees, 346 differ at 224 px, in at most 0.32 % of the pixels; 74 at
32 px, in at most 2.2 %; none at 8 px. There are two implementations with the same results, chosen
by the platform that a program is lowered for.
`nfnets_jax.augment.packed_images` is for TPUs. This module is for CPUs and GPUs: it reduces the
operations to four primitives (an affine warp, a table of 256 values for each channel, a blend, a
mask) and runs each primitive only on the images that need it.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nfnets_jax.augment import packed_images
from nfnets_jax.augment.definitions import (
    ADAPTIVE_TABLES,
    BLENDS,
    FILL,
    FIXED_TABLES,
    MASKS,
    OPERATIONS,
    WARPS,
    Affine,
    Operation,
    affine,
    autocontrast_exceptions,
    equalize_table,
    luma,
    rounded_mean,
)

__all__ = ['OPERATIONS', 'WARPS', 'Operation', 'apply_operations']


def apply_operations(
    images: jax.Array,
    operations: Sequence[Operation],
    choice: jax.Array,
    sign: jax.Array,
    center: jax.Array,
) -> jax.Array:
    """Applies the chosen operations to each image in sequence.

    Args:
        images: uint8 [N, H, W, C]. One channel is gray, as Pillow's mode L. Of other numbers than
            1 and 3 only warps and masks are the same for every channel, as Color and Contrast
            depend on colors.
        operations: the operations to choose from.
        choice: int32 [N, L] or [N], indices into `operations`; -1 is the identity.
        sign: float32, shape of `choice`: 1, or -1 to negate a warp's argument.
        center: int32, shape of `choice` + [2]: row and column of Cutout's center.

    Returns:
        uint8 [N, H, W, C].
    """
    images, choice, sign, center = map(jnp.asarray, (images, choice, sign, center))
    if (channels := images.shape[-1]) != 3:
        # Three equal channels stay equal, and what is done to them is what Pillow does to gray.
        whole = jnp.pad(images, [(0, 0)] * 3 + [(0, -channels % 3)], mode='edge')
        parts = jnp.split(whole, whole.shape[-1] // 3, axis=-1)
        changed = [apply_operations(part, operations, choice, sign, center) for part in parts]
        return jnp.concatenate(changed, axis=-1)[..., :channels]
    if choice.ndim == 1:
        choice, sign, center = choice[:, None], sign[:, None], center[:, None]
    return jax.lax.platform_dependent(
        images,
        choice,
        sign,
        center,
        tpu=functools.partial(packed_images.apply_operations, operations),
        default=functools.partial(grouped, operations),
    )


def grouped(operations, images, choice, sign, center) -> jax.Array:
    """Implements `apply_operations` for CPUs and GPUs."""

    def apply(images, layer):
        return _apply_one_layer(images, operations, *layer), None

    return jax.lax.scan(apply, images, [jnp.moveaxis(x, 1, 0) for x in (choice, sign, center)])[0]


def _apply_one_layer(images, operations, choice, sign, center) -> jax.Array:
    """Applies one operation to each image; arguments as in `apply_operations`, [N]."""

    def needs(names):
        affected = jnp.asarray([operation.name in names for operation in operations])
        return (choice >= 0) & affected[choice]

    tables = _apply_where(
        needs(ADAPTIVE_TABLES),
        _make_adaptive_table(operations),
        _fixed_tables(operations)[choice],
        images,
        choice,
    )
    images = _apply_where(needs((*FIXED_TABLES, *ADAPTIVE_TABLES)), _look_up, images, tables)
    images = _apply_where(
        needs(WARPS), _make_warp(operations, images.shape[1:3]), images, choice, sign
    )
    images = _apply_where(needs(BLENDS), _make_blend(operations), images, choice)
    return _apply_where(needs(MASKS), _make_cutout(operations), images, choice, center)


def _named(operations: Sequence[Operation], name: str) -> jax.Array:
    return jnp.asarray([operation.name == name for operation in operations])


def _apply_where(needed: jax.Array, function: Callable, values: jax.Array, *arguments) -> jax.Array:
    """Returns function(value, ...) for each value where `needed`, else the value unchanged.

    Few values need it, so a loop gathers and computes an eighth of the batch at a time.
    """
    count = len(values)
    size = -(-count // 8)  # smaller groups waste less computation, but take more iterations
    order = jnp.argsort(~needed)  # stable: the needed ones come first
    order = jnp.pad(order, (0, size))
    total = needed.sum()

    def apply_to_group(i, values):
        indices = i * size + jnp.arange(size)
        # `count` is out of bounds: it reads some image and writes nothing.
        rows = jnp.where(indices < total, order[indices], count)
        chosen = [jnp.take(x, rows, axis=0, mode='clip') for x in (values, *arguments)]
        return values.at[rows].set(jax.vmap(function)(*chosen), mode='drop')

    return jax.lax.fori_loop(0, -(-total // size), apply_to_group, values)


def _make_warp(operations: Sequence[Operation], size: tuple[int, int]) -> Callable:
    """Returns warp(image, choice, sign) with nearest-pixel sampling."""
    height, width = size
    warps = [jnp.asarray(x) for x in affine(operations, size)]
    y, x = jnp.mgrid[:height, :width].astype(jnp.float32) + 0.5

    def warp(image, choice, sign):
        chosen = Affine(*(x[choice] for x in warps))
        from_y, from_x = (jnp.floor(at).astype(int) for at in chosen.sources(sign, y, x))
        inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
        pixels = image.reshape(-1, 3)[jnp.where(inside, from_y * width + from_x, 0)]
        return jnp.where(inside[..., None], pixels, np.uint8(FILL))

    return warp


def _fixed_tables(operations: Sequence[Operation]) -> jax.Array:
    """Returns the lookup tables of `FIXED_TABLES`, uint8 [operations, 3, 256]."""
    value = np.arange(256)
    tables = np.zeros((len(operations), 256), np.uint8)
    for i, (name, argument) in enumerate(operations):
        if name == 'Brightness':
            tables[i] = (np.float32(argument) * value.astype(np.float32)).clip(0, 255)
        elif name == 'Invert':
            tables[i] = 255 - value
        elif name == 'Posterize':
            tables[i] = value & ~(2 ** (8 - int(argument)) - 1)
        elif name == 'Solarize':
            tables[i] = np.where(value < argument, value, 255 - value)
        elif name == 'SolarizeAdd':
            tables[i] = np.where(value < 128, (value + int(argument)).clip(0, 255), value)
    return jnp.asarray(np.repeat(tables[:, None], 3, axis=1))


def _make_adaptive_table(operations: Sequence[Operation]) -> Callable:
    """Returns table(_, image, choice) -> uint8 [3, 256], for `ADAPTIVE_TABLES`."""
    is_autocontrast, is_equalize = (
        _named(operations, name) for name in ('AutoContrast', 'Equalize')
    )
    products = _products(operations)

    def table(_, image, choice):
        counts = _histogram(image)
        below = jnp.cumsum(counts, axis=1) - counts
        mean = rounded_mean(_luma(image))
        contrast = _blend(mean, jnp.arange(256), products[choice])
        return jnp.select(
            [is_autocontrast[choice], is_equalize[choice]],
            [_autocontrast_table(counts), equalize_table(counts, below).astype(jnp.uint8)],
            jnp.broadcast_to(contrast, (3, 256)),
        )

    return table


def _look_up(image: jax.Array, table: jax.Array) -> jax.Array:
    """Maps the values of an image [H, W, 3] through `table` [3, 256]."""
    return table.ravel()[_table_indices(image)]


def _histogram(image: jax.Array) -> jax.Array:
    """Returns the histogram of each channel of an image [H, W, 3], int32 [3, 256]."""
    return jnp.zeros(3 * 256, int).at[_table_indices(image)].add(1).reshape(3, 256)


def _table_indices(image: jax.Array) -> jax.Array:
    """Returns indices into a flattened table [3, 256]: three times as fast as two indices."""
    return image.astype(int) + 256 * jnp.arange(3)


def _autocontrast_table(counts: jax.Array) -> jax.Array:
    """Returns the table that stretches each channel to [0, 255]; counts are int32 [3, 256]."""
    low = jnp.argmax(counts > 0, axis=1, keepdims=True)
    high = 255 - jnp.argmax(counts[:, ::-1] > 0, axis=1, keepdims=True)
    value = jnp.arange(256)
    table = (value - low) * 255 // jnp.maximum(high - low, 1)
    exceptions = jnp.asarray(autocontrast_exceptions())
    code = (low * 256 + high) * 256 + value
    nearest = jnp.searchsorted(exceptions, code).clip(0, len(exceptions) - 1)
    table = jnp.where(high > low, table - (exceptions[nearest] == code).astype(int), value)
    return table.clip(0, 255).astype(jnp.uint8)


def _make_blend(operations: Sequence[Operation]) -> Callable:
    """Returns blend(image, choice): with gray for Color, with a blur for Sharpness."""
    is_color = _named(operations, 'Color')
    products = _products(operations)

    def blend(image, choice):
        gray = _luma(image)[..., None]
        degenerate = jnp.where(is_color[choice], gray, _smooth(image))
        return _blend(degenerate, image.astype(int), products[choice])

    return blend


def _products(operations: Sequence[Operation]) -> jax.Array:
    """Returns the blending factor of each operation times -255..255, float32 [operations, 511].

    A table, because a compiler that fuses the product with the following sum does not round the
    product. Pillow does, and about one in a thousand pixels depends on it.
    """
    factors = np.array([operation.argument for operation in operations], np.float32)
    return jnp.asarray(factors[:, None] * np.arange(-255, 256, dtype=np.float32))


def _blend(degenerate, value, products: jax.Array) -> jax.Array:
    """Returns degenerate + factor * (value - degenerate), uint8, from integers in 0..255."""
    blended = degenerate.astype(jnp.float32) + products[value - degenerate + 255]
    return blended.clip(0, 255).astype(jnp.uint8)


def _luma(image: jax.Array) -> jax.Array:
    """Returns the luma of an image [H, W, 3], int32 [H, W] in 0..255."""
    return luma(jnp.moveaxis(image.astype(int), -1, 0))


def _smooth(image: jax.Array) -> jax.Array:
    """Returns an image [H, W, 3] blurred by 3x3 weights, 5 in the center and 1 around it; int32.

    The border is unchanged.
    """
    image = image.astype(int)
    height, width, _ = image.shape
    if height < 3 or width < 3:
        return image
    rows = image[:-2] + image[1:-1] + image[2:]
    weighted = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * image[1:-1, 1:-1]
    return image.at[1:-1, 1:-1].set((2 * weighted + 13) // 26)


def _make_cutout(operations: Sequence[Operation]) -> Callable:
    """Returns cutout(image, choice, center), which fills a square with gray."""
    half = jnp.asarray([int(operation.argument) for operation in operations])

    def cutout(image, choice, center):
        y, x = jnp.ogrid[: image.shape[0], : image.shape[1]]

        def covered(coordinate, center):
            return (coordinate >= center - half[choice]) & (coordinate < center + half[choice])

        inside = covered(y, center[0]) & covered(x, center[1])
        return jnp.where(inside[..., None], np.uint8(FILL), image)

    return cutout
