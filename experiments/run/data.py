"""The data of a run: its splits, and the sizes, transforms and normalization of their images.

Sources of encoded images of any size have three more options in `config.data`: image_size and
test_image_size, in pixels, and test_mode, the evaluation preprocessing. By default they are those
that the model was published with, see `models.Variant`. Training images are cropped at random. If
the images of a source have one size (digits, arrays, CIFAR) they are not resized unless both sizes
are given; one of these options alone must be the size of the images.

Every source has two more: mean and std, three values on a scale of 0..255, which normalize images
in training and in evaluation; by default ImageNet's. Fine-tuning needs those that the weights were
trained with.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from nfnets_jax import augment, models
from nfnets_jax.data import sources
from nfnets_jax.data.preprocessing import make_transform
from nfnets_jax.data.sources import Source
from nfnets_jax.data.splits import MissingSplit
from nfnets_jax.errors import UsageError

RUNNER_OPTIONS = ('skip_bad', 'on_device')  # of config.data, for any source: see Experiment
_OPTIONS = ('image_size', 'test_image_size', 'test_mode')
_NORMALIZATION = {'mean': augment.IMAGENET_MEAN, 'std': augment.IMAGENET_STD}
_AS_IT_IS = 'resize_crop_1.0'  # The whole image, which equals no transform for images of one size.


class ImageSpec(NamedTuple):
    """Sizes, transforms and normalization of the images."""

    shape: tuple[int, int, int]  # height, width and channels in training
    test_size: int  # side in evaluation, in pixels
    test_mode: str  # evaluation preprocessing, a mode of `make_transform`
    train_transform: Callable | None = None  # (image, rng) -> [H, W, 3]
    test_transform: Callable | None = None
    mean: tuple[float, ...] = augment.IMAGENET_MEAN  # for each channel, on a scale of 0..255
    std: tuple[float, ...] = augment.IMAGENET_STD


class Data(NamedTuple):
    """The sources of a run, see `nfnets_jax.data.sources`, and the spec of their images."""

    train: Source
    validation: Source | None  # chooses the best checkpoint; None if there are only two splits
    test: Source  # the labeled split besides `train`, if there is only one, whatever its name
    image_spec: ImageSpec


def open_data(config: ConfigDict, open_source: Callable[..., Source] = sources.open_source) -> Data:
    """Opens the splits of the data that a config describes.

    Args:
      config: as in `experiments.config.default_config`.
      open_source: (name, split, **options) -> the source.

    Raises:
      UsageError: naming the option that is wrong, or the data that are not there.
    """
    options = config.data.to_dict()
    name = options.pop('name')
    for key in RUNNER_OPTIONS:
        options.pop(key, None)
    mean, std = (
        _per_channel(key, options.pop(key, default)) for key, default in _NORMALIZATION.items()
    )
    # A source that makes its images itself (digits) has its own image_size.
    own = sources.source_options(name)
    given = {key: options.pop(key) for key in _OPTIONS if key in options and key not in own}
    train, test = (open_source(name, split, **options) for split in ('train', 'test'))
    try:
        validation = open_source(name, 'validation', **options)
    except MissingSplit:
        validation = None
    images = [s[0]['image'] for s in (train, validation, test) if s is not None]
    spec = _image_spec(images, given, name, config.model.name)
    return Data(train, validation, test, spec._replace(mean=mean, std=std))


def _image_spec(
    images: list[bytes] | list[np.ndarray], given: dict[str, Any], source: str, model: str
) -> ImageSpec:
    """Returns the spec with the given sizes, or else those of the model.

    Args:
      images: the first image of each split, that of training first.
      given: options of `_OPTIONS`.
      source, model: their names.

    Raises:
      UsageError: a size is invalid, or would crop images of one size unintentionally.
    """
    image, *others = images
    if not isinstance(image, bytes) and not {'image_size', 'test_image_size'} <= set(given):
        size = image.shape[:2]
        for key, value in given.items():
            if key == 'test_mode' or size != (value, value):
                raise UsageError(
                    f'config.data.{key}={value!r}: the images of {source!r} are {size[1]}x{size[0]}'
                    ' and left as they are; leave it out (or give their size), or give both '
                    'image_size and test_image_size to crop them'
                )
        for other in others:
            if not isinstance(other, bytes) and other.shape != image.shape:
                raise UsageError(
                    f'the images of {source!r} are {size[1]}x{size[0]} to train on but '
                    f'{other.shape[1]}x{other.shape[0]} in another split; make them one size, or '
                    'give config.data.image_size and config.data.test_image_size'
                )
        return ImageSpec(image.shape, image.shape[0], _AS_IT_IS)
    published = models.variant_info(model)
    train_size = _pixels('image_size', given.get('image_size', published.train_size))
    test_size = _pixels('test_image_size', given.get('test_image_size', published.test_size))
    test_mode = given.get('test_mode', published.eval_mode)
    transforms = make_transform('random_crop', train_size), make_transform(test_mode, test_size)
    return ImageSpec((train_size, train_size, 3), test_size, test_mode, *transforms)


def options(name: str) -> list[str]:
    """Returns the names of all options that `config.data` may have for a source.

    Raises:
      UsageError: there is no such source.
    """
    return list(
        dict.fromkeys([*sources.source_options(name), *_OPTIONS, *_NORMALIZATION, *RUNNER_OPTIONS])
    )


def _pixels(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f'config.data.{key}={value!r}: must be pixels, an integer above 0')
    return value


def _per_channel(key: str, values: Any) -> tuple[float, ...]:
    is_list = isinstance(values, (list, tuple)) and len(values) == 3
    numbers = tuple(values) if is_list else ()
    if not numbers or not all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        for value in numbers
    ):
        raise UsageError(f'config.data.{key}={values!r}: must be three numbers, from 0 to 255')
    if key == 'std' and min(numbers) <= 0:
        raise UsageError(f'config.data.std={values!r}: must be above 0')
    return tuple(map(float, numbers))
