"""Decoding, cropping and resizing on the host: one picture in, one array out.

A transform is a function (image, rng) -> array [size, size, 3] of uint8 or float32, 0..255, where
`image` is the bytes of an encoded picture or a uint8 array [H, W, 3], and `rng` a numpy Generator
that only the random crop uses. `make_transform` returns the one of a name.
"""

import functools
import io
import os
from collections.abc import Callable, Sequence

import numpy as np

from nfnets_jax import extras
from nfnets_jax.errors import UsageError

with extras.optional():
    import cv2
    import simplejpeg
    from PIL import Image, ImageOps
MAX_PIXELS = 178_956_970  # 0.5 GB as RGB; where Pillow, too, suspects a decompression bomb

# No format that runs another program (EPS) or is not a picture of pixels.
Image.init()
_PILLOW_FORMATS = tuple(
    format
    for format in ('JPEG', 'PNG', 'GIF', 'BMP', 'WEBP', 'TIFF', 'PPM', 'AVIF')
    if format in Image.OPEN  # AVIF is, from Pillow 11.3 on
)
SUFFIXES = frozenset(
    suffix
    for suffix, format in Image.registered_extensions().items()
    if format in _PILLOW_FORMATS and suffix != '.pfm'  # of floating-point numbers
)
_ORIENTATION = 0x0112  # EXIF tag


class PictureError(UsageError):
    """A picture that cannot be read. Who knows its file adds the name."""


def make_transform(mode: str, image_size: int) -> Callable:
    """Returns the transform called `mode`, to square pictures of `image_size` pixels.

    Args:
        mode: 'random_crop' for training. For evaluation the authors' 'crop_resize',
            'resize_crop_32' (any number of pixels) or 'resize_crop_0.875' (any fraction), or
            timm's 'timm_squash_0.9' and 'timm_center_0.9' (any fraction).
        image_size: pixels.

    Raises:
        UsageError: no such mode or size.
    """
    if image_size < 1:
        raise UsageError(f'image_size={image_size}: must be positive')
    if mode == 'random_crop':
        return functools.partial(random_crop, size=image_size)
    if mode == 'crop_resize':
        return lambda image, rng: crop_resize(image, image_size)
    name, _, margin = mode.rpartition('_')
    try:
        if name == 'resize_crop':
            resized = _resized_size(image_size, float(margin))
            return lambda image, rng: resize_crop(image, image_size, resized)
        if name in ('timm_squash', 'timm_center') and 0 < float(margin) <= 1:
            resized, squash = int(image_size / float(margin)), name == 'timm_squash'
            return lambda image, rng: timm_resize_crop(image, image_size, resized, squash=squash)
    except ValueError:
        pass
    raise UsageError(
        f'preprocessing {mode!r}: unknown (known: random_crop, crop_resize, resize_crop_PIXELS, '
        'resize_crop_FRACTION, timm_squash_FRACTION, timm_center_FRACTION)'
    )


def random_crop(
    image: bytes | np.ndarray,
    rng: np.random.Generator,
    size: int,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    min_covered: float = 0.1,
) -> np.ndarray:
    """Returns a random part of an image at `size`, uint8 [size, size, 3]: the training crop.

    The published one but for three things. It is resized bicubically as OpenCV does, with a = -3/4
    instead of the -1/2 of TensorFlow and `resize`: that differs by 0.69 grey levels in the mean (of
    600 crops of ImageNet at 224 pixels; at an edge by up to 24) and is not biased. The published
    kernel as products of small matrices takes 0.39 ms an image more, of 1.09 in all. Where the part
    of a JPEG is more than 2, 4 or 8 times too large, libjpeg decodes the image at that fraction of
    its size, which is both faster and free of aliasing. And the result is rounded to uint8.

    Args:
        area: range of the part's share of the image.
        aspect: range of the part's width / height.
        min_covered: share of the image that has to be covered.
    """

    def draw_box(height, width):
        box = random_box(rng, height, width, area, aspect, min_covered)
        # As published: the whole image means that none was found, even where it was drawn.
        return box if box and box[2:] != (height, width) else centre_box(height, width, size)

    if isinstance(image, np.ndarray) or not _has_rgb_jpeg(image):
        pixels = decode(image)
        return _resized_part(pixels, draw_box(*pixels.shape[:2]), size)
    # The part is chosen in the image as stored: it tells how finely to decode, and only the small
    # result has to be turned upright.
    box = draw_box(*simplejpeg.decode_jpeg_header(image)[:2])
    reduction = next((r for r in (8, 4, 2) if min(box[2:]) >= r * size), 1)
    pixels = _decode_rgb_jpeg(image, reduction)
    part = _resized_part(pixels, [round(x / reduction) for x in box], size)
    return _turn(part, _jpeg_orientation(image))


def _resized_part(pixels: np.ndarray, box: Sequence[int], size: int) -> np.ndarray:
    top, left, rows, columns = box
    part = pixels[top : top + rows, left : left + columns]
    return cv2.resize(part, (size, size), interpolation=cv2.INTER_CUBIC)


def random_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    area: tuple[float, float],
    aspect: tuple[float, float],
    min_covered: float = 0.1,
    attempts: int = 10,
) -> tuple[int, int, int, int] | None:
    """Returns (top, left, rows, columns) of a random part of an image, or None if none is found.

    The distribution is that of TensorFlow's sample_distorted_bounding_box for a box that is the
    whole image, which the published networks were trained with. The aspect is uniform, then the
    height is uniform among those that fit and have an area in range, so that small parts are
    likelier than with a uniform area. Parts that cover less than `min_covered` of the image are
    drawn again. The last row and the last column where a part could begin are never drawn.
    """
    for _ in range(attempts):
        ratio = rng.uniform(*aspect)
        lowest, highest = (round((share * height * width / ratio) ** 0.5) for share in area)
        highest = min(highest, height, int((width + 0.5) / ratio))
        if round(highest * ratio) > width:
            highest -= 1
        rows = int(rng.integers(min(lowest, highest), highest + 1))
        # Rounding may have led out of the range by one row.
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


def centre_box(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Returns (top, left, rows, columns) of the central square: size / (size + 32) of what fits."""
    side = max(1, int(np.float32(size / (size + 32)) * np.float32(min(height, width))))
    return (height - side + 1) // 2, (width - side + 1) // 2, side, side


def crop_resize(image: bytes | np.ndarray, size: int) -> np.ndarray:
    """Returns the central square of a picture at `size`, float32 [size, size, 3], not clamped.

    The published evaluation preprocessing, equal to it within rounding (see `resize`).
    """
    pixels = decode(image)
    height, width = pixels.shape[:2]
    top, left, rows, columns = centre_box(height, width, size)
    return resize(pixels[top : top + rows, left : left + columns], (size, size))


def resize_crop(image: bytes | np.ndarray, size: int, resized: int) -> np.ndarray:
    """Returns the centre of a picture resized to a square of `resized` pixels, as `crop_resize`.

    As published, the aspect is not kept.
    """
    start = (resized - size + 1) // 2
    large = resize(decode(image), (resized, resized))
    return large[start : start + size, start : start + size]


def timm_resize_crop(
    image: bytes | np.ndarray, size: int, resized: int, *, squash: bool
) -> np.ndarray:
    """Returns the center of a resized image, uint8 [size, size, 3]: timm's evaluation transform.

    Pillow decodes (with the exact DCT) and resizes by its bicubic (a = -1/2) with antialiasing,
    rounded to uint8, as timm does for `crop_mode` 'squash' or 'center' and 'bicubic'.

    Args:
        image: bytes of an encoded image, or uint8 [H, W, 3].
        size: pixels of the result.
        resized: pixels before the crop, at least `size`.
        squash: whether both sides become `resized`. Otherwise the shorter side does and the aspect
            is kept.
    """
    pixels = image if isinstance(image, np.ndarray) else _decode_with_pillow(image)
    picture = Image.fromarray(pixels)
    shorter = min(picture.size)
    width, height = (resized if squash else resized * side // shorter for side in picture.size)
    _check_size(height, width)
    large = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    top, left = round((height - size) / 2), round((width - size) / 2)
    return large[top : top + size, left : left + size]


def _resized_size(size: int, margin: float) -> int:
    """Returns what to resize to before cropping: `margin` is pixels to add, or a share to keep."""
    if not 0 < margin < float('inf'):
        raise ValueError
    return int(size + margin) if margin > 1 else int(size / margin)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns `image` [H, W, C] at `size`, float32 and not clamped, as TensorFlow's bicubic does.

    Keys' cubic convolution (a = -1/2) at half-pixel centres without antialiasing: every pixel is a
    weighted sum of 4 x 4, and so the resize one of four rows, then one of four columns.
    """
    taps, weights = _bicubic(image.shape[0], size[0])
    rows = np.einsum('ok,okwc->owc', weights, image[taps].astype(np.float32))
    taps, weights = _bicubic(image.shape[1], size[1])
    return np.einsum('ok,hokc->hoc', weights, rows[:, taps])


@functools.lru_cache(maxsize=1024)
def _bicubic(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns, for every output pixel of an axis, the four inputs it is made of and their weights.

    Inputs outside the picture weigh nothing and the others sum to 1. Fractions are rounded to
    1/1024, because TensorFlow looks its weights up in a table of that length.
    """
    centres = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    first = np.floor(centres)
    taps = first.astype(int)[:, None] + np.arange(-1, 3)
    fraction = np.rint((centres - first) * 1024) / 1024
    x = np.abs(fraction[:, None] - np.arange(-1, 3))
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, far) * ((taps >= 0) & (taps < size_in))
    weights /= weights.sum(axis=1, keepdims=True)
    return taps.clip(0, size_in - 1), weights.astype(np.float32)


def decode(image: bytes | np.ndarray) -> np.ndarray:
    """Returns a picture's pixels, uint8 [H, W, 3]; an array is returned as it is.

    What the bytes are is read from themselves. JPEG is decoded as TensorFlow does (libjpeg-turbo
    with the fast DCT), all else by Pillow: grey and palette colours, CMYK and 16 bits become
    RGB of 8 bits, transparent parts white, of an animation the first frame counts. The picture is
    turned as its EXIF data say, which the authors' code does not.

    Raises:
        PictureError: not a picture, a damaged or truncated one, or one of more than MAX_PIXELS.
    """
    if isinstance(image, np.ndarray):
        return image
    if _has_rgb_jpeg(image):
        return _turn(_decode_rgb_jpeg(image), _jpeg_orientation(image))
    return _decode_with_pillow(image)


def is_image(path: str | os.PathLike) -> bool:
    """Whether a file begins like an image of a format that `decode` reads."""
    try:
        with Image.open(path, formats=_PILLOW_FORMATS):
            return True
    except Image.DecompressionBombError:
        return True  # `decode` says that it is too large
    except Exception:  # Pillow raises nearly anything on files that are not images
        return False


def _has_rgb_jpeg(encoded: bytes) -> bool:
    """Says whether libjpeg-turbo can decode the picture to RGB, as a look at its header tells."""
    if not encoded.startswith(b'\xff\xd8'):
        return False
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return False  # Pillow shall say what is wrong
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
        # Strict: it also refuses what can be read in spite of, say, stray bytes. Pillow knows the
        # difference to a truncated picture.
        return _decode_with_pillow(encoded, upright=False)[::reduction, ::reduction]


def _decode_with_pillow(encoded: bytes, upright: bool = True) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(encoded), formats=_PILLOW_FORMATS) as picture:
            _check_size(picture.height, picture.width)
            picture.load()
            return np.asarray(_to_rgb(_upright(picture) if upright else picture))
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(f'more than {MAX_PIXELS:,} pixels; make the picture smaller') from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        reason = 'not a picture' if isinstance(error, Image.UnidentifiedImageError) else error
        raise PictureError(f'cannot be decoded: {reason}') from error


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # damaged EXIF data do not make a damaged picture
        return picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith('I'):  # 16 bits, sometimes held in 32
        grey = np.asarray(picture).clip(0, 2**16 - 1) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert('RGB')
    if picture.mode == 'F':
        raise PictureError('pictures of floating-point numbers have no known range')
    if picture.has_transparency_data:
        picture = picture.convert('RGBA')
        white = Image.new('RGBA', picture.size, 'white')
        return Image.alpha_composite(white, picture).convert('RGB')
    return picture.convert('RGB')


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise PictureError(
            f'{width}x{height} pixels are more than {MAX_PIXELS:,}; make the picture smaller'
        )


def _jpeg_orientation(encoded: bytes) -> int:
    """Returns how the EXIF data say the picture is stored, 1 to 8; 1 (upright) if they do not."""
    if b'Exif\0\0' not in encoded[: 2**16]:
        return 1
    try:
        with Image.open(io.BytesIO(encoded), formats=_PILLOW_FORMATS) as picture:
            return picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data do not make a damaged picture
        return 1


def _turn(image: np.ndarray, orientation: int) -> np.ndarray:
    """Returns a picture stored in an EXIF `orientation` upright."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return image
