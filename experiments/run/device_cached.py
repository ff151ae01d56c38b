"""A small data set that lives on the devices whole: no host work per step at all.

Every device holds all pictures and the order of two epochs; which of them a step takes follows from
its number, inside the training step. Batches are those of `train_batches`, to the last bit.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.run import parallel
from nfnets_jax.data.pipeline import UnreadableExamples, epoch_order, eval_batches
from nfnets_jax.data.sources import Source
from nfnets_jax.errors import UsageError

MAX_BYTES = 2**32  # of pictures; a data set that needs more is not small


class ResidentBatches:
    """Stands in for `Prefetch(train_batches(...))`, for training steps that begin with `take`.

    Iterates over dicts on the devices; they are one and the same object for all steps of an epoch.

    Args:
        source: see `nfnets_jax.data.sources`.
        batch_size: examples in a batch, all processes together.
        seed: of the shuffle.
        start_step: the step whose batch comes first.
        transform: (image, None) -> uint8 [H, W, 3], without randomness; None where the source's
            images are used as they are.
        process_index, process_count: as in `train_batches`.
        bad: as in `train_batches`; counted once and for all, when the pictures are read.

    Raises:
        UsageError: pictures of different sizes, or more than `MAX_BYTES` of them.
    """

    wait_seconds = 0.0  # there is nothing to wait for

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        transform: Callable | None = None,
        process_index: int = 0,
        process_count: int = 1,
        bad: UnreadableExamples | None = None,
    ):
        self._size, self._seed = len(source), seed
        self._batch_size, self._step = batch_size, start_step
        self._epoch: int | None = None
        rows = batch_size // process_count
        position = np.arange(process_index * rows, (process_index + 1) * rows, dtype=np.int32)
        arrays = _read_all(source, transform, bad)
        self._readable = arrays.pop('mask') == 1
        self._batch = {'position': parallel.shard(position), **_everywhere(arrays)}

    def __iter__(self):
        return self

    def __next__(self) -> dict:
        epoch = self._step * self._batch_size // self._size
        if epoch != self._epoch:
            # A batch may reach into the next epoch.
            order = np.concatenate([self._order(epoch), self._order(epoch + 1)])
            first = np.array(epoch * self._size % 2**32, np.uint32)
            placed = _everywhere({'order': order.astype(np.int32), 'first': first})
            self._batch, self._epoch = self._batch | placed, epoch
        self._step += 1
        return self._batch

    def _order(self, epoch: int) -> np.ndarray:
        """Returns the order of an epoch, each unreadable example replaced by the one after it."""
        order = epoch_order(self._size, self._seed, epoch)
        places = np.flatnonzero(self._readable[order])
        return order[places[np.searchsorted(places, np.arange(self._size)) % len(places)]]

    def close(self) -> None:
        self._batch = {}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def take(batch: dict, step: jax.Array, batch_size: int) -> dict:
    """Returns a device's share of the batch of a step; to be called inside the training step.

    Args:
        batch: this device's part of what `ResidentBatches` yields.
        step: int32 scalar.
        batch_size: examples in a batch, all devices of all processes together.

    Returns:
        {'image': uint8 [b, H, W, 3], 'label': int32 [b], 'position': int32 [b]}.
    """
    # Modulo 2 ** 32, so that it does not matter how many examples the run has seen.
    before = step.astype(jnp.uint32) * jnp.uint32(batch_size) - batch['first'][0]
    index = batch['order'][0][before + batch['position'].astype(jnp.uint32)]
    return {
        'image': batch['image'][0][index],
        'label': batch['label'][0][index],
        'position': batch['position'],
    }


def _read_all(source: Source, transform: Callable | None, bad: UnreadableExamples | None) -> dict:
    """Returns all images, labels and masks (0: could not be read) of a source, in its order."""
    batch_size = min(len(source), 1024)
    batches = eval_batches(source, batch_size=batch_size, transform=transform, bad=bad)
    read, size = [], 0
    for batch in batches:
        read.append(batch)
        size += batch['image'].nbytes
        if size > MAX_BYTES:
            raise UsageError(
                f'data.on_device=True: {source.name} has more than {MAX_BYTES / 2**30:.0f} GiB of '
                'pictures; leave it False'
            )
    return {key: np.concatenate([b[key] for b in read])[: len(source)] for key in read[0]}


def _everywhere(tree):
    """Places a copy on every device of this process: leaves [devices, 1, ...], split by device."""
    devices = jax.local_device_count()
    return parallel.shard(jax.tree.map(lambda x: np.broadcast_to(x, (devices, *x.shape)), tree))
