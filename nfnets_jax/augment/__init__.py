"""Augmentation on the device: the recipe, RandAugment and AutoAugment, and their operations."""

import warnings
from typing import Any

from nfnets_jax.augment.recipe import (
    DEFAULTS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    example_keys,
    images_per_example,
    make_augment,
    mix_distinct,
    mix_neighbours,
    normalize,
    of_channels,
    random_erasing,
    random_flip,
    random_rotation,
    random_shift_crop,
    soft_labels,
)

__all__ = [
    'DEFAULTS',
    'IMAGENET_MEAN',
    'IMAGENET_STD',
    'example_keys',
    'images_per_example',
    'make_augment',
    'mix_distinct',
    'mix_neighbours',
    'normalize',
    'of_channels',
    'random_erasing',
    'random_flip',
    'random_rotation',
    'random_shift_crop',
    'soft_labels',
]


def __getattr__(name: str) -> Any:
    """Returns `normalize` under its former name."""
    if name != 'normalise':
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    warnings.warn('augment.normalise is now augment.normalize', DeprecationWarning, stacklevel=2)
    return normalize
