"""The data of a run: its splits, and the sizes, transforms and normalization of their images.

Encoded images of any size are cropped at random in training, and prepared for evaluation as for the
published model, unless `ImageOptions` say otherwise. They have the channels of the network
(`config.model.channels`, by default 3). If the images of a source have one size
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
from nfnets_jax.data.preprocessing import ImageError, decode, has_bands, make_transform
from nfnets_jax.data.sources import PixelSource, Source
from nfnets_jax.data.splits import MissingSplit
from nfnets_jax.errors import UsageError
from nfnets_jax.fields import Field
from nfnets_jax.image_size import WANTS, ImageSize, height_width, is_size, shortest
from nfnets_jax.pixel_format import RGB, PixelFormat, is_range

_SIZES = ('image_size', 'test_image_size', 'test_mode')
_AS_IT_IS = 'resize_crop_1.0'  # The whole image, which equals no transform for images of one size.
_PER_CHANNEL = 'a number for each channel, from 0 to 255'


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
        Field('Subtracted from each channel.', rule=bool, wants=_PER_CHANNEL),
    ] = augment.IMAGENET_MEAN
    std: Annotated[
        Sequence[float],
        Field('Divides each channel.', above=0, rule=bool, wants=_PER_CHANNEL),
    ] = augment.IMAGENET_STD
    value_range: Annotated[
        Sequence[float] | None,
        Field(
            'The values that become 0 and 255, of images that are not uint8; others are clipped. '
            'None: only uint16 is taken, all of its values.',
            rule=is_range,
            wants='two growing numbers, or None',
        ),
    ] = None


class ImageSpec(NamedTuple):
    """Sizes, transforms and normalization of the images."""

    shape: tuple[int, int, int]  # height, width and channels in training
    test_size: ImageSize  # side in evaluation, or height and width
    test_mode: str  # evaluation preprocessing, a mode of `make_transform`
    train_transform: Callable | None = None  # (image, rng) -> [H, W, C]
    test_transform: Callable | None = None
    mean: tuple[float, ...] = augment.IMAGENET_MEAN  # for each channel, on a scale of 0..255
    std: tuple[float, ...] = augment.IMAGENET_STD
    pixels: PixelFormat = RGB


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
    pixels = PixelFormat(config.model.get('channels') or 3, _ends(given.get('value_range')))
    check = not given.get('skip_bad', 0)
    train, test = (_with_pixels(source, pixels, check) for source in (train, test))
    validation = validation and _with_pixels(validation, pixels, check)
    images = [s[0]['image'] for s in (train, validation, test) if s is not None]
    sizes = {key: given[key] for key in _SIZES if given.get(key) is not None}
    spec = _image_spec(images, sizes, name, config.model.name, pixels)
    mean, std = (
        _per_channel(key, given.get(key), getattr(spec, key), pixels.channels)
        for key in ('mean', 'std')
    )
    return Data(train, validation, test, spec._replace(mean=mean, std=std))


def _per_channel(
    key: str, given: Sequence[float] | None, default: Sequence[float], channels: int
) -> tuple[float, ...]:
    """Returns the mean or the standard deviation of each channel."""
    if given is None:
        return augment.of_channels(default, channels)
    if len(given) != channels:
        raise UsageError(
            f'data.{key}={tuple(given)}: must be {channels} numbers, one for each channel',
            f'config.data.{key}',
            'config.model.channels',
        )
    return tuple(map(float, given))


def _ends(value_range: Sequence[float] | None) -> tuple[float, float] | None:
    if value_range is None:
        return None
    low, high = value_range
    return float(low), float(high)


def _with_pixels(source: Source, pixels: PixelFormat, check: bool) -> Source:
    """Returns a source with the pixels that the network takes; encoded images are decoded later.

    Args:
      source: any source.
      pixels: what the network takes.
      check: whether to read the first image as a test where it is no usual picture.

    Raises:
      UsageError: the first image has other channels, or values of no known range.
    """
    image = source[0]['image']
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and pixels.value_range:
            raise UsageError(
                f'data.value_range={pixels.value_range}: images of {source.name} are uint8 as they '
                'are; leave it out'
            )
        if image.dtype == np.uint8 and image.shape[2:] == (pixels.channels,):
            return source
        source, check = PixelSource(source, pixels), True
    elif not image or (pixels.is_picture and not has_bands(image)):  # Planned data have no bytes.
        return source
    try:
        if check:
            decode(source[0]['image'], pixels)
    except ImageError as error:
        raise UsageError(f'{source.where(0)}: {error}') from error
    return source


def _image_spec(
    images: list[bytes] | list[np.ndarray],
    given: dict[str, Any],
    source: str,
    model: str,
    pixels: PixelFormat,
) -> ImageSpec:
    """Returns the spec with the given sizes, or else those of the model.

    Args:
      images: the first image of each split, that of training first.
      given: options of `_SIZES`.
      source, model: their names.
      pixels: of the images.

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
        return ImageSpec(image.shape, shortest(size), _AS_IT_IS, pixels=pixels)
    published = models.variant_info(model)
    train_size = given.get('image_size', published.train_size)
    test_size = given.get('test_image_size', published.test_size)
    test_mode = given.get('test_mode', published.eval_mode)
    return ImageSpec(
        (*height_width(train_size), pixels.channels),
        shortest(test_size),
        test_mode,
        make_transform('random_crop', train_size, pixels),
        make_transform(test_mode, test_size, pixels),
        pixels=pixels,
    )


def _in_words(size: Sequence[int]) -> str:
    return 'x'.join(map(str, size))  # height x width, as on the command line


def options(name: str) -> dict[str, fields.Option]:
    """Returns all options that `config.data` may have for a source, besides those of `DataConfig`.

    Raises:
      UsageError: there is no such source.
    """
    own = sources.source_options(name)
    return own | {k: v for k, v in fields.options(ImageOptions).items() if k not in own}
