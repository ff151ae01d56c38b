import functools
import itertools
import subprocess
import sys
import threading
import time

import chex
import numpy as np
import pytest
from PIL import Image

from nfnets_jax.data.pipeline import (
    Prefetch,
    UnreadableExamples,
    epoch_order,
    eval_batches,
    train_batches,
)
from nfnets_jax.data.preprocessing import ImageError, make_transform
from nfnets_jax.data.sampling import balanced_order
from nfnets_jax.data.sources import ArraySource, ImageFolder
from nfnets_jax.errors import UsageError

SIZE = 101


@pytest.fixture(scope='module')
def source():
    """A source whose labels say which example it is, and whose images agree with the labels."""
    images = np.broadcast_to(np.arange(SIZE, dtype=np.uint8)[:, None, None, None], (SIZE, 2, 2, 3))
    return ArraySource(images, np.arange(SIZE))


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def labels(batches):
    return np.concatenate([batch['label'] for batch in batches])


def add_noise(image, rng):
    return image + rng.integers(0, 100, image.shape, dtype=np.uint8)


def test_batches_have_the_promised_form(source):
    batch = next(train_batches(source, batch_size=8, seed=0))
    assert sorted(batch) == ['image', 'label']
    chex.assert_shape(batch['image'], (8, 2, 2, 3))
    assert (batch['image'].dtype, batch['label'].dtype) == (np.uint8, np.int32)
    np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['label'])


def test_every_epoch_holds_every_example_once_in_a_new_order(source):
    stream = labels(take(train_batches(source, batch_size=8, seed=0), 3 * SIZE // 8 + 1))
    epochs = stream[: 3 * SIZE].reshape(3, SIZE)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(SIZE))
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_no_epoch_of_one_seed_is_an_epoch_of_another():
    orders = {tuple(epoch_order(20, seed, epoch)) for seed in range(8) for epoch in range(8)}
    assert len(orders) == 64


def test_order_never_changes():
    """A checkpoint of today must find its place in the stream of tomorrow."""
    assert epoch_order(10, seed=0, epoch=0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert epoch_order(10, seed=7, epoch=3).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]


@pytest.mark.parametrize('transform', [None, add_noise])
@pytest.mark.parametrize('start_step', [1, 12, 13, 40])
def test_resumes_at_any_step(source, transform, start_step):
    arguments = {'batch_size': 8, 'seed': 1, 'transform': transform}
    whole = take(train_batches(source, **arguments), 45)
    resumed = take(train_batches(source, **arguments, start_step=start_step), 45 - start_step)
    chex.assert_trees_all_equal(whole[start_step:], resumed)


@pytest.mark.parametrize('num_threads', [0, 2, 5])
def test_threads_do_not_change_the_batches(source, num_threads):
    arguments = {'batch_size': 70, 'seed': 1, 'transform': add_noise}
    expected = take(train_batches(source, **arguments, num_threads=1), 5)
    found = take(train_batches(source, **arguments, num_threads=num_threads), 5)
    chex.assert_trees_all_equal(expected, found)


@pytest.mark.parametrize('start_step', [0, 3])
@pytest.mark.parametrize('process_count', [1, 2, 4])
def test_processes_share_the_same_global_batches(source, process_count, start_step):
    """So a run may be resumed by another number of processes."""
    arguments = {'batch_size': 72, 'seed': 1, 'transform': add_noise}
    whole = take(train_batches(source, **arguments), start_step + 4)[start_step:]
    arguments |= {'start_step': start_step, 'process_count': process_count}
    shares = [
        take(train_batches(source, **arguments, process_index=i), 4) for i in range(process_count)
    ]
    for step in range(4):
        parts = [share[step] for share in shares]
        joined = {key: np.concatenate([part[key] for part in parts]) for key in whole[step]}
        chex.assert_trees_all_equal(whole[step], joined)


def test_the_order_may_be_another(source):
    """A function of the epoch alone, so that every process and every resumed run has it, too."""
    order = functools.partial(balanced_order, np.arange(SIZE) < 10, 3)
    arguments = {'batch_size': 50, 'seed': 3, 'order': order}
    stream = labels(take(train_batches(source, **arguments), 6))
    np.testing.assert_array_equal(stream[:SIZE], order(0))
    np.testing.assert_array_equal(stream[SIZE : 2 * SIZE], order(1))
    arguments |= {'start_step': 3, 'process_count': 2, 'process_index': 1}
    share = labels(take(train_batches(source, **arguments), 3))
    np.testing.assert_array_equal(share.reshape(3, 25), stream.reshape(6, 50)[3:, 25:])


def test_transform_sees_new_random_numbers_in_every_epoch(source):
    epochs = [
        next(train_batches(source, batch_size=SIZE, seed=0, transform=add_noise, start_step=epoch))
        for epoch in range(2)
    ]
    first, second = (epoch['image'][np.argsort(epoch['label'])] for epoch in epochs)
    assert np.mean(first == second) < 0.05


@pytest.mark.parametrize('process_count', [1, 3])
@pytest.mark.parametrize('batch_size', [6, 48, 300])
def test_evaluation_sees_every_example_once(source, batch_size, process_count):
    shares = [
        list(
            eval_batches(
                source, batch_size=batch_size, process_index=i, process_count=process_count
            )
        )
        for i in range(process_count)
    ]
    assert len({len(share) for share in shares}) == 1
    seen = []
    for batch in itertools.chain(*shares):
        chex.assert_shape(batch['image'], (batch_size // process_count, 2, 2, 3))
        assert batch['mask'].dtype == np.float32
        np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['label'])
        seen += batch['label'][batch['mask'] == 1].tolist()
    assert sorted(seen) == list(range(SIZE))


def test_a_bad_image_stops_the_run_with_its_name(source):
    def fail_on_50(image, rng):
        if image[0, 0, 0] == 50:
            raise ImageError('not an image')
        return image

    with pytest.raises(UsageError, match=r'arrays\[50\]: not an image \(example 50\)'):
        list(eval_batches(source, batch_size=8, transform=fail_on_50))


def fail_on(*bad):
    def transform(image, rng):
        if image[0, 0, 0] in bad:
            raise ImageError('not an image')
        return image if rng is None else add_noise(image, rng)

    return transform


@pytest.mark.parametrize('num_threads', [0, 3])
def test_a_skipped_image_changes_nothing_else(source, num_threads):
    arguments = {'batch_size': 40, 'seed': 1, 'num_threads': num_threads}
    whole = take(train_batches(source, **arguments, transform=add_noise), 8)
    bad = UnreadableExamples(3)
    skipped = take(train_batches(source, **arguments, transform=fail_on(5, 6), bad=bad), 8)
    assert len(bad) == 2
    stream, expected = labels(skipped), labels(whole)
    was_bad = np.isin(expected, (5, 6))
    assert was_bad.sum() >= 4
    np.testing.assert_array_equal(stream[~was_bad], expected[~was_bad])
    images, before = (np.concatenate([b['image'] for b in bs]) for bs in (skipped, whole))
    np.testing.assert_array_equal(images[~was_bad], before[~was_bad])
    for place in np.flatnonzero(was_bad):  # the next one of that epoch that can be read
        epoch = epoch_order(SIZE, seed=1, epoch=place // SIZE)
        following = [i for i in np.roll(epoch, -(place % SIZE)) if i not in (5, 6)]
        assert stream[place] == following[0]
    resumed = take(
        train_batches(
            source, **arguments, transform=fail_on(5, 6), bad=UnreadableExamples(2), start_step=4
        ),
        4,
    )
    chex.assert_trees_all_equal(resumed, skipped[4:])


def test_one_bad_image_too_many_stops_the_run(source):
    bad = UnreadableExamples(2)
    batches = train_batches(source, batch_size=100, seed=0, transform=fail_on(5, 6, 7), bad=bad)
    with pytest.raises(UsageError, match=r'arrays\[\d\]: not an image .*; 2 others were skipped'):
        next(batches)
    assert len(bad) == 2


def test_evaluation_leaves_out_what_is_skipped(source):
    bad = UnreadableExamples(9)
    batches = list(eval_batches(source, batch_size=40, transform=fail_on(0, 50, 100), bad=bad))
    assert len(bad) == 3
    seen = np.concatenate([batch['label'][batch['mask'] == 1] for batch in batches])
    assert sorted(seen) == sorted(set(range(SIZE)) - {0, 50, 100})


@pytest.fixture
def folder(tmp_path):
    """Eight images, four of each class."""
    for i in range(8):
        directory = tmp_path / 'train' / ('cat' if i < 4 else 'dog')
        directory.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8), (i, i, i)).save(directory / f'{i}.png')
    return tmp_path


@pytest.mark.parametrize('num_threads', [0, 2])
def test_a_file_that_disappears_in_an_epoch(folder, num_threads):
    arguments = {'batch_size': 4, 'seed': 0, 'num_threads': num_threads}
    arguments['transform'] = make_transform('random_crop', 8)

    def batches_with_loss(**more):
        batches = train_batches(ImageFolder('train', folder), **arguments, **more)
        first = next(batches)
        (folder / 'train' / 'cat' / '3.png').unlink(missing_ok=True)
        return [first, *take(batches, 20)]  # further than any buffer reaches

    whole = take(train_batches(ImageFolder('train', folder), **arguments), 21)
    with pytest.raises(ImageError, match=r'cat/3\.png: cannot be read: No such file .*\(example 3'):
        batches_with_loss()
    Image.new('RGB', (8, 8), (3, 3, 3)).save(folder / 'train' / 'cat' / '3.png')
    bad = UnreadableExamples(1)
    found = batches_with_loss(bad=bad)
    assert len(bad) == 1
    same = [np.array_equal(a['image'], b['image']) for a, b in zip(whole, found, strict=True)]
    assert same[0]
    assert 0 < len(same) - sum(same) <= 11  # it is in every second batch at most


@pytest.mark.parametrize('fault', [MemoryError, RuntimeError, SystemExit])
@pytest.mark.parametrize('num_threads', [0, 2])
def test_a_worker_that_dies_ends_the_run_and_says_where(source, fault, num_threads):
    def die_at_7(image, rng):
        if image[0, 0, 0] == 7:
            raise fault('of old age')
        return image

    batches = train_batches(
        source, batch_size=8, seed=0, transform=die_at_7, num_threads=num_threads
    )
    with (
        Prefetch(batches, lambda batch: batch) as prefetch,
        pytest.raises(fault, match='of old age') as raised,
    ):
        take(prefetch, 20)
    assert 'arrays[7] (example 7)' in str(raised.value.__notes__)


def test_nothing_readable_is_an_error_not_a_hang(source):
    for batches in (
        train_batches(
            source,
            batch_size=8,
            seed=0,
            transform=fail_on(*range(SIZE)),
            bad=UnreadableExamples(SIZE),
        ),
        eval_batches(
            source, batch_size=8, transform=fail_on(*range(SIZE)), bad=UnreadableExamples(SIZE)
        ),
    ):
        with pytest.raises(UsageError, match='none of the examples'):
            next(batches)


def test_a_label_out_of_range_is_a_bad_example():
    source = ArraySource(np.zeros((4, 2, 2, 3), np.uint8), np.arange(4))
    source.labels[2] = -1
    with pytest.raises(ImageError, match=r'arrays\[2\]: its label, -1, is not one of 4 classes'):
        next(eval_batches(source, batch_size=4))


@pytest.mark.parametrize('limit', [-1, 1.5, True])
def test_bad_limits(limit):
    with pytest.raises(UsageError, match='limit='):
        UnreadableExamples(limit)


def test_images_of_different_sizes_are_refused(source):
    batches = eval_batches(
        source, batch_size=8, transform=lambda image, rng: image[: 1 + image[0, 0, 0] % 2]
    )
    with pytest.raises(UsageError, match='different shapes'):
        next(batches)


@pytest.mark.parametrize(
    ('arguments', 'match'),
    [
        ({'batch_size': 102, 'seed': 0}, r'batch_size=102 is larger than arrays, which has 101'),
        ({'batch_size': 0, 'seed': 0}, 'batch_size=0'),
        ({'batch_size': -8, 'seed': 0}, 'batch_size=-8'),
        ({'batch_size': 10, 'seed': 0, 'process_count': 4}, 'multiple of .* 4'),
        ({'batch_size': 10, 'seed': -1}, 'seed=-1'),
    ],
)
def test_sizes_that_cannot_be(source, arguments, match):
    with pytest.raises(UsageError, match=match):
        train_batches(source, **arguments)


def test_an_empty_source_cannot_be_evaluated():
    with pytest.raises(UsageError, match='no examples'):
        eval_batches(ArraySource(np.zeros((0, 2, 2, 3), np.uint8), np.zeros(0, int)), batch_size=4)


def test_prefetch_keeps_the_order_and_ends():
    prefetch = Prefetch(iter(range(10)), lambda x: x * x)
    assert list(prefetch) == [x * x for x in range(10)]
    with pytest.raises(StopIteration):
        next(prefetch)


def test_prefetch_works_ahead_by_size():
    done = []
    with Prefetch(itertools.count(), done.append, size=3) as prefetch:
        next(prefetch)
        deadline = time.monotonic() + 10
        while len(done) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert done == [0, 1, 2, 3]


def test_prefetch_raises_where_the_batch_was_due():
    def fail_on_2(x):
        if x == 2:
            raise UsageError('bad batch')
        return x

    prefetch = Prefetch(itertools.count(), fail_on_2)
    assert [next(prefetch), next(prefetch)] == [0, 1]
    with pytest.raises(UsageError, match='bad batch'):
        next(prefetch)
    prefetch.close()


def test_prefetch_counts_only_the_time_that_was_waited():
    def slow(x):
        time.sleep(0.1)
        return x

    with Prefetch(itertools.count(), slow) as prefetch:
        take(prefetch, 3)
        assert 0.2 < prefetch.wait_seconds < 2
    with Prefetch(itertools.count(), lambda x: x) as prefetch:
        next(prefetch)
        before = prefetch.wait_seconds
        time.sleep(0.2)
        next(prefetch)
        assert prefetch.wait_seconds - before < 0.1


def test_prefetch_closes_its_threads_and_its_iterator(source):
    before = set(threading.enumerate())
    batches = train_batches(source, batch_size=8, seed=0, transform=add_noise)
    with Prefetch(batches, lambda batch: batch) as prefetch:
        next(prefetch)
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before
    with pytest.raises(ValueError, match='closed'):
        next(batches)


def test_a_program_that_never_closes_ends_all_the_same():
    program = """
import numpy as np
from nfnets_jax.data.pipeline import Prefetch, train_batches
from nfnets_jax.data.sources import ArraySource
source = ArraySource(np.zeros((8, 2, 2, 3), np.uint8), np.zeros(8, int))
batches = Prefetch(train_batches(source, batch_size=4, seed=0, num_threads=2), lambda batch: batch)
next(batches)
print('end')
"""
    result = subprocess.run(
        [sys.executable, '-c', program], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout == 'end\n'
    assert result.stderr == ''
