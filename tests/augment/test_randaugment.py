import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax.augment import randaugment
from nfnets_jax.augment.operations import OPERATIONS, Operation
from nfnets_jax.augment.randaugment import published_operation
from nfnets_jax.augment.recipe import example_keys

N = 64


def keys(count=N):
    return jax.jit(example_keys)(0, 0, jnp.arange(count))


# The values that the authors' functions give at these levels.
PUBLISHED = {
    'AutoContrast': (0, 0, 0),
    'Equalize': (0, 0, 0),
    'Invert': (0, 0, 0),
    'Rotate': (9, 30, 45),
    'Posterize': (1, 4, 6),
    'Solarize': (76, 256, 384),
    'SolarizeAdd': (33, 110, 165),
    'Color': (0.64, 1.9, 2.8),
    'Contrast': (0.64, 1.9, 2.8),
    'Brightness': (0.64, 1.9, 2.8),
    'Sharpness': (0.64, 1.9, 2.8),
    'ShearX': (0.09, 0.3, 0.45),
    'ShearY': (0.09, 0.3, 0.45),
    'TranslateX': (30, 100, 150),
    'TranslateY': (30, 100, 150),
    'Cutout': (12, 40, 60),
}


def test_magnitudes_are_the_published_ones():
    assert set(PUBLISHED) == set(OPERATIONS)
    for name, arguments in PUBLISHED.items():
        for level, argument in zip((3, 10, 15), arguments, strict=True):
            found = published_operation(name, level, translate=100, cutout=40)
            assert found.name == name
            np.testing.assert_allclose(found.argument, argument, rtol=1e-9)
    assert published_operation('Posterize', 0, translate=1, cutout=1) == ('Posterize', 1)
    assert published_operation('Posterize', 30, translate=1, cutout=1) == ('Posterize', 8)


@pytest.fixture
def record(monkeypatch):
    """A function that notes what an augmentation gives to `apply_operations`.

    It returns the operations, and those that are drawn (choice, sign, center) by layer.
    """

    def run(augmentation, keys, size):
        noted = []

        def note(images, operations, *drawn):
            noted.append(operations)
            return drawn

        monkeypatch.setattr(randaugment, 'apply_operations', note)
        images = np.broadcast_to(np.uint8(0), (len(keys), *size, 3))
        drawn = jax.device_get(jax.jit(lambda keys: augmentation(keys, images))(keys))
        (operations,) = noted
        layers = zip(*(np.moveaxis(x, 1, 0) for x in drawn), strict=True)
        return operations, list(layers)

    return run


def test_randaugment_draws_evenly_and_anew_in_every_layer(record):
    of_three = functools.partial(randaugment.randaugment, layers=3, magnitude=10)
    operations, layers = record(of_three, keys(count=4096), (200, 240))
    assert len(layers) == 3
    assert Operation('TranslateX', 100) in operations
    assert Operation('Cutout', 40) in operations
    choices = np.stack([choice for choice, _, _ in layers])
    for choice in choices:
        shares = np.bincount(choice, minlength=16) / 4096
        np.testing.assert_allclose(shares, 1 / 16, atol=0.012)
    assert abs((choices[0] == choices[1]).mean() - 1 / 16) < 0.015
    for choice, sign, centre in layers:
        assert abs(np.mean(sign)) < 0.05
        assert set(np.unique(sign)) == {-1.0, 1.0}
        assert abs(np.corrcoef(sign, choice)[0, 1]) < 0.05
        assert (np.asarray(centre).min(0) >= 0).all()
        assert np.asarray(centre).max(0).tolist() == [199, 239]


def test_pixels_shrink_with_small_pictures(monkeypatch):
    seen = []

    def note(images, operations, *_):
        seen.append(dict(operations))
        return images

    monkeypatch.setattr(randaugment, 'apply_operations', note)
    for size in (24, 192, 480):
        images = jax.ShapeDtypeStruct((N, size, size, 3), np.uint8)
        jax.eval_shape(lambda keys, x: randaugment.randaugment(keys, x, 1, 10), keys(), images)
    np.testing.assert_allclose([each['TranslateX'] for each in seen], [12.5, 100, 100])
    assert [each['Cutout'] for each in seen] == [5, 40, 40]


def test_the_policy_is_as_published():
    """Compared with policy_v0 of the authors' autoaugment.py line by line; this is its checksum."""
    assert len(randaugment._POLICY_V0) == 25
    assert zlib.crc32(repr(randaugment._POLICY_V0).encode()) == 3292130283


def test_autoaugment_follows_its_policy(record):
    count = 5_000
    operations, layers = record(randaugment.autoaugment, keys(count=count), (192, 192))
    (first, _, _), (second, _, _) = layers
    pair = np.where(first >= 0, first // 2, np.where(second >= 0, second // 2, -1))
    both = (first >= 0) & (second >= 0)
    np.testing.assert_array_equal(first[both] // 2, second[both] // 2)
    assert (first[first >= 0] % 2 == 0).all()
    assert (second[second >= 0] % 2 == 1).all()
    frequency = np.bincount(first[first >= 0], minlength=50)[::2] / count * 25
    expected = [p for (_, p, _), _ in randaugment._POLICY_V0]
    np.testing.assert_allclose(frequency, expected, atol=0.2)
    frequency = np.bincount(second[second >= 0], minlength=50)[1::2] / count * 25
    np.testing.assert_allclose(frequency, [p for _, (_, p, _) in randaugment._POLICY_V0], atol=0.2)
    assert operations[1] == ('ShearY', pytest.approx(0.12))
    assert operations[31] == ('TranslateY', 225)
    assert len(np.unique(pair)) >= 25
