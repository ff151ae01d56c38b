"""Warps by nearest pixels as moves of whole rows and columns: the form for TPUs.

A rotation is three shears: rows move, then columns, then rows (Paeth, Graphics Interface 1986).
Moved by whole pixels they only permute the image, and leave each pixel next to where a warp by
nearest pixels wants it. So each pixel of the result then picks one of its neighbors; which one, is
known when the program is made, since the arguments of the operations are. The other warps are one
such move. The result equals the warp pixel by pixel, whatever its rounding.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Distances of lines: numbers of rows or columns [lines] -> int [lines]. Line i shows at place q
# what was at q + distance.
Distances = Callable[[np.ndarray], np.ndarray]


class Digit(NamedTuple):
    """A part of the distances that one instruction moves lines by: `unit` times 0, ..., base - 1.

    Attributes:
      unit, base: of the digit.
      of_line: int [lines].
    """

    unit: int
    base: int
    of_line: np.ndarray

    @property
    def reach(self) -> int:
        return self.unit * (self.base - 1)


class Step(NamedTuple):
    """Moves rows (axis 1) or columns (axis 0).

    Attributes:
      axis: along which they move.
      padding: pixels before and after, along `axis`, before the move; negative ones are cut off.
      length: of the result along `axis`.
      digits: of the distances, which are their sum.
    """

    axis: int
    padding: tuple[int, int]
    length: int
    digits: tuple[Digit, ...]


class Plan(NamedTuple):
    """A warp of images [H, W].

    Attributes:
      turned: whether the image is turned by 180 degrees first.
      steps: what comes next, in order.
      offsets: (rows, columns) from a pixel to the neighbors that it may pick.
      codes: uint8 [H, W], which of them it picks; their number: none, but the fill. None where
        every pixel already is where it belongs.
    """

    turned: bool
    steps: tuple[Step, ...]
    offsets: tuple[tuple[int, int], ...]
    codes: np.ndarray | None


def plan_axis(axis: int, sources: np.ndarray) -> Plan:
    """Returns the plan of a warp that moves pixels along one axis.

    Args:
      axis: 0 or 1.
      sources: int [2, H, W], the row and column that each pixel shows; outside of the image: the
        fill.
    """
    moved = sources[axis] - np.indices(sources.shape[1:])[axis]
    by_line = np.median(moved, axis).astype(int)  # Rounding may leave some pixels behind.
    return _plan(False, [(axis, lambda lines: by_line[lines.clip(0, len(by_line) - 1)])], sources)


def plan_rotation(degrees: float, sources: np.ndarray) -> Plan:
    """Returns the plan of a rotation around the middle, counterclockwise; see `plan_axis`."""
    height, width = sources.shape[1:]
    angle = math.radians((degrees + 180) % 360 - 180)
    turned = abs(angle) > math.pi / 2  # Beyond, shears would be steep.
    if turned:
        angle -= math.copysign(math.pi, angle)
        sources = np.reshape([height - 1, width - 1], (2, 1, 1)) - sources

    def rows(lines):
        return np.rint(-math.tan(angle / 2) * (lines + 0.5 - height / 2)).astype(int)

    def columns(lines):
        return np.rint(math.sin(angle) * (lines + 0.5 - width / 2)).astype(int)

    return _plan(turned, [(1, rows), (0, columns), (1, rows)], sources)


def _plan(turned: bool, moves: list[tuple[int, Distances]], sources: np.ndarray) -> Plan:
    size = sources.shape[1:]
    inside = ((sources >= 0) & (sources < np.reshape(size, (2, 1, 1)))).all(0)
    landed = list(sources)  # Where the moves take what each pixel shows.
    for axis, distances in moves:
        landed[axis] = landed[axis] - distances(landed[1 - axis])
    apart = np.subtract(landed, np.indices(size))
    offsets, places = np.unique(apart[:, inside].T, axis=0, return_inverse=True)
    codes = np.full(size, len(offsets), np.uint8)
    codes[inside] = places.ravel()

    reach = [int(axis) for axis in np.abs(offsets).max(axis=0, initial=0)]
    # Of the result; then of each input.
    window = [(-ends, length + ends) for ends, length in zip(reach, size, strict=True)]
    steps = []
    for i, (axis, distances) in reversed(list(enumerate(moves))):
        earlier = {axis for axis, _ in moves[:i]}
        # Before their first move, there are no other lines than those of the image.
        lines = window[1 - axis] if 1 - axis in earlier else (0, size[1 - axis])
        by_line = distances(np.arange(*lines))
        nearest = int(by_line.min())
        digits = _digits(axis, by_line - nearest)
        first, end = window[axis]
        start, stop = first + nearest, end + nearest + sum(digit.reach for digit in digits)
        padding = (0, 0) if axis in earlier else (-start, stop - size[axis])
        steps.append(Step(axis, padding, end - first, digits))
        window[axis] = (start, stop)
    return Plan(
        turned,
        tuple(reversed(steps)),
        tuple((int(row) + reach[0], int(column) + reach[1]) for row, column in offsets),
        codes if apart.any() else None,
    )


def _digits(axis: int, distances: np.ndarray) -> tuple[Digit, ...]:
    """Returns distances >= 0 as digits, of the bases that a TPU is fastest with."""
    count = int(distances.max()) + 1
    if count == 1:
        return ()
    # Cycles of one digit by its base, as compiled for a v5e: columns move at half the cost.
    fixed, each = (1800, 470) if axis == 0 else (1430, 830)
    bases = min(
        (
            bases
            for number in range(1, 6)
            for bases in itertools.combinations_with_replacement(range(2, 9), number)
            if math.prod(bases) >= count
        ),
        key=lambda bases: sum(fixed + each * base for base in bases),
    )
    unit, digits = 1, []
    for base in bases:
        digits.append(Digit(unit, base, distances // unit % base))
        unit *= base
    return tuple(reversed(digits))  # The greatest first, which leaves the least to move.


def warp(plan: Plan, image: jax.Array, fill: int) -> jax.Array:
    """Returns the warp of an image, int32 [H, W], with `fill` where it shows nothing."""
    size = image.shape
    if plan.turned:
        image = image[::-1, ::-1]
    for step in plan.steps:
        image = _move(step, image, fill)
    if plan.codes is None:
        return image
    codes = jnp.asarray(plan.codes).astype(jnp.int32)
    warped = jnp.full(size, fill, image.dtype)
    for code, offset in enumerate(plan.offsets):
        neighbor = jax.lax.slice(image, offset, np.add(offset, size).tolist())
        warped = jnp.where(codes == code, neighbor, warped)
    return warped


def _move(step: Step, image: jax.Array, fill: int) -> jax.Array:
    ends = [(0, 0, 0), (0, 0, 0)]
    ends[step.axis] = (*step.padding, 0)
    image = jax.lax.pad(image, np.int32(fill), ends)
    for i, digit in enumerate(step.digits):
        length = step.length + sum(later.reach for later in step.digits[i + 1 :])
        of_line = jnp.expand_dims(jnp.asarray(digit.of_line, jnp.int32), step.axis)
        moved = jax.lax.slice_in_dim(image, 0, length, axis=step.axis)
        for value in range(1, digit.base):
            start = value * digit.unit
            case = jax.lax.slice_in_dim(image, start, start + length, axis=step.axis)
            moved = jnp.where(of_line == value, case, moved)
        image = moved
    return image
