import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from nfnets_jax import augment
from nfnets_jax.augment import recipe
from nfnets_jax.errors import UsageError

N, HEIGHT, WIDTH = 64, 8, 12


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(0).integers(1, 256, (N, HEIGHT, WIDTH, 3), dtype=np.uint8)


GOLDEN = pathlib.Path(__file__).parent.parent / 'golden'
ALL = range(N)
make_keys = jax.jit(augment.example_keys)


def keys(step=0, seed=0, positions=ALL):
    return make_keys(seed, step, jnp.asarray(positions))


def compiled(config, **options):
    return jax.jit(augment.make_augment(config, 10, **options))


def test_keys_depend_on_seed_step_and_position():
    variants = [keys(), keys(step=1), keys(seed=1), keys(positions=range(N, 2 * N))]
    data = np.concatenate([jax.random.key_data(variant) for variant in variants])
    assert len(np.unique(data, axis=0)) == 4 * N


def test_flip_mirrors_about_half(images):
    flipped = np.asarray(jax.jit(augment.random_flip)(keys(), images))
    is_flipped = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    is_kept = (flipped == images).all((1, 2, 3))
    np.testing.assert_array_equal(is_flipped, ~is_kept)
    assert 0.3 < is_flipped.mean() < 0.7


shift_crop = jax.jit(augment.random_shift_crop, static_argnums=(2, 3))


@pytest.mark.parametrize('fill', ['constant', 'edge', 'reflect'])
def test_shift_crop_is_a_crop_of_the_padded_image(images, fill):
    shift = 2
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode=fill)
    shifted = np.asarray(shift_crop(keys(), images, shift, fill))
    offsets = set()
    for whole, crop in zip(padded, shifted, strict=True):
        found = [
            (top, left)
            for top in range(2 * shift + 1)
            for left in range(2 * shift + 1)
            if (whole[top : top + HEIGHT, left : left + WIDTH] == crop).all()
        ]
        assert found
        offsets.add(found[0])
    assert len(offsets) > 15  # of 25, so both axes move, each by its own number
    assert {top for top, _ in offsets} == {left for _, left in offsets} == set(range(5))


def shares_unlike_pillows(images, degrees):
    """Rotates images; returns the share of pixels unlike Pillow's by each angle, [N, angles]."""
    rotate = jax.jit(augment.random_rotation, static_argnums=2)
    rotated = np.asarray(rotate(keys(positions=range(len(images))), images, degrees))
    angles = range(-degrees, degrees + 1)
    pillow = [
        [Image.fromarray(image).rotate(angle, fillcolor=(128,) * 3) for angle in angles]
        for image in images
    ]
    return (np.array([[*map(np.asarray, row)] for row in pillow]) != rotated[:, None]).mean(
        (2, 3, 4)
    )


def test_rotation_is_pillows_by_every_whole_degree_as_often(images):
    expected = shares_unlike_pillows(images, 2) == 0
    assert np.any(expected, axis=1).all()
    assert np.sum(expected, axis=0).min() > N / 5 / 3


def test_rotation_of_a_large_image_is_pillows_by_one_angle():
    images = np.random.default_rng(4).integers(1, 256, (200, 90, 86, 3), dtype=np.uint8)
    # Pillow rounds coordinates: 4 of 7,740 pixels are a neighbor.
    expected = shares_unlike_pillows(images, 2) < 1e-3
    assert (np.sum(expected, axis=1) == 1).all()
    assert np.sum(expected, axis=0).min() > len(images) / 5 / 2


def test_means_and_deviations_of_imagenet_are_torchvisions():
    np.testing.assert_allclose(augment.IMAGENET_MEAN, (123.675, 116.28, 103.53))
    np.testing.assert_allclose(augment.IMAGENET_STD, (58.395, 57.12, 57.375))


def test_normalise_agrees_with_the_formula(images):
    expected = (images.astype(np.float64) - augment.IMAGENET_MEAN) / augment.IMAGENET_STD
    normalised = augment.normalize(images)
    assert normalised.dtype == jnp.float32
    np.testing.assert_allclose(normalised, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(augment.normalize(images.astype(np.float32)), normalised)
    half = augment.normalize(images, mean=(0, 0, 0), std=(1, 1, 1), dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.astype(jnp.uint8), images)


def test_soft_labels():
    targets = augment.soft_labels(jnp.array([2, 0]), 4, 0.1)
    np.testing.assert_allclose(targets, [[0.025, 0.025, 0.925, 0.025], [0.925] + [0.025] * 3])
    np.testing.assert_array_equal(augment.soft_labels(jnp.array([1]), 3), [[0, 1, 0]])


def test_soft_labels_of_several_for_an_image():
    """Each class is one of two: smoothing moves 1 and 0 towards the middle."""
    labels = np.array([[1, 1, 0], [0, 0, 0]], np.uint8)
    targets = augment.soft_labels(jnp.asarray(labels), 3, 0.1)
    assert targets.dtype == jnp.float32
    np.testing.assert_allclose(targets, [[0.95, 0.95, 0.05], [0.05] * 3], rtol=1e-6)
    np.testing.assert_array_equal(augment.soft_labels(jnp.asarray(labels), 3), labels)


# What is published, and what shares its code.
PAIRS = pytest.mark.parametrize(
    'pairs', [pytest.param('batch', marks=pytest.mark.slow), 'distinct']
)


@PAIRS
def test_several_labels_are_mixed_like_one(pairs, images):
    """The targets of unions of two one-hot labels are the sums of their targets."""
    config = {'cutmix': 1.0, 'mix_pairs': pairs}
    apply = jax.jit(augment.make_augment(config, 6))
    one, other = np.arange(N) % 3, 3 + np.arange(N) % 2
    several = np.eye(6, dtype=np.uint8)[one] + np.eye(6, dtype=np.uint8)[other]
    (mixed, targets), (_, of_one), (_, of_other) = (
        jax.device_get(apply(keys(), images, labels)) for labels in (several, one, other)
    )
    np.testing.assert_allclose(targets, of_one + of_other, rtol=1e-6)
    assert len(mixed) == len(targets)


def test_augment_without_options_only_normalises(images):
    labels = jnp.arange(N) % 10
    out, targets = augment.make_augment({}, 10)(keys(), images, labels)
    chex.assert_trees_all_equal(out, augment.normalize(images))
    chex.assert_trees_all_equal(targets, jax.nn.one_hot(labels, 10))


def test_augment_takes_its_options(images):
    config = {'flip': True, 'shift': 2, 'shift_fill': 'edge', 'label_smoothing': 0.1}
    labels = jnp.arange(N) % 10
    out, targets = compiled(config, dtype=jnp.bfloat16)(keys(), images, labels)
    chex.assert_shape(out, (N, HEIGHT, WIDTH, 3))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(targets.max(-1), 0.91, rtol=1e-6)
    plain = augment.normalize(images, dtype=jnp.bfloat16)
    changed = (np.asarray(out) != np.asarray(plain)).any((1, 2, 3))
    assert changed.mean() > 0.9


def test_operations_do_not_share_random_numbers(images):
    """With shared keys every flipped picture would also be shifted alike."""
    shift_only = compiled({'shift': 1})
    both = compiled({'shift': 1, 'flip': True})
    labels = jnp.zeros(N, jnp.int32)
    shifted, flipped = (np.asarray(f(keys(), images, labels)[0]) for f in (shift_only, both))
    same = (shifted == flipped).all((1, 2, 3))
    draw = jax.vmap(lambda key: jax.random.randint(jax.random.fold_in(key, 1), (2,), 0, 3))
    offsets = jax.jit(draw)(keys())
    left = np.asarray(offsets)[:, 1]
    assert {0, 1, 2} == set(left[same]) == set(left[~same])


@pytest.mark.parametrize(
    ('config', 'match'),
    [
        ({'flips': True}, r"unknown key augment\.flips \(did you mean 'flip'"),
        ({'flip': 1}, r'augment\.flip=1'),
        ({'shift': -1}, r'augment\.shift=-1'),
        ({'shift': 0.5}, r'augment\.shift=0\.5'),
        ({'shift_fill': 'reflekt'}, "did you mean 'reflect'"),
        ({'rotation': 181}, r'augment\.rotation=181'),
        ({'label_smoothing': 1.0}, r'augment\.label_smoothing=1\.0'),
        ({'mixup': -0.2}, r'augment\.mixup=-0\.2'),
        ({'cutmix': True}, r'augment\.cutmix=True'),
        ({'mix_pairs': 'distnct'}, r"augment\.mix_pairs='distnct' is unknown .*'distinct'"),
        ({'mix_first': 0}, r'augment\.mix_first=0'),
        ({'randaugment_layers': 1.5}, r'augment\.randaugment_layers=1\.5'),
        ({'randaugment_magnitude': float('nan')}, r'augment\.randaugment_magnitude=nan'),
        ({'erasing': 1.5}, r'augment\.erasing=1\.5'),
        ({'autoaugment': True, 'randaugment_layers': 2}, 'augment.randaugment_layers=0'),
    ],
)
def test_bad_options_are_named(config, match):
    with pytest.raises(UsageError, match=match):
        augment.make_augment(config, 10)


labels = np.arange(N) * 7 % 10


def one_hot(x):
    return np.eye(10, dtype=np.float32)[x]


mix = jax.jit(augment.mix_neighbours, static_argnums=(3, 4))


def mixed(images, mixup, cutmix):
    """Images of one value make their own share readable, in the picture and in the target."""
    images, targets = mix(keys(), images, one_hot(labels), mixup, cutmix)
    return np.asarray(images), np.asarray(targets)


def shares(images):
    """Returns the own share of every pixel, as mixing images 0, 255, 0, 255, ... shows it."""
    own = np.where(np.arange(N) % 2, 255, 0)
    return np.where(own[:, None, None], images[..., 0] / 255, 1 - images[..., 0] / 255)


BLACK_AND_WHITE = np.zeros((N, 16, 12, 3), np.uint8)
BLACK_AND_WHITE[1::2] = 255


# Together they are what each is alone, for its half of the images.
KINDS = pytest.mark.parametrize(
    'kinds',
    [
        pytest.param((0.2, 0.0), marks=pytest.mark.slow),
        pytest.param((0.0, 1.0), marks=pytest.mark.slow),
        (0.2, 1.0),
    ],
)


@KINDS
def test_targets_are_mixed_as_the_pictures_are(kinds):
    """The slow formula: a target is one-hot labels, weighted by the pixels of each picture."""
    images, targets = mixed(BLACK_AND_WHITE, *kinds)
    own = shares(images).mean((1, 2))
    for i in range(N):
        expected = own[i] * one_hot(labels[i]) + (1 - own[i]) * one_hot(labels[i ^ 1])
        np.testing.assert_allclose(targets[i], expected, atol=1e-6)
    np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)


distinct = jax.jit(augment.mix_distinct, static_argnums=(3, 4))


@KINDS
def test_distinct_pairs_equal_numpys_mixing(kinds, images):
    """MixUp and CutMix of images 2i and 2i + 1 in float64; black and white ones show the shares."""
    shown, _ = distinct(keys(), BLACK_AND_WHITE[:, :HEIGHT, :WIDTH], one_hot(labels), *kinds)
    own = 1 - np.asarray(shown, np.float64)[..., :1] / 255
    mixed, targets = distinct(keys(), images, one_hot(labels), *kinds)
    assert (len(mixed), len(targets)) == (N // 2, N // 2)
    expected = own * images[::2].astype(np.float64) + (1 - own) * images[1::2]
    np.testing.assert_allclose(mixed, expected, atol=1e-3)
    weight = own.mean((1, 2))
    expected = weight * one_hot(labels[::2]) + (1 - weight) * one_hot(labels[1::2])
    np.testing.assert_allclose(targets, expected, atol=1e-6)
    is_box = np.isin(own, (0, 1)).all((1, 2, 3))
    assert is_box[1::2].all() == bool(kinds[1])
    assert is_box[::2].all() == (not kinds[0])


def test_distinct_pairs_are_flipped_before_and_distorted_after_mixing(images, monkeypatch):
    """Both images of a pair are flipped on their own; what is mixed is distorted once."""
    seen = []

    def record(keys, images, *_):
        seen.append((keys.shape, images.shape))
        return images

    monkeypatch.setattr(augment.randaugment, 'randaugment', record)
    config = {'flip': True, 'cutmix': 1.0, 'randaugment_layers': 1, 'mix_pairs': 'distinct'}
    out, _ = compiled(config)(keys(), images, labels)
    assert seen == [((N // 2,), (N // 2, HEIGHT, WIDTH, 3))]

    @jax.jit
    def by_hand(keys):
        flipped = augment.random_flip(recipe._own(keys, 0), images)
        mixed = augment.mix_distinct(recipe._own(keys, 2), flipped, one_hot(labels), 0.0, 1.0)
        return augment.normalize(mixed[0])

    np.testing.assert_allclose(out, by_hand(keys()), atol=1e-5)


@pytest.mark.parametrize('pairs', ['batch', 'distinct'])
def test_an_example_is_made_of_one_image_or_two(pairs):
    expected = {'batch': 1, 'distinct': 2}[pairs]
    assert augment.images_per_example({'mixup': 0.2, 'mix_pairs': pairs}) == expected
    assert augment.images_per_example({'mix_pairs': pairs}) == 1  # Without mixing there is no pair.


def test_mixing_kinds_share_the_batch():
    images, _ = mixed(BLACK_AND_WHITE, 0.2, 1.0)
    own = shares(images)
    is_box = np.isin(own, (0, 1)).all((1, 2))
    np.testing.assert_array_equal(is_box[2::4] & is_box[3::4], True)
    assert not is_box[0::4].all()
    spread = own.max((1, 2)) - own.min((1, 2))
    np.testing.assert_array_equal(spread.reshape(-1, 4)[:, :2], 0)
    assert (spread.reshape(-1, 4)[:, 2:] > 0).mean() > 0.8


def test_cutmix_pastes_one_box():
    own = shares(mixed(BLACK_AND_WHITE, 0.0, 1.0)[0])
    for picture in own:
        rows, columns = (picture == 0).any(1), (picture == 0).any(0)
        np.testing.assert_array_equal(picture == 0, np.outer(rows, columns))
        for line in (rows, columns):
            assert (np.diff(np.flatnonzero(line)) == 1).all()


def test_weights_follow_their_distributions():
    images = np.zeros((4096, 8, 8, 3), np.uint8)
    many = keys(positions=range(4096))
    targets = np.eye(2, dtype=np.float32)[np.arange(4096) % 2]
    for alpha, variance in ((0.2, 0.25 / 1.4), (1.0, 1 / 12)):
        _, mixed_targets = mix(many, images, targets, alpha, 0.0)
        own = (np.asarray(mixed_targets) * targets).sum(-1)
        np.testing.assert_allclose(own.mean(), 0.5, atol=0.03)
        np.testing.assert_allclose(own.var(), variance, rtol=0.06)
        assert abs(np.corrcoef(own[::2], own[1::2])[0, 1]) < 0.06  # each draws its own


@pytest.mark.parametrize(('kinds', 'count'), [((0.2, 1.0), 6), ((0.2, 0.0), 5), ((0.0, 1.0), 3)])
def test_mixing_needs_whole_groups(kinds, count):
    with pytest.raises(UsageError, match=f'not {count}'):
        augment.mix_neighbours(
            keys(positions=range(count)), BLACK_AND_WHITE[:count], one_hot(labels[:count]), *kinds
        )


def test_smoothed_and_mixed_targets_are_exact():
    apply = compiled({'mixup': 1.0, 'cutmix': 1.0, 'label_smoothing': 0.1})
    images, targets = apply(keys(), BLACK_AND_WHITE, labels)
    own = shares(np.asarray(images) * augment.IMAGENET_STD + augment.IMAGENET_MEAN).mean((1, 2))
    hard = own[:, None] * one_hot(labels) + (1 - own)[:, None] * one_hot(
        labels.reshape(-1, 2)[:, ::-1].ravel()
    )
    np.testing.assert_allclose(targets, 0.9 * hard + 0.01, atol=1e-5)
    np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)


def test_erasing_blanks_one_box_of_the_published_size():
    images = np.ones((800, 20, 30, 3), np.float32)
    erase = jax.jit(augment.random_erasing, static_argnums=2)
    erased = np.asarray(erase(keys(positions=range(800)), images, 0.5))
    blank = erased[..., 0] == 0
    assert set(np.unique(erased)) == {0, 1}
    touched = blank.any((1, 2))
    assert abs(touched.mean() - 0.5) < 0.06
    rows, columns = blank.any(2)[touched], blank.any(1)[touched]
    np.testing.assert_array_equal(blank[touched], rows[:, :, None] & columns[:, None, :])
    share = blank[touched].mean((1, 2))
    assert 0.01 < share.min() < 0.04
    assert 0.3 < share.max() <= 0.4
    assert (blank.mean(0) > 0).all()  # every place, the corners as well
    aspect = (rows.sum(1) / columns.sum(1))[share > 0.1]
    assert 0.25 < aspect.min() < 0.4
    assert 2.5 < aspect.max() < 4.5


@pytest.mark.parametrize('mix_first', [True, False])
def test_the_order_of_mixing_and_distorting(mix_first, monkeypatch):
    """Distortion is replaced by a threshold, which tells what it was given."""
    monkeypatch.setattr(
        augment.randaugment,
        'randaugment',
        lambda keys, images, *_: jnp.where(images > 127, 255, 0).astype(jnp.uint8),
    )
    config = {'mixup': 1.0, 'randaugment_layers': 1, 'mix_first': mix_first}
    grey = np.where(BLACK_AND_WHITE > 0, 160, 10).astype(np.uint8)
    images, _ = compiled(config, mean=(0, 0, 0), std=(1, 1, 1))(keys(), grey, labels)
    assert np.isin(images, (0, 255)).all() == mix_first


@pytest.fixture(scope='module')
def plain(images):
    return jax.device_get(compiled({}, dtype=jnp.bfloat16)(keys(), images, labels))


ALONE = [
    {'flip': True},
    {'shift': 2},
    {'rotation': 9},
    {'cutmix': 1.0},
    {'mixup': 1.0},
    {'label_smoothing': 0.1},
]


@pytest.mark.parametrize('config', ALONE, ids=lambda config: next(iter(config)))
def test_every_option_alone_does_something(images, plain, config):
    out = jax.device_get(compiled(config, dtype=jnp.bfloat16)(keys(), images, labels))
    chex.assert_trees_all_equal_shapes_and_dtypes(out, plain)
    chex.assert_tree_all_finite(out)
    assert (out[0] != plain[0]).any() or (out[1] != plain[1]).any()


RECIPE = {
    **{'flip': True, 'shift': 2, 'rotation': 10, 'mixup': 0.2, 'cutmix': 1.0, 'erasing': 0.5},
    'randaugment_layers': 2,
}


@functools.cache
def on_eight(mix_first=True, pairs='batch'):
    """The recipe for 8 images, which several tests use: it takes seconds to compile."""
    return compiled(RECIPE | {'mix_first': mix_first, 'mix_pairs': pairs})


def eight_by_eight(apply, keys, images, *more):
    """Applies a function of 8 images to any multiple of them."""
    parts = [
        jax.device_get(apply(*(x[i : i + 8] for x in (keys, images, *more))))
        for i in range(0, len(images), 8)
    ]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


EVERYTHING_ELSE = {
    'shift': 2,
    'rotation': 3,
    'erasing': 0.5,
    'cutmix': 1.0,
    'mix_first': False,
    'autoaugment': True,
}


@pytest.mark.parametrize(
    'make',
    [on_eight, pytest.param(lambda: compiled(EVERYTHING_ELSE), marks=pytest.mark.slow)],
    ids=['published', 'everything else'],
)
def test_examples_depend_on_their_group_of_four_alone(images, make):
    """Whatever else is in the batch: so neither on the batch's size nor on the devices."""
    square = images[:, :, :HEIGHT]
    apply = functools.partial(eight_by_eight, make())
    groups = np.random.default_rng(0).permutation(N // 4)
    order = (4 * groups[:, None] + np.arange(4)).ravel()
    whole = apply(keys(), square, labels)
    chex.assert_tree_all_finite(whole)
    chex.assert_trees_all_equal(
        apply(keys()[order], square[order], labels[order]), jax.tree.map(lambda x: x[order], whole)
    )
    assert (whole[0] != apply(keys(step=1), square, labels)[0]).any((1, 2, 3)).mean() > 0.9


@PAIRS
def test_the_number_of_devices_changes_nothing(images, pairs):
    config = {'flip': True, 'shift': 2, 'mixup': 1.0, 'cutmix': 1.0, 'mix_pairs': pairs}
    apply = augment.make_augment(config, 10)

    def on_shard(step, images, labels):
        first = jax.lax.axis_index('devices') * len(images)
        return apply(keys(step, positions=first + jnp.arange(len(images))), images, labels)

    whole = jax.jit(lambda step: apply(keys(step), images, labels))(jnp.int32(7))
    shards = jax.tree.map(lambda x: x.reshape(4, N // 4, *x.shape[1:]), (images, labels))
    spread = jax.pmap(on_shard, axis_name='devices', in_axes=(None, 0, 0))(jnp.int32(7), *shards)
    spread = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), spread)
    chex.assert_trees_all_equal(whole, spread)


def test_the_former_name_of_normalize_warns():
    with pytest.warns(DeprecationWarning, match='augment.normalise is now augment.normalize'):
        assert augment.normalise is augment.normalize
    with pytest.raises(AttributeError, match="no attribute 'normalisation'"):
        _ = augment.normalisation


@pytest.mark.slow  # tests/augment/test_operations.py compares each operation with Pillow's.
def test_every_operation_takes_images_of_one_channel(images):
    gray = images[:, :, :HEIGHT, :1]
    statistics = {'mean': augment.IMAGENET_MEAN[2:], 'std': augment.IMAGENET_STD[2:]}
    out, _ = eight_by_eight(compiled(RECIPE, **statistics), keys(), gray, labels)
    assert out.shape == gray.shape
    # Three equal channels have the same random numbers.
    color, _ = eight_by_eight(on_eight(), keys(), np.repeat(gray, 3, axis=-1), labels)
    np.testing.assert_allclose(out[..., 0], color[..., 2], atol=1e-5)


@pytest.mark.parametrize('key', ['randaugment_layers', 'autoaugment'])
def test_operations_on_colors_are_refused_for_five_channels(key):
    options = {'mean': (1,) * 5, 'std': (1,) * 5}
    with pytest.raises(UsageError, match=rf'augment.{key}=.*: is for images of 1 or 3 channels'):
        augment.make_augment({key: 1 if key == 'randaugment_layers' else True}, 4, **options)
    augment.make_augment({'rotation': 5, 'erasing': 0.1}, 4, **options)


def test_normalization_of_other_channels_follows_the_weights_of_the_stem():
    assert augment.of_channels((1, 2, 6), 3) == (1, 2, 6)
    assert augment.of_channels((1, 2, 6), 1) == (3,)
    assert augment.of_channels((1, 2, 6), 5) == (1, 2, 6, 1, 2)


@pytest.mark.parametrize(
    ('pairs', 'mix_first'),
    [
        ('batch', True),
        ('distinct', False),
        pytest.param('batch', False, marks=pytest.mark.slow),
        pytest.param('distinct', True, marks=pytest.mark.slow),
    ],
)
def test_what_is_drawn_is_what_earlier_versions_drew(mix_first, pairs):
    """A run that an earlier version began goes on with the same images."""
    images = np.random.default_rng(5).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    drawn_keys = keys(step=3, seed=2, positions=range(8))
    found = on_eight(mix_first, pairs)(drawn_keys, images, np.arange(8))
    golden = np.load(GOLDEN / 'augmentation.npz')
    for name, array in zip(('images', 'targets'), found, strict=True):
        want = golden[f'{name}-{mix_first}-{pairs}']
        np.testing.assert_allclose(array, want, rtol=0, atol=2e-3)  # They are of float16.
