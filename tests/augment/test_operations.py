import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from nfnets_jax.augment import packed_images
from nfnets_jax.augment.operations import (
    OPERATIONS,
    WARPS,
    Operation,
    apply_operations,
    grouped,
)
from nfnets_jax.augment.randaugment import published_operation

LEVELS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20, 30)
CENTER = (7, 40)


@pytest.fixture(scope='module')
def originals():
    """Two photographs, in full and in half contrast, and what tables and histograms stumble on."""
    photographs = [
        np.asarray(Image.fromarray(image).resize((61, 48))) for image in load_sample_images().images
    ]
    flat = np.full((48, 61, 3), 200, np.uint8)
    two_values = np.where(np.arange(61)[:, None] < 30, 3, 250) + np.zeros_like(flat)
    neighbors = np.clip(two_values, 100, 101)
    noise = np.random.default_rng(0).integers(20, 193, flat.shape)
    dim = [image // 2 + 40 for image in photographs]
    return np.stack([*photographs, *dim, flat, two_values, neighbors, noise]).astype(np.uint8)


def with_pillow(operation, image, sign):
    name, argument = operation
    image = Image.fromarray(image)
    bands = len(image.getbands())
    fill = (128,) * bands
    if name == 'Rotate':
        return image.rotate(sign * argument, fillcolor=fill)
    if name in WARPS:
        matrix = [1, 0, 0, 0, 1, 0]
        matrix[{'ShearX': 1, 'TranslateX': 2, 'ShearY': 3, 'TranslateY': 5}[name]] = sign * argument
        return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=fill)
    if name == 'SolarizeAdd':
        return image.point([min(v + argument, 255) if v < 128 else v for v in range(256)] * bands)
    if name == 'Cutout':
        box = [c + s * argument for s in (-1, 1) for c in reversed(CENTER)]
        box = [min(max(x, 0), limit) for x, limit in zip(box, 2 * image.size, strict=True)]
        if box[0] < box[2] and box[1] < box[3]:
            image.paste(fill, box)
        return image
    if name in ('Posterize', 'Solarize'):
        return getattr(ImageOps, name.lower())(image, argument)
    if name in ('AutoContrast', 'Equalize', 'Invert'):
        return getattr(ImageOps, name.lower())(image)
    return getattr(ImageEnhance, name)(image).enhance(argument)


def is_tie(shear, size):
    return np.isclose((np.arange(size) + 0.5) * shear % 1, 0.5)


# Every level of one implementation, a few of the other, which compiles a program for each of them.
@pytest.fixture(
    scope='module',
    params=[(grouped, LEVELS), (packed_images.apply_operations, (5, 10, 30))],
    ids=['grouped', 'packed'],
)
def distorted(originals, request):
    """(levels, cases): operation, sign, images of every operation, all from one batch."""
    form, levels = request.param
    operations = [
        published_operation(name, level, translate=40, cutout=16)
        for name in OPERATIONS
        for level in levels
    ]
    choice = np.repeat(np.arange(len(operations)), 2 * len(originals))
    sign = np.tile(np.repeat([1.0, -1.0], len(originals)), len(operations)).astype(np.float32)
    images = np.tile(originals, (2 * len(operations), 1, 1, 1))
    center = np.tile(CENTER, (len(images), 1))
    apply = jax.jit(lambda images, *drawn: form(operations, images, *drawn))
    out = apply(images, choice[:, None], sign[:, None], center[:, None])
    out = np.asarray(out).reshape(len(operations), 2, *originals.shape)
    return levels, [
        (operation, sign, signed)
        for operation, both in zip(operations, out, strict=True)
        for sign, signed in zip((1, -1), both, strict=True)
    ]


@pytest.mark.parametrize('name', OPERATIONS)
def test_operations_agree_with_pillow_at_every_magnitude(originals, distorted, name):
    levels, cases = distorted
    chosen = [case for case in cases if case[0].name == name]
    assert len(chosen) == 2 * len(levels)
    for operation, sign, found in chosen:
        expected = np.stack([with_pillow(operation, image, sign) for image in originals])
        if name not in WARPS:
            np.testing.assert_array_equal(found, expected, str(operation))
            continue
        differs = (found != expected).any(-1)
        if name == 'ShearX':  # where two pixels are equally near, either may be taken
            differs = differs[:, ~is_tie(operation.argument, 48), :]
        if name == 'ShearY':
            differs = differs[:, :, ~is_tie(operation.argument, 61)]
        assert differs.mean() < 0.002, operation


@pytest.fixture(scope='module')
def distorted_gray(originals):
    """{operation: the originals' green channel after it}, all from one batch."""
    gray = originals[..., 1]
    operations = [published_operation(name, 10, translate=40, cutout=16) for name in OPERATIONS]
    count = len(operations) * len(gray)
    choice = np.repeat(np.arange(len(operations)), len(gray))
    sign, center = np.ones(count, np.float32), np.tile(CENTER, (count, 1))
    apply = jax.jit(lambda images: apply_operations(images, operations, choice, sign, center))
    found = np.asarray(apply(np.tile(gray, (len(operations), 1, 1))[..., None]))
    return dict(zip(operations, found.reshape(-1, *gray.shape, 1), strict=True))


@pytest.mark.parametrize('name', OPERATIONS)
def test_operations_on_one_channel_are_pillows_on_gray(originals, distorted_gray, name):
    gray = originals[..., 1]
    operation = published_operation(name, 10, translate=40, cutout=16)
    found = distorted_gray[operation]
    expected = np.stack([with_pillow(operation, image, 1) for image in gray])
    assert found.shape == (*gray.shape, 1)
    assert np.mean(found[..., 0] != expected) < (0.002 if name in WARPS else 1e-9), operation


def test_warps_and_masks_move_all_channels_alike(originals):
    operations = [published_operation(n, 10, translate=40, cutout=16) for n in (*WARPS, 'Cutout')]
    rng = np.random.default_rng(0)
    bands = rng.integers(0, 256, (len(operations), 20, 24, 5)).astype(np.uint8)
    drawn = (
        np.arange(len(operations)),
        rng.choice([-1.0, 1.0], len(operations)).astype(np.float32),
        rng.integers(0, 20, (len(operations), 2)),
    )
    apply = jax.jit(lambda images: apply_operations(images, operations, *drawn))
    found = np.asarray(apply(bands))
    for channel in range(5):
        alone = np.repeat(bands[..., channel : channel + 1], 3, axis=-1)
        np.testing.assert_array_equal(found[..., channel], np.asarray(apply(alone))[..., 0])


@pytest.mark.parametrize(
    'size', [pytest.param((192, 192), marks=pytest.mark.slow), (48, 61), (2, 9)]
)
def test_both_implementations_are_equal(size):
    """To the last bit, warps too, several operations in a row, more than one number holds."""
    rng = np.random.default_rng(2)
    levels = (5, 15) if size == (48, 61) else (10,)
    operations = [
        published_operation(name, level, translate=40, cutout=16)
        for level in levels
        for name in OPERATIONS
    ]
    count, layers = (12, 7) if size == (192, 192) else (48, 7)
    images = rng.integers(0, 256, (count, *size, 3)).astype(np.uint8)
    images[::3] = images[::3] // 2 + 40
    choice = rng.integers(-1, len(operations), (count, layers))
    sign = rng.choice([-1.0, 1.0], (count, layers)).astype(np.float32)
    center = rng.integers(-3, 70, (count, layers, 2))
    expected, found = (
        jax.jit(lambda *a, form=form: form(operations, *a))(images, choice, sign, center)
        for form in (grouped, packed_images.apply_operations)
    )
    np.testing.assert_array_equal(found, expected)


COUNT = 41


@jax.jit
def at_level_7(images, *drawn):
    operations = [published_operation(name, 7, translate=40, cutout=16) for name in OPERATIONS]
    return apply_operations(images, operations, *drawn)


def test_operations_in_a_row(originals):
    rng = np.random.default_rng(3)
    images = originals[rng.integers(len(originals), size=COUNT)]
    drawn = (
        rng.integers(-1, 16, (COUNT, 3)),
        np.ones((COUNT, 3), np.float32),
        rng.integers(0, 48, (COUNT, 3, 2)),
    )
    together = at_level_7(images, *drawn)
    for layer in range(3):
        images = at_level_7(images, *(x[:, layer : layer + 1] for x in drawn))
    np.testing.assert_array_equal(together, images)


def test_every_image_gets_its_own_operation(originals):
    """Any mixture of them, in any number, is what each would be alone."""
    rng = np.random.default_rng(1)
    images = originals[rng.integers(len(originals), size=COUNT)]
    choice = rng.integers(-1, len(OPERATIONS), size=(COUNT, 1))
    sign = rng.choice([-1.0, 1.0], (COUNT, 1)).astype(np.float32)
    drawn = images, choice, sign, rng.integers(0, 48, (COUNT, 1, 2))
    whole = np.asarray(at_level_7(*drawn))
    for i in range(0, COUNT, 6):
        alone = at_level_7(*(np.repeat(x[i : i + 1], COUNT, axis=0) for x in drawn))
        np.testing.assert_array_equal(whole[i], np.asarray(alone)[0])
    rests = choice[:, 0] == -1
    np.testing.assert_array_equal(whole[rests], images[rests])


@jax.jit
def invert(images, choice):
    sign, center = np.ones(5, np.float32), np.zeros((5, 2), int)
    return apply_operations(images, [Operation('Invert')], choice, sign, center)


@pytest.mark.parametrize('count', [0, 1, 5])
def test_where_few_or_none_need_it(originals, count):
    images = originals[:5]
    choice = np.full(5, -1)
    choice[:count] = 0
    out = np.asarray(invert(images, choice))
    np.testing.assert_array_equal(out[:count], 255 - images[:count])
    np.testing.assert_array_equal(out[count:], images[count:])


@pytest.mark.parametrize('size', [(1, 1), (2, 9)])
def test_tiny_images(size):
    images = np.random.default_rng(0).integers(0, 256, (16, *size, 3), dtype=np.uint8)
    operations = [published_operation(name, 3, translate=2, cutout=4) for name in OPERATIONS]
    drawn = np.arange(16), np.ones(16, np.float32), np.tile(CENTER, (16, 1))
    out = jax.jit(lambda images: apply_operations(images, operations, *drawn))(images)
    chex.assert_shape(out, images.shape)
    assert out.dtype == jnp.uint8
    for image, operation, found in zip(images, operations, np.asarray(out), strict=True):
        if operation.name not in WARPS:
            np.testing.assert_array_equal(found, with_pillow(operation, image, 1), str(operation))


def test_no_dtype_is_promoted_implicitly(originals):
    operations = [published_operation(name, 7, translate=40, cutout=16) for name in OPERATIONS]
    drawn = (
        jax.ShapeDtypeStruct((2, 3), np.int32),
        jax.ShapeDtypeStruct((2, 3), np.float32),
        jax.ShapeDtypeStruct((2, 3, 2), np.int32),
    )
    images = jax.ShapeDtypeStruct((2, *originals.shape[1:]), np.uint8)
    with jax.numpy_dtype_promotion('strict'):
        for form in (grouped, packed_images.apply_operations):
            out = jax.eval_shape(lambda *a, form=form: form(operations, *a), images, *drawn)
            assert (out.shape, out.dtype) == (images.shape, np.uint8)


def test_division_without_dividing():
    numerator = np.arange(2 * 13 * 255 + 14)
    np.testing.assert_array_equal(packed_images.divide_by_26(numerator), numerator // 26)
