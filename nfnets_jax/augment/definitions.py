"""Names, arguments and arithmetic shared by both implementations of the image operations.

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
ADAPTIVE_TABLES = ('AutoContrast', 'Contrast', 'Equalize')  # tables that depend on the image
BLENDS = ('Color', 'Sharpness')
MASKS = ('Cutout',)
OPERATIONS = (*WARPS, *FIXED_TABLES, *ADAPTIVE_TABLES, *BLENDS, *MASKS)

FILL = 128  # value of pixels that a warp or a mask leaves empty


class Operation(NamedTuple):
    """An operation and its argument in the units of Pillow.

    Rotate takes degrees; ShearX and ShearY the shift per row or column, in pixels; TranslateX and
    TranslateY pixels; Posterize bits to keep; Solarize the threshold; SolarizeAdd the value added
    below 128; Brightness, Color, Contrast and Sharpness the factor of `PIL.ImageEnhance`; Cutout
    half the side of its square. AutoContrast, Equalize and Invert take no argument.
    """

    name: str
    argument: float = 0.0


class Affine(NamedTuple):
    """A warp with nearest-pixel sampling, as Pillow's affine transform.

    Output point p shows input point M (p - pivot) + pivot + shift. Pixel centers are at
    x + 1/2, y + 1/2.

    Attributes:
        diagonal: both diagonal elements of M; float32 [...].
        off_diagonal: the other elements of M, in the rows of x and y; [..., 2].
        shift, pivot: x and y; [..., 2].
    """

    diagonal: np.ndarray | jax.Array
    off_diagonal: np.ndarray | jax.Array
    shift: np.ndarray | jax.Array
    pivot: np.ndarray | jax.Array

    def sources(self, sign, y, x):
        """Returns the row and the column, as floats; output pixel (y, x) shows their floors.

        Args:
            sign: 1, or -1 for the opposite warp.
            y, x: float32, the center of the pixel.
        """
        dx, dy = x - self.pivot[0], y - self.pivot[1]
        off_diagonal, shift = sign * self.off_diagonal, sign * self.shift
        from_x = self.diagonal * dx + off_diagonal[0] * dy + self.pivot[0] + shift[0]
        from_y = off_diagonal[1] * dx + self.diagonal * dy + self.pivot[1] + shift[1]
        return from_y, from_x


def affine(operations: Sequence[Operation], size: tuple[int, int]) -> Affine:
    """Returns the warps of operations on images [H, W], stacked; the identity for others."""
    height, width = size
    diagonal, off_diagonal = np.ones(len(operations)), np.zeros((len(operations), 2))
    shift, pivot = np.zeros((len(operations), 2)), np.zeros((len(operations), 2))
    for i, (name, argument) in enumerate(operations):
        if name == 'Rotate':  # counterclockwise, like Pillow
            angle = math.radians(argument)
            diagonal[i], off_diagonal[i] = math.cos(angle), (-math.sin(angle), math.sin(angle))
            pivot[i] = width / 2, height / 2
        elif name in ('ShearX', 'ShearY'):
            off_diagonal[i, WARPS.index(name) - WARPS.index('ShearX')] = argument
        elif name in ('TranslateX', 'TranslateY'):
            shift[i, WARPS.index(name) - WARPS.index('TranslateX')] = argument
    return Affine(*(x.astype(np.float32) for x in (diagonal, off_diagonal, shift, pivot)))


def luma(channels) -> jax.Array:
    """Returns the luma of red, green and blue in 0..255, int32 in 0..255 (ITU-R 601-2)."""
    red, green, blue = channels
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def rounded_mean(values: jax.Array) -> jax.Array:
    """Returns the mean of non-negative integers, with halves rounded up."""
    total = values.sum()
    return total // values.size + (2 * (total % values.size) >= values.size).astype(int)


def warp_sources(operation: Operation, size: tuple[int, int], sign: int) -> np.ndarray:
    """Returns the source row and column of each pixel of a warp, int [2, H, W].

    It rounds as `Affine.sources` does under a compiler that fuses multiply and add, as XLA does on
    CPUs and GPUs: rounding decides between two equally near pixels.
    """
    warp = Affine(*(x[0] for x in affine([operation], size)))
    y, x = (np.indices(size) + 0.5).astype(np.float32)
    dx, dy = x - warp.pivot[0], y - warp.pivot[1]
    off_diagonal, shift = np.float32(sign) * warp.off_diagonal, np.float32(sign) * warp.shift

    def fused(first, second, addend):
        return (np.float64(first) * np.float64(second) + addend).astype(np.float32)

    from_x = fused(warp.diagonal, dx, off_diagonal[0] * dy) + warp.pivot[0] + shift[0]
    from_y = fused(off_diagonal[1], dx, warp.diagonal * dy) + warp.pivot[1] + shift[1]
    return np.floor([from_y, from_x]).astype(int)


def equalize_table(counts: jax.Array, below: jax.Array) -> jax.Array:
    """Returns the table of histogram equalization, int32 [3, 256] in 0..255.

    Args:
        counts: int32 [3, 256], the histogram of each channel.
        below: int32 [3, 256], its exclusive cumulative sum.
    """
    # The maximum counts all pixels except those of the highest value.
    step = jnp.where(counts > 0, below, 0).max(axis=1, keepdims=True) // 255
    table = (below + step // 2) // jnp.maximum(step, 1)
    return jnp.where(step > 0, table, jnp.arange(256)).clip(0, 255)


@functools.cache
def autocontrast_exceptions() -> np.ndarray:
    """Returns where Pillow's autocontrast is one less than the exact quotient, int32, sorted.

    Pillow computes value * scale + offset in doubles. Only where the exact result is an integer can
    rounding leave it just below. Each case is encoded as (low * 256 + high) * 256 + value.
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
