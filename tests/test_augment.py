import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax import augment
from nfnets_jax.errors import UsageError

N, SIZE = 64, 8


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(0).integers(1, 256, (N, SIZE, SIZE, 3), dtype=np.uint8)


def keys(step=0, seed=0, positions=range(N)):
    return augment.example_keys(seed, step, jnp.asarray(positions))


def test_keys_depend_on_seed_step_and_position():
    variants = [keys(), keys(step=1), keys(seed=1), keys(positions=range(N, 2 * N))]
    data = np.concatenate([jax.random.key_data(variant) for variant in variants])
    assert len(np.unique(data, axis=0)) == 4 * N


def test_flip_mirrors_about_half(images):
    flipped = np.asarray(augment.random_flip(keys(), images))
    is_flipped = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    is_kept = (flipped == images).all((1, 2, 3))
    np.testing.assert_array_equal(is_flipped, ~is_kept)
    assert 0.3 < is_flipped.mean() < 0.7


@pytest.mark.parametrize('fill', ['constant', 'edge', 'reflect'])
def test_shift_crop_is_a_crop_of_the_padded_image(images, fill):
    shift = 2
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode=fill)
    shifted = np.asarray(augment.random_shift_crop(keys(), images, shift, fill))
    offsets = set()
    for whole, crop in zip(padded, shifted, strict=True):
        found = [
            (top, left)
            for top in range(2 * shift + 1)
            for left in range(2 * shift + 1)
            if (whole[top : top + SIZE, left : left + SIZE] == crop).all()
        ]
        assert found
        offsets.add(found[0])
    assert len(offsets) > 15  # of 25, so both axes move, each by its own number
    assert {top for top, _ in offsets} == {left for _, left in offsets} == set(range(5))


def test_normalise_agrees_with_the_formula(images):
    expected = (images.astype(np.float64) - augment.IMAGENET_MEAN) / augment.IMAGENET_STD
    normalised = augment.normalise(images)
    assert normalised.dtype == jnp.float32
    np.testing.assert_allclose(normalised, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(augment.normalise(images.astype(np.float32)), normalised)
    half = augment.normalise(images, mean=(0, 0, 0), std=(1, 1, 1), dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.astype(jnp.uint8), images)


def test_soft_labels():
    targets = augment.soft_labels(jnp.array([2, 0]), 4, 0.1)
    np.testing.assert_allclose(targets, [[0.025, 0.025, 0.925, 0.025], [0.925] + [0.025] * 3])
    np.testing.assert_array_equal(augment.soft_labels(jnp.array([1]), 3), [[0, 1, 0]])


def test_augment_without_options_only_normalises(images):
    labels = jnp.arange(N) % 10
    out, targets = augment.make_augment({}, 10)(keys(), images, labels)
    chex.assert_trees_all_equal(out, augment.normalise(images))
    chex.assert_trees_all_equal(targets, jax.nn.one_hot(labels, 10))


def test_augment_takes_its_options(images):
    config = {'flip': True, 'shift': 2, 'shift_fill': 'edge', 'label_smoothing': 0.1}
    labels = jnp.arange(N) % 10
    out, targets = augment.make_augment(config, 10, dtype=jnp.bfloat16)(keys(), images, labels)
    chex.assert_shape(out, (N, SIZE, SIZE, 3))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(targets.max(-1), 0.91, rtol=1e-6)
    plain = augment.normalise(images, dtype=jnp.bfloat16)
    changed = (out != plain).any((1, 2, 3))
    assert changed.mean() > 0.9


def test_operations_do_not_share_random_numbers(images):
    """With shared keys every flipped picture would also be shifted alike."""
    shift_only = augment.make_augment({'shift': 1}, 10)
    both = augment.make_augment({'shift': 1, 'flip': True}, 10)
    labels = jnp.zeros(N, jnp.int32)
    shifted, _ = shift_only(keys(), images, labels)
    flipped, _ = both(keys(), images, labels)
    same = np.asarray((shifted == flipped).all((1, 2, 3)))
    offsets = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, 3))(
        jax.vmap(jax.random.fold_in, (0, None))(keys(), 1)
    )
    left = np.asarray(offsets)[:, 1]
    assert {0, 1, 2} == set(left[same]) == set(left[~same])


def test_the_number_of_devices_changes_nothing(images):
    apply = augment.make_augment({'flip': True, 'shift': 2}, 10)
    labels = jnp.arange(N, dtype=jnp.int32) % 10

    def on_shard(step, images, labels):
        first = jax.lax.axis_index('devices') * len(images)
        return apply(keys(step, positions=first + jnp.arange(len(images))), images, labels)

    whole = jax.jit(lambda step: apply(keys(step), images, labels))(jnp.int32(7))
    shards = jax.tree.map(lambda x: x.reshape(4, N // 4, *x.shape[1:]), (images, labels))
    spread = jax.pmap(on_shard, axis_name='devices', in_axes=(None, 0, 0))(jnp.int32(7), *shards)
    spread = jax.tree.map(lambda x: np.asarray(x).reshape(N, *x.shape[2:]), spread)
    chex.assert_trees_all_equal(whole, spread)


@pytest.mark.parametrize(
    ('config', 'match'),
    [
        ({'flips': True}, r"augment\.flips: .*did you mean 'flip'"),
        ({'flip': 1}, r'augment\.flip=1'),
        ({'shift': -1}, r'augment\.shift=-1'),
        ({'shift': 0.5}, r'augment\.shift=0\.5'),
        ({'shift_fill': 'reflekt'}, "did you mean 'reflect'"),
        ({'label_smoothing': 1.0}, r'augment\.label_smoothing=1\.0'),
    ],
)
def test_bad_options_are_named(config, match):
    with pytest.raises(UsageError, match=match):
        augment.make_augment(config, 10)
