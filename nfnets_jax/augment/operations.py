"""Pillow's operations on the device: on batches of uint8, a different one for each image.

What an operation does to an image is what its counterpart in Pillow does, to the last bit but for
the nearest pixel of a warp where two are equally near. There are two forms of them with the same
results, chosen by the platform that a program is lowered for. For TPUs: see
`nfnets_jax.augment.packed_images`. For CPUs and GPUs, here, they reduce to four primitives - an
affine warp, a table of 256 values for each channel, a blend, a mask - each of which runs over only
those images whose operation needs it.
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
    centre: jax.Array,
) -> jax.Array:
    """Applies to each image the operations that were chosen for it, one after the other.

    Args:
        images: uint8 [N, H, W, 3].
        operations: what there is to choose from.
        choice: int32 [N, L] or [N], places in `operations`; -1 leaves the image as it is.
        sign: float32 like `choice`, 1 or -1, which turns a warp's argument round.
        centre: int32 [..., 2], like `choice` in front; the row and column of Cutout's middle.

    Returns:
        uint8 [N, H, W, 3].
    """
    images, choice, sign, centre = map(jnp.asarray, (images, choice, sign, centre))
    if choice.ndim == 1:
        choice, sign, centre = choice[:, None], sign[:, None], centre[:, None]
    return jax.lax.platform_dependent(
        images,
        choice,
        sign,
        centre,
        tpu=functools.partial(one_by_one, operations),
        default=functools.partial(in_groups, operations),
    )


def one_by_one(operations, images, choice, sign, centre) -> jax.Array:
    """The form for TPUs of `apply_operations`."""
    return packed_images.apply_operations(images, operations, choice, sign, centre)


def in_groups(operations, images, choice, sign, centre) -> jax.Array:
    """The form for CPUs and GPUs of `apply_operations`."""

    def apply(images, one):
        return _apply_in_groups(images, operations, *one), None

    return jax.lax.scan(apply, images, [jnp.moveaxis(x, 1, 0) for x in (choice, sign, centre)])[0]


def _apply_in_groups(images, operations, choice, sign, centre) -> jax.Array:
    """Applies to each image one operation; the arguments are those of `apply_operations`, [N]."""

    def needs(names):
        concerned = jnp.asarray([operation.name in names for operation in operations])
        return (choice >= 0) & concerned[choice]

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
    return _apply_where(needs(MASKS), _make_cutout(operations), images, choice, centre)


def _named(operations: Sequence[Operation], name: str) -> jax.Array:
    return jnp.asarray([operation.name == name for operation in operations])


def _apply_where(needed: jax.Array, function: Callable, values: jax.Array, *arguments) -> jax.Array:
    """Returns [function(value, ...) for each value], or the value as it is where not `needed`.

    Few need it, so a few are gathered at a time and computed together, in as many turns as that
    takes.
    """
    count = len(values)
    some = -(-count // 8)  # the fewer at a time, the less is computed in vain, but the more turns
    order = jnp.argsort(~needed)  # stable: those that need it come first
    order = jnp.pad(order, (0, some))
    total = needed.sum()

    def turn(number, values):
        places = number * some + jnp.arange(some)
        rows = jnp.where(places < total, order[places], count)  # one too far: reads anything,
        chosen = [jnp.take(x, rows, axis=0, mode='clip') for x in (values, *arguments)]
        return values.at[rows].set(jax.vmap(function)(*chosen), mode='drop')  # ... writes nothing

    return jax.lax.fori_loop(0, -(-total // some), turn, values)


def _make_warp(operations: Sequence[Operation], size: tuple[int, int]) -> Callable:
    """Returns warp(image, choice, sign), by nearest pixels."""
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
    """Returns what each of `FIXED_TABLES` makes of 0..255, uint8 [operations, 3, 256]."""
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
    """Returns table(_, image, choice) -> uint8 [3, 256], of one of `ADAPTIVE_TABLES`."""
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
    """Returns an image [H, W, 3] whose values are replaced by those of `table` [3, 256]."""
    return table.ravel()[_table_places(image)]


def _histogram(image: jax.Array) -> jax.Array:
    """Returns how often each value occurs in each channel of an image [H, W, 3], int32 [3, 256]."""
    return jnp.zeros(3 * 256, int).at[_table_places(image)].add(1).reshape(3, 256)


def _table_places(image: jax.Array) -> jax.Array:
    """Where [channel, value] lies in a flattened table; one index is thrice as fast as two."""
    return image.astype(int) + 256 * jnp.arange(3)


def _autocontrast_table(counts: jax.Array) -> jax.Array:
    """Stretches the values that occur in a channel to [0, 255]; counts are int32 [3, 256]."""
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
    """Returns blend(image, choice), with grey (Color) or with a blur (Sharpness)."""
    is_color = _named(operations, 'Color')
    products = _products(operations)

    def blend(image, choice):
        grey = _luma(image)[..., None]
        degenerate = jnp.where(is_color[choice], grey, _smooth(image))
        return _blend(degenerate, image.astype(int), products[choice])

    return blend


def _products(operations: Sequence[Operation]) -> jax.Array:
    """Returns the blending factor of each operation times -255..255, float32 [operations, 511].

    Looked up rather than computed, because a compiler that fuses the product with the sum that
    follows does not round it; Pillow does, and one in some thousand pixels depends on it.
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
    """Returns an image [H, W, 3] blurred by 3x3 weights, 5 in the middle and 1 around; int32.

    Its border stays as it is.
    """
    image = image.astype(int)
    height, width, _ = image.shape
    if height < 3 or width < 3:
        return image
    rows = image[:-2] + image[1:-1] + image[2:]
    weighted = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * image[1:-1, 1:-1]
    return image.at[1:-1, 1:-1].set((2 * weighted + 13) // 26)


def _make_cutout(operations: Sequence[Operation]) -> Callable:
    """Returns cutout(image, choice, centre): a square becomes grey."""
    half = jnp.asarray([int(operation.argument) for operation in operations])

    def cutout(image, choice, centre):
        y, x = jnp.ogrid[: image.shape[0], : image.shape[1]]

        def covered(coordinate, centre):
            return (coordinate >= centre - half[choice]) & (coordinate < centre + half[choice])

        inside = covered(y, centre[0]) & covered(x, centre[1])
        return jnp.where(inside[..., None], np.uint8(FILL), image)

    return cutout
