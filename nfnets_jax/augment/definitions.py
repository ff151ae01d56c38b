"""What the image operations are, for every form of them: names, arguments, shared arithmetic.

See `nfnets_jax.augment.operations`.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

WARPS = ('Rotate', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY')
FIXED_TABLES = ('Brightness', 'Invert', 'Posterize', 'Solarize', 'SolarizeAdd')
ADAPTIVE_TABLES = ('AutoContrast', 'Contrast', 'Equalize')  # they depend on the picture
BLENDS = ('Color', 'Sharpness')
MASKS = ('Cutout',)
OPERATIONS = (*WARPS, *FIXED_TABLES, *ADAPTIVE_TABLES, *BLENDS, *MASKS)

FILL = 128  # what a warp or a mask leaves empty


class Operation(NamedTuple):
    """An operation and its argument in the units of Pillow.

    Rotate takes degrees; ShearX and ShearY the shift per row or column, in pixels; TranslateX and
    TranslateY pixels; Posterize bits to keep; Solarize the threshold; SolarizeAdd what to add
    below 128; Brightness, Color, Contrast and Sharpness the factor of `PIL.ImageEnhance`; Cutout
    half the side of its square. AutoContrast, Equalize and Invert take none.
    """

    name: str
    argument: float = 0.0


class Affine(NamedTuple):
    """A warp by nearest pixels, as Pillow's affine transform.

    Output point p shows input point M (p - pivot) + pivot + shift, where x + 1/2, y + 1/2 is the
    middle of a pixel.

    Attributes:
        straight: M's diagonal, the same twice; float32 [...].
        across: M's other elements, of x and y; [..., 2].
        shift, pivot: x and y; [..., 2].
    """

    straight: np.ndarray | jax.Array
    across: np.ndarray | jax.Array
    shift: np.ndarray | jax.Array
    pivot: np.ndarray | jax.Array

    def sources(self, sign, y, x):
        """Returns the row and the column, as floats, whose floors output pixel y, x shows.

        Args:
            sign: 1 or -1, which turns the warp round.
            y, x: float32, the middle of the pixel.
        """
        dx, dy = x - self.pivot[0], y - self.pivot[1]
        across, shift = sign * self.across, sign * self.shift
        from_x = self.straight * dx + across[0] * dy + self.pivot[0] + shift[0]
        from_y = across[1] * dx + self.straight * dy + self.pivot[1] + shift[1]
        return from_y, from_x


def affine(operations: Sequence[Operation], size: tuple[int, int]) -> Affine:
    """Returns the warps of operations on images [H, W], the identity for those that are none.

    Its arrays have the operations as their first axis.
    """
    height, width = size
    straight, across = np.ones(len(operations)), np.zeros((len(operations), 2))
    shift, pivot = np.zeros((len(operations), 2)), np.zeros((len(operations), 2))
    for i, (name, argument) in enumerate(operations):
        if name == 'Rotate':  # counterclockwise, like Pillow
            angle = math.radians(argument)
            straight[i], across[i] = math.cos(angle), (-math.sin(angle), math.sin(angle))
            pivot[i] = width / 2, height / 2
        elif name in ('ShearX', 'ShearY'):
            across[i, WARPS.index(name) - WARPS.index('ShearX')] = argument
        elif name in ('TranslateX', 'TranslateY'):
            shift[i, WARPS.index(name) - WARPS.index('TranslateX')] = argument
    return Affine(*(x.astype(np.float32) for x in (straight, across, shift, pivot)))


def luma(channels) -> jax.Array:
    """Returns the luma of red, green and blue in 0..255, int32 in 0..255 (ITU-R 601-2)."""
    red, green, blue = channels
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def rounded_mean(values: jax.Array) -> jax.Array:
    """Returns the mean of integers >= 0, halves rounded up."""
    total = values.sum()
    return total // values.size + (2 * (total % values.size) >= values.size).astype(int)


def warp_sources(operation: Operation, size: tuple[int, int], sign: int) -> np.ndarray:
    """Returns the row and column that each pixel of a warp shows, int [2, H, W].

    Rounded like `Affine.sources` by a compiler that fuses a product with the sum that follows,
    which XLA does on CPUs and GPUs: of two pixels that are equally near, rounding decides.
    """
    warp = Affine(*(x[0] for x in affine([operation], size)))
    y, x = (np.indices(size) + 0.5).astype(np.float32)
    dx, dy = x - warp.pivot[0], y - warp.pivot[1]
    across, shift = np.float32(sign) * warp.across, np.float32(sign) * warp.shift

    def fused(first, second, addend):
        return (np.float64(first) * np.float64(second) + addend).astype(np.float32)

    from_x = fused(warp.straight, dx, across[0] * dy) + warp.pivot[0] + shift[0]
    from_y = fused(across[1], dx, warp.straight * dy) + warp.pivot[1] + shift[1]
    return np.floor([from_y, from_x]).astype(int)


def equalize_table(counts: jax.Array, below: jax.Array) -> jax.Array:
    """Returns the table that makes each value occur about equally often, int32 [3, 256] in 0..255.

    Args:
        counts: int32 [3, 256], how often each value occurs in each channel.
        below: int32 [3, 256], how often lesser values do.
    """
    # All pixels but those of the highest value.
    step = jnp.where(counts > 0, below, 0).max(axis=1, keepdims=True) // 255
    table = (below + step // 2) // jnp.maximum(step, 1)
    return jnp.where(step > 0, table, jnp.arange(256)).clip(0, 255)


@functools.cache
def autocontrast_exceptions() -> np.ndarray:
    """Returns where Pillow's autocontrast is one less than the exact quotient, int32, sorted.

    It computes value * scale + offset in doubles, and where the exact result is an integer (only
    there), rounding may leave it just below. Each is coded as (low * 256 + high) * 256 + value.
    """
    found = []
    for low in range(255):
        high, value = np.mgrid[low + 1 : 256, :256]
        scale = 255.0 / (high - low)
        computed = (value * scale + -low * scale).astype(int)
        exact = (value - low) * 255 // (high - low)
        wrong = (computed < exact) & (low <= value) & (value <= high)
        found.append(((low * 256 + high) * 256 + value)[wrong])
    return np.concatenate(found).astype(np.int32)
