"""Sizes of images: the side of a square in pixels, or (height, width)."""

import re
from collections.abc import Sequence
from typing import Any

ImageSize = int | Sequence[int]

WANTS = 'a side in pixels, or height and width like (128, 300)'


def height_width(size: ImageSize) -> tuple[int, int]:
    """Returns the height and width of a size."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def shortest(size: ImageSize) -> ImageSize:
    """Returns the side of a square, and (height, width) of any other size."""
    height, width = height_width(size)
    return height if height == width else (height, width)


def is_size(value: Any) -> bool:
    """Returns whether a value is one or two positive integers."""
    sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    return all(type(side) is int and side > 0 for side in sides)


def parse(text: str) -> ImageSize:
    """Returns the size that '224' or '128x300' (height x width) stands for.

    Raises:
        ValueError: the text is not a size.
    """
    sides = tuple(map(int, text.split('x'))) if re.fullmatch(r'\d+(x\d+)?', text) else ()
    if not sides or min(sides) < 1:
        raise ValueError('must be a side in pixels like 224, or height and width like 128x300')
    return shortest(sides * 2 if len(sides) == 1 else sides)


def describe(size: ImageSize) -> str:
    """Returns '224' or '128x300'."""
    height, width = height_width(size)
    return str(height) if height == width else f'{height}x{width}'
