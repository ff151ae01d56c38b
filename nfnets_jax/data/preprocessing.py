"""Decoding, cropping and resizing on the host.

A transform is a function (image, rng) -> array [height, width, channels] of uint8 or float32,
0..255, where `image` is the bytes of an encoded image or an array, see `to_pixels`, and `rng` is a
numpy Generator that only the random crop uses. `make_transform` looks one up by name.
"""

import functools
import io
import os
from collections.abc import Callable, Sequence

import numpy as np

from nfnets_jax import extras
from nfnets_jax.errors import UsageError, first_line
from nfnets_jax.image_size import WANTS, ImageSize, height_width, is_size
from nfnets_jax.pixel_format import RGB, PixelFormat

with extras.optional():
    import cv2
    import simplejpeg
    from PIL import Image, ImageOps
MAX_PIXELS = 178_956_970  # 0.5 GB as RGB; Pillow's own limit for decompression bombs

# Raster formats only, and none that runs another program (EPS).
Image.init()
_PILLOW_FORMATS = tuple(
    format
    for format in ('JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF', 'PPM', 'AVIF')
    if format in Image.OPEN  # AVIF since Pillow 11.3
)
SUFFIXES = frozenset(
    suffix
    for suffix, format in Image.registered_extensions().items()
    if format in _PILLOW_FORMATS and suffix != '.pfm'  # floating-point
)
_ORIENTATION = 0x0112  # EXIF tag
_NPY = b'\x93NUMPY'  # how a .npy file begins
_TIFF = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')  # the last two: BigTIFF


class ImageError(UsageError):
    """An image cannot be read. The pipeline adds the name of its file."""


Size = tuple[int, int]  # height and width


def make_transform(mode: str, image_size: ImageSize, pixels: PixelFormat = RGB) -> Callable:
    """Returns the transform called `mode`, to images of one size.

    Args:
        mode: 'random_crop' for training. For evaluation the authors' 'crop_resize',
            'resize_crop_32' (any number of pixels) or 'resize_crop_0.875' (any fraction), or
            timm's 'timm_squash_0.9' and 'timm_center_0.9' (any fraction).
        image_size: side of the result in pixels, or its height and width.
        pixels: of the result.

    Raises:
        UsageError: unknown mode, or a size below 1.
    """
    if not is_size(image_size):
        raise UsageError(f'image_size={image_size!r}: must be {WANTS}')
    if mode == 'random_crop':
        return functools.partial(random_crop, size=image_size, pixels=pixels)
    if mode == 'crop_resize':
        return lambda image, rng: crop_resize(image, image_size, pixels)
    name, _, margin = mode.rpartition('_')
    try:
        if name == 'resize_crop':
            resized = _resized_size(image_size, float(margin))
            return lambda image, rng: resize_crop(image, image_size, resized, pixels)
        if name in ('timm_squash', 'timm_center') and 0 < float(margin) <= 1:
            resized = _resized_size(image_size, float(margin))
            return functools.partial(
                _timm_transform,
                size=image_size,
                resized=resized,
                squash=name == 'timm_squash',
                pixels=pixels,
            )
    except ValueError:
        pass
    raise UsageError(
        f'preprocessing {mode!r}: unknown (known: random_crop, crop_resize, resize_crop_PIXELS, '
        'resize_crop_FRACTION, timm_squash_FRACTION, timm_center_FRACTION)'
    )


def random_crop(
    image: bytes | np.ndarray,
    rng: np.random.Generator,
    size: ImageSize,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    min_covered: float = 0.1,
    pixels: PixelFormat = RGB,
) -> np.ndarray:
    """Returns a random crop resized to `size`, uint8 [height, width, channels], for training.

    It differs from the published crop in three ways. OpenCV's bicubic resize has a = -3/4 instead
    of the -1/2 of TensorFlow and `resize`: the mean difference is 0.69 gray levels (600 crops of
    ImageNet at 224 pixels; at an edge up to 24), without bias. The published kernel, as products of
    small matrices, takes 0.39 ms more per image, of 1.09 in all. If the crop of a JPEG is more than
    2, 4 or 8 times too large, libjpeg decodes the image at that fraction of its size, which is
    faster and free of aliasing. The result is rounded to uint8.

    Args:
        area: range of the crop's share of the image.
        aspect: range of the crop's width / height, over that of `size`: resizing stretches no crop
            by more. (timm and torchvision leave it the same for every size.)
        min_covered: least share of the image that the crop covers.
        pixels: of the result.
    """
    target = height_width(size)
    stretch = target[1] / target[0]
    aspects = (aspect[0] * stretch, aspect[1] * stretch)

    def draw_box(height, width):
        box = random_box(rng, height, width, area, aspects, min_covered)
        # As published: the whole image means that no box was found, even if it was drawn.
        return box if box and box[2:] != (height, width) else center_box(height, width, target)

    if isinstance(image, np.ndarray) or not (pixels.is_picture and _has_rgb_jpeg(image)):
        whole = decode(image, pixels)
        return _resized_part(whole, draw_box(*whole.shape[:2]), target)
    # The box is drawn in the image as stored: its size gives the reduction to decode at, and only
    # the small result is turned upright.
    box = draw_box(*simplejpeg.decode_jpeg_header(image)[:2])
    excess = min(box[2] / target[0], box[3] / target[1])
    reduction = next((r for r in (8, 4, 2) if excess >= r), 1)
    reduced = to_pixels(_decode_rgb_jpeg(image, reduction), pixels)
    part = _resized_part(reduced, [round(x / reduction) for x in box], target)
    return _turn(part, _jpeg_orientation(image))


def _resized_part(pixels: np.ndarray, box: Sequence[int], size: Size) -> np.ndarray:
    top, left, rows, columns = box
    part = pixels[top : top + rows, left : left + columns]
    resized = cv2.resize(part, size[::-1], interpolation=cv2.INTER_CUBIC)
    return resized.reshape(*size, -1)  # as OpenCV drops the axis of a single channel


def random_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
    min_covered: float = 0.1,
    attempts: int = 10,
) -> tuple[int, int, int, int] | None:
    """Returns (top, left, rows, columns) of a random crop, or None if all attempts fail.

    The published networks were trained with TensorFlow's sample_distorted_bounding_box for a box
    that is the whole image; this has its distribution. The aspect is uniform, then the height is
    uniform among those that fit and have an area in range, so that small crops are likelier than
    with a uniform area. Crops that cover less than `min_covered` of the image are drawn again. The
    last row and column where a crop could begin are never drawn.
    """
    for _ in range(attempts):
        ratio = rng.uniform(*aspect)
        lowest, highest = (round((share * height * width / ratio) ** 0.5) for share in area)
        highest = min(highest, height, int((width + 0.5) / ratio))
        if round(highest * ratio) > width:
            highest -= 1
        rows = int(rng.integers(min(lowest, highest), highest + 1))
        # Rounding may leave the range by one row.
        if rows * round(rows * ratio) < area[0] * height * width:
            rows += 1
        if rows * round(rows * ratio) > area[1] * height * width:
            rows -= 1
        columns = round(rows * ratio)
        share = rows * columns / (height * width)
        fits = 0 < rows <= height and 0 < columns <= width and area[0] <= share <= area[1]
        if fits and share >= min_covered:
            top = int(rng.integers(height - rows)) if rows < height else 0
            left = int(rng.integers(width - columns)) if columns < width else 0
            return top, left, rows, columns
    return None


def center_box(height: int, width: int, size: ImageSize) -> tuple[int, int, int, int]:
    """Returns the central box (top, left, rows, columns) with the aspect of `size`.

    It is the largest that covers at most size / (size + 32) of each side of the image.
    """
    target = height_width(size)
    rows, columns = (
        np.float32(wanted / (wanted + 32)) * np.float32(side)
        for wanted, side in zip(target, (height, width), strict=True)
    )
    stretch = target[1] / target[0]
    fitted = max(1, int(min(rows, columns / stretch))), max(1, int(min(columns, rows * stretch)))
    return (height - fitted[0] + 1) // 2, (width - fitted[1] + 1) // 2, *fitted


def crop_resize(
    image: bytes | np.ndarray, size: ImageSize, pixels: PixelFormat = RGB
) -> np.ndarray:
    """Returns the central box resized to `size`, float32 [height, width, channels], not clamped.

    For squares this is the published evaluation preprocessing, within rounding (see `resize`).
    """
    whole = decode(image, pixels)
    height, width = whole.shape[:2]
    top, left, rows, columns = center_box(height, width, size)
    return resize(whole[top : top + rows, left : left + columns], height_width(size))


def resize_crop(
    image: bytes | np.ndarray, size: ImageSize, resized: ImageSize, pixels: PixelFormat = RGB
) -> np.ndarray:
    """Returns the center, of `size`, of an image resized to `resized` pixels, as `crop_resize`.

    As published, it does not keep the aspect.
    """
    (rows, columns), (height, width) = height_width(resized), height_width(size)
    top, left = (rows - height + 1) // 2, (columns - width + 1) // 2
    return resize(decode(image, pixels), (rows, columns))[top : top + height, left : left + width]


def timm_resize_crop(
    image: bytes | np.ndarray,
    size: ImageSize,
    resized: ImageSize,
    *,
    squash: bool,
    pixels: PixelFormat = RGB,
) -> np.ndarray:
    """Returns the center of a resized image, uint8 [height, width, channels], as timm evaluates.

    Pillow decodes (with the exact DCT) and resizes by its bicubic (a = -1/2) with antialiasing,
    rounded to uint8, as timm does for `crop_mode` 'squash' or 'center' and 'bicubic'.

    Args:
        image: bytes of an encoded image, or an array, see `to_pixels`.
        size: of the result.
        resized: size before the crop, at least `size`.
        squash: whether the image is resized to `resized`; otherwise to the smallest size with its
            own aspect that covers `resized`.
        pixels: of the result.
    """
    whole = decode(image, pixels, exact_dct=True)
    rows, columns = height_width(resized)
    if not squash:
        rows, columns = _covering(whole.shape[:2], (rows, columns))
    _check_size(rows, columns)
    large = _resize_with_pillow(whole, (columns, rows))
    height, width = height_width(size)
    top, left = round((rows - height) / 2), round((columns - width) / 2)
    return large[top : top + height, left : left + width]


def _timm_transform(image: bytes | np.ndarray, rng: None, **options) -> np.ndarray:
    return timm_resize_crop(image, **options)


def _resize_with_pillow(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns pixels resized to (width, height); Pillow has images of one or three channels."""
    if pixels.shape[-1] == 3:
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    bands = (Image.fromarray(band) for band in np.moveaxis(pixels, -1, 0))
    return np.stack([np.asarray(b.resize(size, Image.Resampling.BICUBIC)) for b in bands], axis=-1)


def _covering(image: Sequence[int], target: Size) -> Size:
    """Returns the least size with the aspect of an image that covers `target`, as timm rounds."""
    if target[0] == target[1]:  # torchvision's Resize
        height, width = (target[0] * side // min(image) for side in image)
    else:  # timm's ResizeKeepRatio
        ratio = min(side / wanted for side, wanted in zip(image, target, strict=True))
        height, width = (round(side / ratio) for side in image)
    return height, width


def _resized_size(size: ImageSize, margin: float) -> Size:
    """Returns the size before cropping: `margin` is pixels to add, or a share to keep."""
    if not 0 < margin < float('inf'):
        raise ValueError
    sides = height_width(size)
    height, width = (int(side + margin) if margin > 1 else int(side / margin) for side in sides)
    return height, width


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns `image` [H, W, C] resized to `size`, float32, not clamped, as TensorFlow's bicubic.

    Keys' cubic convolution (a = -1/2) at half-pixel centers without antialiasing. It is separable:
    weighted sums of four rows, then of four columns.
    """
    taps, weights = _bicubic(image.shape[0], size[0])
    rows = np.einsum('ok,okwc->owc', weights, image[taps].astype(np.float32))
    taps, weights = _bicubic(image.shape[1], size[1])
    return np.einsum('ok,hokc->hoc', weights, rows[:, taps])


@functools.lru_cache(maxsize=1024)
def _bicubic(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the four input indices and their weights for every output pixel of an axis.

    Inputs outside the image have weight 0; the other weights sum to 1. Fractions are rounded to
    1/1024, because TensorFlow looks its weights up in a table of that length.
    """
    centers = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    first = np.floor(centers)
    taps = first.astype(int)[:, None] + np.arange(-1, 3)
    fraction = np.rint((centers - first) * 1024) / 1024
    x = np.abs(fraction[:, None] - np.arange(-1, 3))
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, far) * ((taps >= 0) & (taps < size_in))
    weights /= weights.sum(axis=1, keepdims=True)
    return taps.clip(0, size_in - 1), weights.astype(np.float32)


def decode(
    image: bytes | np.ndarray, pixels: PixelFormat = RGB, *, exact_dct: bool = False
) -> np.ndarray:
    """Returns the pixels of an encoded image or an array, uint8 [H, W, channels].

    The format is detected from the content, not the suffix. JPEG is decoded as TensorFlow does
    (libjpeg-turbo with the fast DCT), everything else by Pillow: gray, palette, CMYK and 16-bit
    images become 8-bit RGB, transparency becomes white, and an animation gives its first frame.
    EXIF orientation is applied, which the authors' code does not do. One channel is the luma of
    that.

    With another number of channels, or a range of values, images are read band by band: a TIFF by
    tifffile, its bands being samples of the pixels, planes or pages. A .npy file is an array.

    Args:
        image: see `to_pixels` for arrays.
        pixels: of the result.
        exact_dct: whether JPEG is decoded with the exact DCT, as Pillow does.

    Raises:
        ImageError: not an image, damaged, truncated, or more than MAX_PIXELS; or its channels or
            values are others.
    """
    if isinstance(image, np.ndarray):
        return to_pixels(image, pixels)
    if image.startswith(_NPY):
        return to_pixels(_load_npy(image), pixels)
    if not pixels.is_picture:
        read = _decode_tiff if image.startswith(_TIFF) else _decode_bands
        return to_pixels(read(image, pixels.channels), pixels)
    if not exact_dct and _has_rgb_jpeg(image):
        return to_pixels(_turn(_decode_rgb_jpeg(image), _jpeg_orientation(image)), pixels)
    return to_pixels(_decode_with_pillow(image), pixels)


def to_pixels(array: np.ndarray, pixels: PixelFormat = RGB) -> np.ndarray:
    """Returns an array of numbers [H, W] or [H, W, C] as uint8 [H, W, channels].

    RGB becomes gray by its luma (ITU-R 601-2, as in Pillow); gray is repeated to RGB.

    Raises:
        ImageError: C is another number of channels, or the range of the values is not known.
    """
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or not array.size:
        raise ImageError(f'an image must be [H, W] or [H, W, C], not {list(array.shape)}')
    given, wanted = array.shape[-1], pixels.channels
    if given != wanted and (given, wanted) not in ((1, 3), (3, 1)):
        remedy = f'give model.channels={given}'
        if array.shape[0] == wanted:
            remedy = 'they must be the last axis'
        raise ImageError(f'has {given} channels, but the network takes {wanted}: {remedy}')
    if array.dtype != np.uint8:
        array = _to_uint8(array, pixels.value_range)
    if given == wanted:
        return array
    if wanted == 3:
        return np.repeat(array, 3, axis=-1)
    red, green, blue = np.moveaxis(array.astype(np.int32), -1, 0)
    luma = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
    return luma.astype(np.uint8)[..., None]


def _to_uint8(array: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    if value_range is None and array.dtype == np.uint16:
        return (array >> 8).astype(np.uint8)  # as 16-bit PNG files are read
    if value_range is None or array.dtype.kind not in 'uif':
        raise ImageError(
            f'{array.dtype} has no known range: give the values that become 0 and 255 by '
            'data.value_range=LOW,HIGH'
        )
    scaled = np.interp(array, value_range, (0, 255))
    if np.isnan(scaled).any():
        raise ImageError('holds NaN')
    return np.rint(scaled).astype(np.uint8)


def _load_npy(encoded: bytes) -> np.ndarray:
    try:
        return np.load(io.BytesIO(encoded), allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, MemoryError) as error:
        raise ImageError(f'cannot be read as an array: {first_line(error)}') from error


def _decode_tiff(encoded: bytes, channels: int) -> np.ndarray:
    """Returns the bands of a TIFF, [H, W] or [H, W, C] of the dtype in the file."""
    with extras.optional():
        import tifffile
    try:
        with tifffile.TiffFile(io.BytesIO(encoded)) as file:
            series = file.series[0]
            at = {name: axis for axis, name in enumerate(series.axes) if series.shape[axis] > 1}
            rows, columns = (at.pop(name, series.axes.index(name)) for name in 'YX')
            _check_size(series.shape[rows], series.shape[columns])
            found = [series.shape[axis] for axis in at.values()] or [1]
            if len(found) > 1 or found[0] not in (channels, 1, 3):
                raise ImageError(
                    f'has {" x ".join(map(str, found))} channels, but the network takes {channels}:'
                    ' see model.channels'
                )
            array = np.moveaxis(series.asarray(), (rows, columns), (0, 1))
            return array.reshape(*array.shape[:2], -1)
    except ImageError:
        raise
    except Exception as error:  # tifffile raises nearly anything on damaged files
        raise ImageError(f'cannot be decoded: {first_line(error)}') from error


def _decode_bands(encoded: bytes, channels: int) -> np.ndarray:
    """Returns the bands of another image as they are stored, if they are so many; else RGB."""

    def bands(image: Image.Image) -> Image.Image:
        is_wide = image.mode == 'F' or image.mode.startswith('I')
        as_stored = image.mode not in ('1', 'P') and len(image.getbands()) == channels
        return image if is_wide or as_stored else _to_rgb(image)

    return _decode_with_pillow(encoded, convert=bands)


def has_bands(encoded: bytes) -> bool:
    """Returns whether an encoded image may have any number of channels: a TIFF or .npy file."""
    return encoded.startswith((_NPY, *_TIFF))


def is_image(path: str | os.PathLike) -> bool:
    """Returns whether a file begins like an image that `decode` reads."""
    try:
        with Image.open(path, formats=_PILLOW_FORMATS):
            return True
    except Image.DecompressionBombError:
        return True  # `decode` reports that it is too large
    except Exception:  # Pillow raises nearly anything on files that are not images
        return False


def _has_rgb_jpeg(encoded: bytes) -> bool:
    """Returns whether libjpeg-turbo can decode the image to RGB, according to its header."""
    if not encoded.startswith(b'\xff\xd8'):
        return False
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return False  # Pillow reports what is wrong
    _check_size(height, width)
    return colorspace in ('YCbCr', 'Gray', 'RGB')


def _decode_rgb_jpeg(encoded: bytes, reduction: int = 1) -> np.ndarray:
    try:
        height, width = simplejpeg.decode_jpeg_header(encoded)[:2]
        return simplejpeg.decode_jpeg(
            encoded,
            'RGB',
            fastdct=True,
            min_height=-(-height // reduction),
            min_width=-(-width // reduction),
            min_factor=reduction,
        )
    except ValueError:
        # simplejpeg is strict and also refuses, say, stray bytes. Pillow reads those, and still
        # refuses truncated images.
        return _decode_with_pillow(encoded, upright=False)[::reduction, ::reduction]


def _decode_with_pillow(
    encoded: bytes,
    upright: bool = True,
    convert: Callable[[Image.Image], Image.Image] | None = None,
) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(encoded), formats=_PILLOW_FORMATS) as image:
            _check_size(image.height, image.width)
            image.load()
            return np.asarray((convert or _to_rgb)(_upright(image) if upright else image))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f'more than {MAX_PIXELS:,} pixels; make the image smaller') from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        reason = 'not an image' if isinstance(error, Image.UnidentifiedImageError) else error
        if reason == 'not an image' and encoded.startswith(_TIFF):
            reason = 'a TIFF that is neither gray nor RGB of 8 bits: see model.channels'
        raise ImageError(f'cannot be decoded: {reason}') from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # an image with damaged EXIF data is still readable
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith('I'):  # 16 bits, sometimes stored in 32
        gray = np.asarray(image).clip(0, 2**16 - 1) >> 8
        return Image.fromarray(gray.astype(np.uint8)).convert('RGB')
    if image.mode == 'F':
        raise ImageError(
            'floating-point images have no known range: give the values that become 0 and 255 by '
            'data.value_range=LOW,HIGH'
        )
    if image.has_transparency_data:
        image = image.convert('RGBA')
        white = Image.new('RGBA', image.size, 'white')
        return Image.alpha_composite(white, image).convert('RGB')
    return image.convert('RGB')


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ImageError(
            f'{width}x{height} pixels are more than {MAX_PIXELS:,}; make the image smaller'
        )


def _jpeg_orientation(encoded: bytes) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 (upright) if there is none."""
    if b'Exif\0\0' not in encoded[: 2**16]:
        return 1
    try:
        with Image.open(io.BytesIO(encoded), formats=_PILLOW_FORMATS) as image:
            return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # an image with damaged EXIF data is still readable
        return 1


def _turn(image: np.ndarray, orientation: int) -> np.ndarray:
    """Returns the upright image, given the EXIF `orientation` it is stored in."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return image
