"""Augmentation on the device: the recipe, RandAugment and AutoAugment, and their operations."""

from nfnets_jax.augment.recipe import (
    DEFAULTS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    example_keys,
    images_per_example,
    make_augment,
    mix_distinct,
    mix_neighbours,
    normalise,
    random_erasing,
    random_flip,
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
    'normalise',
    'random_erasing',
    'random_flip',
    'random_shift_crop',
    'soft_labels',
]
