"""A small data set cached on the devices, so that a step needs no host work.

Every device holds all images and the order of two epochs. The training step computes from its
number which images it takes. Batches are bit for bit those of `train_batches`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.run import parallel
from nfnets_jax.data.pipeline import UnreadableExamples, epoch_order, eval_batches
from nfnets_jax.data.sources import Source
from nfnets_jax.errors import UsageError

MAX_BYTES = 2**32  # of images


class DeviceCachedBatches:
    """Replaces `Prefetch(train_batches(...))` for training steps that begin with `take`.

    Iterates over dicts on the devices. All steps of an epoch get the same object.

    Args:
        source: see `nfnets_jax.data.sources`.
        batch_size: examples in a batch, over all processes.
        seed: seed of the shuffle.
        start_step: the step of the first batch.
        transform: (image, None) -> uint8 [H, W, 3], without randomness; None: no transform.
        process_index, process_count: as in `train_batches`.
        bad: as in `train_batches`; all examples are counted when the images are read.
        order: as in `train_batches`.

    Raises:
        UsageError: the images differ in size, or are more than `MAX_BYTES`.
    """

    wait_seconds = 0.0  # It never waits.

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
        order: Callable[[int], np.ndarray] | None = None,
    ):
        self._size = len(source)
        self._epoch_order = order or functools.partial(epoch_order, self._size, seed)
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
        """Returns the order of an epoch; the next readable example replaces an unreadable one."""
        order = self._epoch_order(epoch)
        places = np.flatnonzero(self._readable[order])
        return order[places[np.searchsorted(places, np.arange(self._size)) % len(places)]]

    def close(self) -> None:
        self._batch = {}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def take(batch: dict, step: jax.Array, batch_size: int) -> dict:
    """Returns a device's share of the batch of a step. Call it inside the training step.

    Args:
        batch: this device's part of a batch of `DeviceCachedBatches`.
        step: int32 scalar.
        batch_size: examples in a batch, over all devices of all processes.

    Returns:
        {'image': uint8 [b, H, W, 3], 'label': int32 [b] or uint8 [b, K], 'position': int32 [b]}.
    """
    # Modulo 2 ** 32, so that the number of examples seen so far may overflow.
    before = step.astype(jnp.uint32) * jnp.uint32(batch_size) - batch['first'][0]
    index = batch['order'][0][before + batch['position'].astype(jnp.uint32)]
    return {
        'image': batch['image'][0][index],
        'label': batch['label'][0][index],
        'position': batch['position'],
    }


def _read_all(source: Source, transform: Callable | None, bad: UnreadableExamples | None) -> dict:
    """Returns all images, labels and masks (0: unreadable) of a source, in its order."""
    batch_size = min(len(source), 1024)
    batches = eval_batches(source, batch_size=batch_size, transform=transform, bad=bad)
    read, size = [], 0
    for batch in batches:
        read.append(batch)
        size += batch['image'].nbytes
        if size > MAX_BYTES:
            raise UsageError(
                f'data.on_device=True: {source.name} has more than {MAX_BYTES / 2**30:.0f} GiB of '
                'images; leave it False'
            )
    return {key: np.concatenate([b[key] for b in read])[: len(source)] for key in read[0]}


def _everywhere(tree):
    """Copies a tree to every device of this process: leaves [devices, 1, ...], split by device."""
    devices = len(parallel.local_devices())
    return parallel.shard(jax.tree.map(lambda x: np.broadcast_to(x, (devices, *x.shape)), tree))
