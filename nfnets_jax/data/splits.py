"""The splits that a source may have."""

from collections.abc import Collection

from nfnets_jax.errors import UsageError, nearest

# What the directory or the arrays of a split may be called, in upper or lower case.
SPLIT_NAMES = {
    'train': ('train', 'training'),
    'validation': ('val', 'valid', 'validation'),
    'test': ('test', 'testing'),
}
SPLITS = tuple(SPLIT_NAMES)


class MissingSplit(UsageError):
    """A split that a source does not have; most have no 'validation'."""


class MissingData(UsageError):
    """Data that are not where they should be."""


def check_split(source: str, split: str, splits: Collection[str] = ('train', 'test')) -> None:
    """Raises `MissingSplit` if `split` is none of the `splits` that a source has.

    Args:
        source: what to call the source in the error.
    """
    if split not in splits:
        raise MissingSplit(f'{source} has no split {split!r}{nearest(split, splits)}')
