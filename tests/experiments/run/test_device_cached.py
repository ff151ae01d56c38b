import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.run import device_cached, parallel
from experiments.run.device_cached import DeviceCachedBatches, take
from nfnets_jax.data.pipeline import UnreadableExamples, train_batches
from nfnets_jax.data.preprocessing import ImageError
from nfnets_jax.data.sources import ArraySource
from nfnets_jax.errors import UsageError

SIZE = 50


@pytest.fixture(scope='module')
def source():
    images = np.random.default_rng(0).integers(0, 256, (SIZE, 2, 3, 3), dtype=np.uint8)
    return ArraySource(images, np.arange(SIZE))


def batches_of(source, steps, batch_size=12, **options):
    """Returns what the training steps of a run see, all devices together."""
    gathered = parallel.parallelize(
        lambda step, batch: jax.lax.all_gather(
            take(batch, step, batch_size), parallel.AXIS, tiled=True
        )
    )
    batches = DeviceCachedBatches(source, batch_size=batch_size, start_step=steps[0], **options)
    return [
        jax.device_get(gathered(parallel.replicate(jnp.int32(step)), next(batches)))
        for step in steps
    ]


def assert_same(found, source, steps, batch_size=12, **options):
    stream = train_batches(source, batch_size=batch_size, start_step=steps[0], **options)
    for batch in found:
        np.testing.assert_array_equal(batch.pop('position'), np.arange(batch_size))
        chex.assert_trees_all_equal(batch, next(stream))


@pytest.mark.parametrize('steps', [range(10), range(7, 12)])
def test_batches_are_those_of_the_host(source, steps):
    """Over the ends of epochs (50 is no multiple of 12), and resumed in the middle of one."""
    assert_same(batches_of(source, steps, seed=3), source, steps, seed=3)


def test_a_transform_is_applied_once(source):
    options = {'seed': 3, 'transform': lambda image, rng: image[:1]}
    assert_same(batches_of(source, range(2), **options), source, range(2), **options)


def test_a_run_may_see_more_than_four_billion_examples(source):
    start = 2**32 // 12 - 1
    steps = range(start, start + 4)
    assert_same(batches_of(source, steps, seed=3), source, steps, seed=3)


def test_skipped_examples_are_replaced_as_on_the_host(source):
    def fail(image, rng):
        if any((image == source.images[i]).all() for i in (7, 20, 21)):
            raise ImageError('bad')
        return image

    bad = UnreadableExamples(3)
    found = batches_of(source, range(10), seed=3, transform=fail, bad=bad)
    assert len(bad) == 3
    assert not set(np.concatenate([batch['label'] for batch in found])) & {7, 20, 21}
    assert_same(found, source, range(10), seed=3, transform=fail, bad=UnreadableExamples(3))
    with pytest.raises(UsageError, match='bad'):
        DeviceCachedBatches(source, batch_size=12, seed=3, transform=fail)


def test_within_an_epoch_nothing_is_done(source):
    batches = DeviceCachedBatches(source, batch_size=12, seed=0)
    first, second, third, fourth, fifth, sixth = (next(batches) for _ in range(6))
    assert first is second is third is fourth is fifth
    assert sixth is not fifth
    assert sixth['image'] is fifth['image']
    assert batches.wait_seconds == 0


def test_large_data_are_refused(source, monkeypatch):
    monkeypatch.setattr(device_cached, 'MAX_BYTES', 800)
    with pytest.raises(UsageError, match=r'data\.on_device=True: arrays has more'):
        DeviceCachedBatches(source, batch_size=12, seed=0)
