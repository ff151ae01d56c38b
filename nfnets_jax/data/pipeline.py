"""From a source to host batches, in an order that is a pure function of (seed, position).

Position p of the endless training stream is an example of epoch p // n: the one at p % n of that
epoch's shuffle. Training step s takes the positions [s * batch_size, (s + 1) * batch_size), and of
these process k the k-th share. Nothing else decides what a batch holds - not the number of threads,
nor the steps already taken - so a run resumes from its step alone and no iterator state is saved.

Grain reads ahead in threads and keeps the order. Its elements are chunks of consecutive positions,
because its cost is per element: 65 microseconds of CPU without threads, 175 with two, more than it
takes to read a small picture. A chunk shares it out.
"""

import concurrent.futures
import functools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from nfnets_jax import extras
from nfnets_jax.data.preprocessing import PictureError
from nfnets_jax.data.sources import Source
from nfnets_jax.errors import UsageError

with extras.optional():
    import grain
CHUNK = 32  # examples one thread reads at a time: enough to hide Grain, few enough to start soon
_ORDER, _TRANSFORM = range(2)  # independent streams of random numbers


def random_bits(stream: int, seed: int, index: int) -> np.random.Philox:
    """Returns the bit generator that belongs to `index` of a stream; no two share a number."""
    return np.random.Philox(key=[seed, index], counter=[0, 0, 0, stream])


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the shuffle of an epoch: a permutation of range(size), int64.

    It rests on nothing but the raw Philox stream, which NumPy promises never to change.
    """
    return np.argsort(random_bits(_ORDER, seed, epoch).random_raw(size))


class BadPictures:
    """The examples that could not be read so far, and how many of them may be skipped.

    Args:
        limit: `config.data.skip_bad`: different examples to skip; one more is an error. With 0 the
            first is.

    `len(bad)` counts them, for the log. Threads that read ahead may count one some steps early.
    """

    def __init__(self, limit: int = 0):
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
            raise UsageError(f'data.skip_bad={limit!r}: must be an integer >= 0')
        self._limit, self._lock = limit, threading.Lock()
        self._indices: set[int] = set()

    def __len__(self) -> int:
        return len(self._indices)

    def add(self, index: int, error: PictureError) -> None:
        """Counts an example; raises `error` if it is one too many."""
        with self._lock:
            if index not in self._indices and len(self._indices) >= self._limit:
                if not self._limit:
                    raise error
                raise PictureError(
                    f'{error}; {self._limit} others were skipped, as data.skip_bad allows'
                ) from error
            self._indices.add(index)


def train_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    transform: Callable | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    bad: BadPictures | None = None,
) -> Iterator[dict]:
    """Returns the endless iterator of this process's training batches.

    Every epoch is a new shuffle of all examples and holds each of them once; a batch may straddle
    two epochs. Where an example is skipped because it cannot be read, the one that follows in that
    epoch's order stands in its place, transformed by the random numbers of the place: nothing else
    in the stream changes.

    Args:
        source: see `nfnets_jax.data.sources`.
        batch_size: examples in a batch, all processes together.
        seed: of the shuffle and of the transform's random numbers, not negative.
        start_step: the step whose batch comes first.
        transform: (image, rng) -> uint8 [H, W, 3], where rng is the position's numpy Generator;
            None where the source's images are used as they are.
        process_index: this process.
        process_count: processes that share every batch.
        num_threads: threads that read and transform; by default one for each core, or none where
            there is no transform (copying memory gains nothing from them).
        bad: counts and limits the examples that are skipped; by default none may be.

    Returns:
        Iterator, with `close()`, of {'image': uint8 [b, H, W, 3], 'label': int32 [b]}, where
        b = batch_size / process_count.

    Raises:
        UsageError: sizes that do not fit; later, at its batch, a picture that cannot be read.
    """
    size = len(source)
    if batch_size > size:
        raise UsageError(
            f'batch_size={batch_size} is larger than {source.name}, which has {size} examples; '
            'give fewer'
        )
    if seed < 0:
        raise UsageError(f'seed={seed}: must not be negative')
    order = functools.lru_cache(maxsize=2)(functools.partial(epoch_order, size, seed))

    bad = BadPictures() if bad is None else bad

    def example(position: int) -> dict:
        epoch, place = divmod(position, size)
        for following in range(size):
            index = int(order(epoch)[(place + following) % size])
            rng = transform and np.random.Generator(random_bits(_TRANSFORM, seed, position))
            try:
                return _read(source, index, transform, rng)
            except PictureError as error:
                bad.add(index, error)
        raise UsageError(f'{source.name}: not one example can be read')

    steps = range(start_step, sys.maxsize // max(batch_size, 1))
    return _batches(
        example, steps, batch_size, process_index, process_count, _threads(num_threads, transform)
    )


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    transform: Callable | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
    bad: BadPictures | None = None,
) -> Iterator[dict]:
    """Returns the iterator of this process's evaluation batches: every example exactly once.

    Every process gets the same number of batches, all of one shape, and together they are the whole
    source in its order. Where examples run out, or one is skipped, another stands in with mask 0.

    Args:
        transform: (image, None) -> [H, W, 3], or None.
        source, batch_size, process_index, process_count, num_threads, bad: as in `train_batches`.

    Returns:
        Iterator of {'image': [b, H, W, 3], 'label': int32 [b], 'mask': float32 [b], 1 where real}.

    Raises:
        UsageError: as `train_batches`; a batch larger than the source is none.
    """
    size = len(source)
    if not size:
        raise UsageError(f'{source.name} has no examples to evaluate')

    bad = BadPictures() if bad is None else bad

    def example(position: int) -> dict:
        for other in range(position, position + size):
            try:
                read = _read(source, other % size, transform)
            except PictureError as error:
                bad.add(other % size, error)
            else:
                return read | {'mask': np.float32(other == position < size)}
        raise UsageError(f'{source.name}: not one example can be read')

    steps = range(-(-size // max(batch_size, 1)))
    return _batches(
        example, steps, batch_size, process_index, process_count, _threads(num_threads, transform)
    )


class Prefetch:
    """Iterates over `put(batch)` of the coming batches, which a background thread prepares.

    An exception of the iterator or of `put` is raised where its batch was due. Close it, or use it
    in a `with` statement, to stop early; a program that ends without that ends all the same.

    Args:
        iterator: host batches; closed with this one.
        put: host batch -> what the consumer wants, usually device arrays.
        size: batches prepared ahead of the consumer.

    Attributes:
        wait_seconds: how long the consumer has waited so far in all: zero growth means that data
            is not the bottleneck.
    """

    def __init__(self, iterator: Iterator, put: Callable, size: int = 2):
        self.wait_seconds = 0.0
        self._iterator, self._put = iterator, put
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='prefetch')
        self._ahead = deque(self._thread.submit(self._prepare) for _ in range(size))

    def _prepare(self):
        return self._put(next(self._iterator))

    def __iter__(self):
        return self

    def __next__(self):
        start = time.perf_counter()
        self._ahead.append(self._thread.submit(self._prepare))
        try:
            return self._ahead.popleft().result()
        finally:
            self.wait_seconds += time.perf_counter() - start

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()
        if hasattr(self._iterator, 'close'):
            self._iterator.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def _read(source: Source, index: int, transform: Callable | None, rng=None) -> dict:
    """Returns one example, its image transformed; a bad picture is named in the error."""
    try:
        example = source[index]
        if not 0 <= example['label'] < len(source.class_names):
            raise PictureError(
                f'its label, {example["label"]}, is not one of {len(source.class_names)} classes'
            )
        image = transform(example['image'], rng) if transform else example['image']
    except PictureError as error:
        raise PictureError(f'{source.where(index)}: {error} (example {index})') from error
    except BaseException as error:  # not the picture's fault, as far as we know; but where was it?
        error.add_note(f'while reading {source.where(index)} (example {index})')
        raise
    return {'image': image, 'label': np.int32(example['label'])}


def _batches(
    example: Callable,
    steps: range,
    batch_size: int,
    process_index: int,
    process_count: int,
    num_threads: int,
) -> Iterator[dict]:
    """Returns the batches of `steps`, made of this process's share of the positions of each."""
    if batch_size < 1 or batch_size % process_count:
        raise UsageError(
            f'batch_size={batch_size}: must be positive and a multiple of the number of processes, '
            f'{process_count}'
        )
    rows = batch_size // process_count
    chunks = -(-rows // CHUNK)  # in a batch, as even as can be

    def read_chunk(index: int) -> list[dict]:
        step, chunk = divmod(index, chunks)
        first = step * batch_size + process_index * rows
        return [
            example(first + row)
            for row in range(chunk * rows // chunks, (chunk + 1) * rows // chunks)
        ]

    dataset = grain.MapDataset.range(steps.start * chunks, steps.stop * chunks).map(read_chunk)
    read_options = grain.ReadOptions(num_threads, prefetch_buffer_size=2 * num_threads)
    return iter(dataset.to_iter_dataset(read_options).batch(chunks, batch_fn=_stack))


def _stack(chunks: list[list[dict]]) -> dict:
    """Returns one batch: the examples of all chunks, stacked key by key."""
    examples = [example for chunk in chunks for example in chunk]
    shapes = {np.shape(example['image']) for example in examples}
    if len(shapes) > 1:
        sizes = ' and '.join(map(str, sorted(shapes)[:2]))
        raise UsageError(f'images of different shapes, {sizes}, cannot share a batch: resize them')
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}


def _threads(num_threads: int | None, transform: Callable | None) -> int:
    if num_threads is None:
        return os.cpu_count() or 1 if transform else 0
    return num_threads
