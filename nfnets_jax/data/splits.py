"""The splits that a source may have."""

from collections.abc import Collection

from nfnets_jax.errors import UsageError, nearest

# Names of the directory or the arrays of a split, in upper or lower case.
SPLIT_NAMES = {
    'train': ('train', 'training'),
    'validation': ('val', 'valid', 'validation'),
    'test': ('test', 'testing'),
}
SPLITS = tuple(SPLIT_NAMES)
ALL = 'all'  # every example of data that have no splits, of sources that hold out a part of them


class MissingSplit(UsageError):
    """The source does not have this split; most have no 'validation'."""


class MissingData(UsageError):
    """The data are not on this machine."""


def check_split(source: str, split: str, splits: Collection[str] = ('train', 'test')) -> None:
    """Raises `MissingSplit` unless `split` is one of `splits`; the error names `source`."""
    if split not in splits:
        raise MissingSplit(f'{source} has no split {split!r}{nearest(split, splits)}')
