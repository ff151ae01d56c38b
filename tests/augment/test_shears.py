import jax
import numpy as np
import pytest

from nfnets_jax.augment import shears
from nfnets_jax.augment.definitions import Operation, warp_sources

FILL = -1
SIGNS = (1, -1)


def gathered(image, sources):
    """The warp as NumPy's index makes it."""
    row, column = sources
    height, width = image.shape
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return np.where(inside, image[row.clip(0, height - 1), column.clip(0, width - 1)], FILL)


def assert_gathered(image, plans, sources):
    """Both signs are warped by one program, which compiles sooner than two."""
    warp = jax.jit(lambda image: [shears.warp(plan, image, FILL) for plan in plans])
    for warped, each in zip(warp(image), sources, strict=True):
        np.testing.assert_array_equal(warped, gathered(image, each))


@pytest.mark.parametrize('size', [(40, 64), (33, 20), (1, 5), (3, 3)])
@pytest.mark.parametrize('degrees', [0, 4.5, 15, 30, 45, 77, 90, 91, 135, 180, 270, 333])
def test_a_rotation_is_three_shears_and_a_choice_among_neighbors(degrees, size):
    image = np.arange(np.prod(size), dtype=np.int32).reshape(size)
    sources = [warp_sources(Operation('Rotate', degrees), size, sign) for sign in SIGNS]
    plans = [
        shears.plan_rotation(sign * degrees, x) for sign, x in zip(SIGNS, sources, strict=True)
    ]
    for plan in plans:
        assert len(plan.offsets) <= 9
        assert np.ptp(np.reshape(plan.offsets, (-1, 2)), axis=0).max(initial=0) <= 2
    assert_gathered(image, plans, sources)


@pytest.mark.parametrize(
    'operation',
    [
        ('ShearX', 0.15),
        ('ShearX', 0.6),  # where two pixels are equally near, in some rows
        ('ShearY', 0.6),
        ('ShearY', 0.9),
        ('TranslateX', 12.5),
        ('TranslateX', 100),  # out of sight
        ('TranslateY', 7.3),
    ],
)
def test_moves_along_an_axis(operation):
    size = (48, 61)
    image = np.arange(np.prod(size), dtype=np.int32).reshape(size)
    sources = [warp_sources(Operation(*operation), size, sign) for sign in SIGNS]
    axis = 0 if operation[0].endswith('Y') else 1
    assert_gathered(image, [shears.plan_axis(axis, x) for x in sources], sources)


def test_digits_reach_every_distance():
    for count in (1, 2, 3, 10, 65, 200, 1000):
        for axis in (0, 1):
            digits = shears._digits(axis, np.arange(count))
            sums = sum((digit.unit * digit.of_line for digit in digits), np.zeros(count, int))
            np.testing.assert_array_equal(sums, np.arange(count))
            assert all(digit.of_line.max() < digit.base for digit in digits)
