"""The data of a run: its splits, and the sizes, transforms and normalization of their images.

Encoded images of any size are cropped at random in training, and prepared for evaluation as for the
published model, unless `ImageOptions` say otherwise. If the images of a source have one size
(digits, arrays, CIFAR) they are not resized unless both sizes are given; one of these options alone
must be the size of the images. Images are normalized by ImageNet's mean and std by default;
fine-tuning needs those that the weights were trained with.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from nfnets_jax import augment, fields, models
from nfnets_jax.data import sources
from nfnets_jax.data.preprocessing import make_transform
from nfnets_jax.data.sources import Source
from nfnets_jax.data.splits import MissingSplit
from nfnets_jax.errors import UsageError
from nfnets_jax.fields import Field
from nfnets_jax.image_size import WANTS, ImageSize, height_width, is_size, shortest

_SIZES = ('image_size', 'test_image_size', 'test_mode')
_AS_IT_IS = 'resize_crop_1.0'  # The whole image, which equals no transform for images of one size.
_RGB = 'three numbers, from 0 to 255'


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Fields of `config.data` for every source; the options of the source stand beside them."""

    name: Annotated[str, Field(f'A source: {", ".join(sources.SOURCES)}.')] = 'digits'
    skip_bad: Annotated[int, Field('Unreadable images to skip, in each process.', low=0)] = 0
    on_device: Annotated[bool, Field('Keep a small training set on the devices.')] = False
    sampling: Annotated[
        Literal['shuffled', 'balanced'],
        Field('An epoch holds each training image once, or all classes equally often.'),
    ] = 'shuffled'
    validation_fraction: Annotated[
        float,
        Field(
            'Share of each class of the training images to validate on, where the source has no '
            'validation split; 0: none.',
            low=0,
            below=1,
        ),
    ] = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Options of every source: sizes, evaluation transform and normalization of its images."""

    image_size: Annotated[
        ImageSize | None,
        Field(
            "Training pixels: a side, or (height, width); None: the model's.",
            rule=is_size,
            wants=f'{WANTS}, or None',
        ),
    ] = None
    test_image_size: Annotated[
        ImageSize | None,
        Field(
            "Test pixels: a side, or (height, width); None: the model's.",
            rule=is_size,
            wants=f'{WANTS}, or None',
        ),
    ] = None
    test_mode: Annotated[
        str | None, Field("Evaluation preprocessing, a mode of make_transform; None: the model's.")
    ] = None
    mean: Annotated[
        Sequence[float],
        Field('Subtracted from each channel.', rule=lambda rgb: len(rgb) == 3, wants=_RGB),
    ] = augment.IMAGENET_MEAN
    std: Annotated[
        Sequence[float],
        Field('Divides each channel.', above=0, rule=lambda rgb: len(rgb) == 3, wants=_RGB),
    ] = augment.IMAGENET_STD


class ImageSpec(NamedTuple):
    """Sizes, transforms and normalization of the images."""

    shape: tuple[int, int, int]  # height, width and channels in training
    test_size: ImageSize  # side in evaluation, or height and width
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
    given, name = config.data.to_dict(), config.data.name
    own = {key: given.pop(key) for key in sources.source_options(name) if key in given}
    train, test = (open_source(name, split, **own) for split in ('train', 'test'))
    try:
        validation = open_source(name, 'validation', **own)
    except MissingSplit:
        validation = None
        if fraction := given.get('validation_fraction', 0.0):
            train, validation = sources.hold_out_validation(train, fraction)
    images = [s[0]['image'] for s in (train, validation, test) if s is not None]
    sizes = {key: given[key] for key in _SIZES if given.get(key) is not None}
    spec = _image_spec(images, sizes, name, config.model.name)
    mean, std = (
        tuple(map(float, given.get(key, default)))
        for key, default in (('mean', augment.IMAGENET_MEAN), ('std', augment.IMAGENET_STD))
    )
    return Data(train, validation, test, spec._replace(mean=mean, std=std))


def _image_spec(
    images: list[bytes] | list[np.ndarray], given: dict[str, Any], source: str, model: str
) -> ImageSpec:
    """Returns the spec with the given sizes, or else those of the model.

    Args:
      images: the first image of each split, that of training first.
      given: options of `_SIZES`.
      source, model: their names.

    Raises:
      UsageError: sizes would crop images of one size unintentionally.
    """
    image, *others = images
    if not isinstance(image, bytes) and not {'image_size', 'test_image_size'} <= set(given):
        size = image.shape[:2]
        for key, value in given.items():
            if key == 'test_mode' or size != height_width(value):
                raise UsageError(
                    f'data.{key}={value!r}: the images of {source!r} are {_in_words(size)}'
                    ' and left as they are; leave it out (or give their size), or give both '
                    'image_size and test_image_size to crop them'
                )
        for other in others:
            if not isinstance(other, bytes) and other.shape != image.shape:
                raise UsageError(
                    f'the images of {source!r} are {_in_words(size)} to train on but '
                    f'{_in_words(other.shape[:2])} in another split; make them one size, or '
                    'give config.data.image_size and config.data.test_image_size',
                    'config.data.image_size',
                    'config.data.test_image_size',
                )
        return ImageSpec(image.shape, shortest(size), _AS_IT_IS)
    published = models.variant_info(model)
    train_size = given.get('image_size', published.train_size)
    test_size = given.get('test_image_size', published.test_size)
    test_mode = given.get('test_mode', published.eval_mode)
    transforms = make_transform('random_crop', train_size), make_transform(test_mode, test_size)
    return ImageSpec((*height_width(train_size), 3), shortest(test_size), test_mode, *transforms)


def _in_words(size: Sequence[int]) -> str:
    return 'x'.join(map(str, size))  # height x width, as on the command line


def options(name: str) -> dict[str, fields.Option]:
    """Returns all options that `config.data` may have for a source, besides those of `DataConfig`.

    Raises:
      UsageError: there is no such source.
    """
    own = sources.source_options(name)
    return own | {k: v for k, v in fields.options(ImageOptions).items() if k not in own}
