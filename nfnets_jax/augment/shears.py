"""Nearest-pixel warps as moves of whole rows and columns, for TPUs.

A rotation is three shears: of rows, then columns, then rows (Paeth, Graphics Interface 1986). Moved
by whole pixels, they permute the image and leave each pixel next to where a nearest-pixel warp puts
it. Each pixel of the result then picks one of its neighbors; which one is a constant of the
program, as are the arguments of the operations. The other warps are a single move. The result
equals the warp pixel by pixel, whatever its rounding.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Indices of rows or columns [lines] -> int [lines]: line i shows at position q what was at
# q + distance.
Distances = Callable[[np.ndarray], np.ndarray]


class Digit(NamedTuple):
    """One mixed-radix digit of the distances: it moves line i by unit * of_line[i].

    Attributes:
      unit, base: of_line is in [0, base).
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
      axis: the axis that they move along.
      padding: pixels added before and after along `axis` before the move; negative: cut off.
      length: size of the result along `axis`.
      digits: their sum is the distance.
    """

    axis: int
    padding: tuple[int, int]
    length: int
    digits: tuple[Digit, ...]


class Plan(NamedTuple):
    """A warp of images [H, W].

    Attributes:
      half_turn: whether to rotate the image by 180 degrees first.
      steps: the moves that follow, in order.
      offsets: (rows, columns) from a pixel to the neighbors that it may pick.
      codes: uint8 [H, W], index of the neighbor in `offsets`; len(offsets): the fill. None if
        every pixel is already in position.
    """

    half_turn: bool
    steps: tuple[Step, ...]
    offsets: tuple[tuple[int, int], ...]
    codes: np.ndarray | None


def plan_axis(axis: int, sources: np.ndarray) -> Plan:
    """Returns the plan of a warp that moves pixels along one axis.

    Args:
      axis: 0 or 1.
      sources: int [2, H, W], the row and column that each pixel shows; the fill if outside.
    """
    moved = sources[axis] - np.indices(sources.shape[1:])[axis]
    by_line = np.median(moved, axis).astype(int)  # The median, as rounding moves some by one more.
    return _plan(False, [(axis, lambda lines: by_line[lines.clip(0, len(by_line) - 1)])], sources)


def plan_rotation(degrees: float, sources: np.ndarray) -> Plan:
    """Returns the plan of a counterclockwise rotation around the center; see `plan_axis`."""
    height, width = sources.shape[1:]
    angle = math.radians((degrees + 180) % 360 - 180)
    half_turn = abs(angle) > math.pi / 2  # The shears of a larger angle would be steep.
    if half_turn:
        angle -= math.copysign(math.pi, angle)
        sources = np.reshape([height - 1, width - 1], (2, 1, 1)) - sources

    def rows(lines):
        return np.rint(-math.tan(angle / 2) * (lines + 0.5 - height / 2)).astype(int)

    def columns(lines):
        return np.rint(math.sin(angle) * (lines + 0.5 - width / 2)).astype(int)

    return _plan(half_turn, [(1, rows), (0, columns), (1, rows)], sources)


def _plan(half_turn: bool, moves: list[tuple[int, Distances]], sources: np.ndarray) -> Plan:
    size = sources.shape[1:]
    inside = ((sources >= 0) & (sources < np.reshape(size, (2, 1, 1)))).all(0)
    landed = list(sources)  # Where the moves take the source of each pixel.
    for axis, distances in moves:
        landed[axis] = landed[axis] - distances(landed[1 - axis])
    apart = np.subtract(landed, np.indices(size))
    offsets, places = np.unique(apart[:, inside].T, axis=0, return_inverse=True)
    codes = np.full(size, len(offsets), np.uint8)
    codes[inside] = places.ravel()

    reach = [int(axis) for axis in np.abs(offsets).max(axis=0, initial=0)]
    # The range along each axis that is needed: of the result, then of the input of each move.
    window = [(-ends, length + ends) for ends, length in zip(reach, size, strict=True)]
    steps = []
    for i, (axis, distances) in reversed(list(enumerate(moves))):
        earlier = {axis for axis, _ in moves[:i]}
        # Before the first move along the other axis, the lines are those of the image.
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
        half_turn,
        tuple(reversed(steps)),
        tuple((int(row) + reach[0], int(column) + reach[1]) for row, column in offsets),
        codes if apart.any() else None,
    )


def _digits(axis: int, distances: np.ndarray) -> tuple[Digit, ...]:
    """Returns distances >= 0 as digits, with the bases that are fastest on a TPU."""
    count = int(distances.max()) + 1
    if count == 1:
        return ()
    # Cycles of a digit on a v5e, fixed and per unit of its base: columns cost half as much.
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
    return tuple(reversed(digits))  # The largest first leaves the least to move.


def warp(plan: Plan, image: jax.Array, fill: int) -> jax.Array:
    """Returns the warped image, int32 [H, W], with `fill` where the source is outside."""
    size = image.shape
    if plan.half_turn:
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
