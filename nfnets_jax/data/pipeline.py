"""Host batches of a source, in an order that is a pure function of (seed, position).

Position p of the endless training stream is element p % n of the order of epoch p // n, where the
source has n examples. Training step s takes positions [s * batch_size, (s + 1) * batch_size), and
process k takes the k-th share of them. The batch depends on nothing else, neither on the number of
threads nor on earlier steps, so a run resumes from its step alone and no iterator state is saved.

Grain reads ahead in threads and keeps the order. Its elements are chunks of consecutive positions,
because it costs 65 microseconds of CPU per element without threads and 175 with two, which is more
than reading a small image takes.
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
from nfnets_jax.data.preprocessing import ImageError
from nfnets_jax.data.sources import Source
from nfnets_jax.errors import UsageError

with extras.optional():
    import grain
CHUNK = 32  # examples a thread reads at a time: many enough to hide Grain, few enough to start soon
_ORDER, _TRANSFORM = range(2)  # independent streams of random numbers


def random_bits(stream: int, seed: int, index: int) -> np.random.Philox:
    """Returns the bit generator of `index` in a stream; no two generators share a number."""
    return np.random.Philox(key=[seed, index], counter=[0, 0, 0, stream])


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the shuffle of an epoch: a permutation of range(size), int64.

    It uses only the raw Philox stream, which NumPy promises never to change.
    """
    return np.argsort(random_bits(_ORDER, seed, epoch).random_raw(size))


class UnreadableExamples:
    """The examples that could not be read so far, and the limit on their number.

    `len()` counts them. Threads that read ahead may count an example some steps early.

    Args:
        limit: how many different examples may be skipped; one more is an error.
    """

    def __init__(self, limit: int = 0):
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
            raise UsageError(f'limit={limit!r}: must be an integer >= 0')
        self._limit, self._lock = limit, threading.Lock()
        self._indices: set[int] = set()

    def __len__(self) -> int:
        return len(self._indices)

    def add(self, index: int, error: ImageError) -> None:
        """Counts an example; raises `error` beyond the limit."""
        with self._lock:
            if index not in self._indices and len(self._indices) >= self._limit:
                if not self._limit:
                    raise error
                raise ImageError(
                    f'{error}; {self._limit} others were skipped, which is the limit'
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
    bad: UnreadableExamples | None = None,
    order: Callable[[int], np.ndarray] | None = None,
) -> Iterator[dict]:
    """Returns an endless iterator over this process's training batches.

    By default every epoch is a new shuffle of all examples and holds each of them once; a batch may
    straddle two epochs. An unreadable example is replaced by the next one in that epoch's order,
    transformed with the random numbers of the original position: the rest of the stream does not
    change.

    Args:
        source: see `nfnets_jax.data.sources`.
        batch_size: examples in a batch, over all processes.
        seed: of the shuffle and of the transform's random numbers, not negative.
        start_step: the step of the first batch.
        transform: (image, rng) -> uint8 [H, W, 3], where rng is the position's numpy Generator;
            None to use the source's images unchanged.
        process_index: this process.
        process_count: processes that share every batch.
        num_threads: threads that read and transform; by default one per core, or none without a
            transform (threads do not speed up copying memory).
        bad: counts and limits the examples that are skipped; by default none may be.
        order: epoch -> indices of its examples, [len(source)]; by default `epoch_order` of `seed`.

    Returns:
        Iterator, with `close()`, of {'image': uint8 [b, H, W, 3], 'label': int32 [b]}, where
        b = batch_size / process_count; with several labels for an image they are uint8 [b, K].

    Raises:
        UsageError: invalid sizes; later, at its batch, an image that cannot be read.
    """
    size = len(source)
    if batch_size > size:
        raise UsageError(
            f'batch_size={batch_size} is larger than {source.name}, which has {size} examples; '
            'give fewer'
        )
    if seed < 0:
        raise UsageError(f'seed={seed}: must not be negative')
    order = functools.lru_cache(maxsize=2)(order or functools.partial(epoch_order, size, seed))
    bad = UnreadableExamples() if bad is None else bad

    def example(position: int) -> dict:
        epoch, first = divmod(position, size)
        for offset in range(size):
            index = int(order(epoch)[(first + offset) % size])
            rng = transform and np.random.Generator(random_bits(_TRANSFORM, seed, position))
            try:
                return _read(source, index, transform, rng)
            except ImageError as error:
                bad.add(index, error)
        raise UsageError(f'{source.name}: none of the examples can be read')

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
    bad: UnreadableExamples | None = None,
) -> Iterator[dict]:
    """Returns an iterator over this process's evaluation batches: every example exactly once.

    Every process gets the same number of batches, all of one shape; together they are the whole
    source in its order. Padding and replacements of skipped examples have mask 0.

    Args:
        transform: (image, None) -> [H, W, 3], or None.
        source, batch_size, process_index, process_count, num_threads, bad: as in `train_batches`.

    Returns:
        Iterator of {'image': [b, H, W, 3], 'label': as in `train_batches`, 'index': int32 [b], the
        example's place in the source, 'mask': float32 [b], 1 where real}.

    Raises:
        UsageError: as `train_batches`, except that `batch_size` may exceed the source.
    """
    size = len(source)
    if not size:
        raise UsageError(f'{source.name} has no examples to evaluate')
    bad = UnreadableExamples() if bad is None else bad

    def example(position: int) -> dict:
        for other in range(position, position + size):
            try:
                read = _read(source, other % size, transform)
            except ImageError as error:
                bad.add(other % size, error)
            else:
                return read | {
                    'index': np.int32(position),
                    'mask': np.float32(other == position < size),
                }
        raise UsageError(f'{source.name}: none of the examples can be read')

    steps = range(-(-size // max(batch_size, 1)))
    return _batches(
        example, steps, batch_size, process_index, process_count, _threads(num_threads, transform)
    )


class Prefetch:
    """Iterates over `put(batch)`, prepared ahead in a background thread.

    An exception of the iterator or of `put` is raised in place of its batch. To stop early, close
    it or use it in a `with` statement; otherwise it does not keep the program from ending.

    Args:
        iterator: host batches; closed with this one.
        put: host batch -> the item to return, usually device arrays.
        size: batches prepared ahead of the consumer.

    Attributes:
        wait_seconds: total time the consumer has waited: while it does not grow, input is not the
            bottleneck.
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
    """Returns one example, its image transformed; errors name the example."""
    try:
        example = source[index]
        label = example['label']
        if not np.ndim(label) and not 0 <= label < len(source.class_names):
            raise ImageError(f'its label, {label}, is not one of {len(source.class_names)} classes')
        image = transform(example['image'], rng) if transform else example['image']
    except ImageError as error:
        raise ImageError(f'{source.where(index)}: {error} (example {index})') from error
    except BaseException as error:  # perhaps not the image's fault, but say where it happened
        error.add_note(f'while reading {source.where(index)} (example {index})')
        raise
    return {'image': image, 'label': label if np.ndim(label) else np.int32(label)}


def _batches(
    example: Callable,
    steps: range,
    batch_size: int,
    process_index: int,
    process_count: int,
    num_threads: int,
) -> Iterator[dict]:
    """Returns this process's share of the batches of `steps`."""
    if batch_size < 1 or batch_size % process_count:
        raise UsageError(
            f'batch_size={batch_size}: must be positive and a multiple of the number of processes, '
            f'{process_count}'
        )
    rows = batch_size // process_count
    chunks = -(-rows // CHUNK)  # in a batch, of nearly equal size

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
