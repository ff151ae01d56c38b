"""Stands in for data that are not on this machine: programs compile from their sizes alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from nfnets_jax.data import sources
from nfnets_jax.data.splits import MissingData
from nfnets_jax.data.tfds import PAPER_SPLITS
from nfnets_jax.errors import UsageError, nearest


class _Facts(NamedTuple):
    examples: Mapping[str, int]  # by the split's name in TFDS
    classes: int
    size: int | None  # side of the images; None where they are encoded, of many sizes


# As TFDS documents them.
_DATASETS = {
    'imagenet2012': _Facts({'train': 1_281_167, 'validation': 50_000}, 1000, None),
    'cifar10': _Facts({'train': 50_000, 'test': 10_000}, 10, 32),
    'cifar100': _Facts({'train': 50_000, 'test': 10_000}, 100, 32),
}


@dataclasses.dataclass(frozen=True)
class PlannedSource:
    """Stands in for a source whose data are not here; all of its examples are one empty image."""

    name: str
    examples: int
    class_names: tuple[str, ...]
    image: bytes | np.ndarray
    origin: str = 'known facts'
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {'image': self.image, 'label': 0}

    def where(self, index: int) -> str:
        return f'{self.name}[{index}]'

    def checksum(self) -> str:
        raise NotImplementedError('only data that are here can be compared')


def open_source(
    name: str,
    split: str,
    *,
    examples: int | None = None,
    classes: int | None = None,
    advice: str = '',
    **options: Any,
) -> sources.Source:
    """Opens a source, or plans with what is known of it where its data are not here.

    Args:
      name, split, options: as `sources.open_source` takes them.
      examples, classes: of data that nothing is known of; they are encoded images.
      advice: ends the error for data that nothing is known of.

    Raises:
      UsageError: as `sources.open_source`, or data that nothing is known of.
    """
    try:
        return sources.open_source(name, split, **options)
    except MissingData as error:
        dataset = options.get('dataset', '')
        facts = _DATASETS.get(dataset)
        if examples and classes:
            count, size = examples, None
        elif facts is None:
            raise UsageError(f'{error}{advice}') from error
        else:
            count = _count(dataset, facts.examples, split, options)
            classes, size = facts.classes, facts.size
    image = b'' if size is None else np.zeros((size, size, 3), np.uint8)
    return PlannedSource(dataset or name, count, tuple(map(str, range(classes))), image)


def _count(
    dataset: str, examples: Mapping[str, int], split: str, options: Mapping[str, Any]
) -> int:
    """Returns how many examples a split has, which may be an expression of TFDS."""
    import tensorflow_datasets as tfds  # here: a slow import

    default = split if split in examples else 'validation'
    expression = options.get(f'{split}_split') or default
    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[count], num_bytes=0)
        for name, count in examples.items()
    }
    aliases = PAPER_SPLITS.get(dataset, {})
    try:
        taken = tfds.core.ReadInstruction.from_spec(aliases.get(expression, expression))
        parts = taken.to_absolute(infos)
    except (ValueError, KeyError, AssertionError) as error:
        known = [*aliases, *examples]
        raise UsageError(
            f'data.{split}_split={expression!r}: no examples in {dataset}'
            f'{nearest(expression, known)}'
        ) from error
    return sum(len(range(examples[part.splitname])[part.from_ : part.to]) for part in parts)
