"""Answers to unequal classes: balanced sampling, and weights for the loss."""

import numpy as np

from nfnets_jax.data.pipeline import epoch_order


def balanced_order(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Returns the examples of an epoch in which all classes are equally frequent, in random order.

    A class has its share of the places of all epochs so far to within one, and each of its examples
    is used equally often to within one: it is read in random orders that follow one another across
    epochs. The result is a function of the arguments alone, so that a resumed run goes on exactly.

    Args:
      labels: integers [N], of every example.
      seed: of the run.
      epoch: number of the epoch, from 0.

    Returns:
      int64 [N], indices of examples; those of a rare class several times.
    """
    size = len(labels)
    ends = np.cumsum(np.unique(labels, return_counts=True)[1])
    members = np.split(np.argsort(labels, kind='stable'), ends[:-1])
    drawn = []
    for number, examples in enumerate(members):
        # Cumulative shares, so that the places of an epoch add up to `size`.
        start, stop = (
            (e * size * (number + 1)) // len(members) - (e * size * number) // len(members)
            for e in (epoch, epoch + 1)
        )
        drawn.append(examples[_in_random_orders(len(examples), seed, number, start, stop)])
    return np.concatenate(drawn)[epoch_order(size, seed, epoch)]


def _in_random_orders(count: int, seed: int, number: int, start: int, stop: int) -> np.ndarray:
    """Returns entries [start, stop) of an endless sequence of random orders of range(count)."""
    first, last = start // count, -(-stop // count)
    # A third word of the counter that is not 0 belongs to no stream of `pipeline.random_bits`.
    bits = np.random.Philox(key=[seed, 0], counter=[0, first, number + 1, 0])
    raw = np.empty((last - first, count), np.uint64)
    for row in raw:
        row[:] = bits.random_raw(count)
        # To the next second word. A new generator for each order would take seven times as long.
        bits.advance(2**64 - -(-count // 4))
    return np.argsort(raw, axis=1).ravel()[start - first * count : stop - first * count]


def class_counts(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns how many examples have each class, int64 [num_classes].

    Args:
      labels: integers [N], of every example, or [N, num_classes] of 0 and 1.
      num_classes: the number of classes.
    """
    if labels.ndim == 2:
        return labels.sum(axis=0, dtype=np.int64)
    return np.bincount(labels, minlength=num_classes)


def class_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns weights of the classes that are inversely proportional to their numbers of examples.

    The mean weight of a label is 1, as with scikit-learn's class_weight='balanced'.

    Args:
      labels, num_classes: as in `class_counts`.

    Returns:
      float32 [num_classes]; 1 for a class without examples.
    """
    counts = class_counts(labels, num_classes)
    there = np.count_nonzero(counts)
    weights = counts.sum() / (there * np.maximum(counts, 1))
    return np.where(counts, weights, 1).astype(np.float32)
