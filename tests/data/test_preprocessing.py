import functools
import io
import pathlib
import signal
import zlib

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image, ImageOps

from nfnets_jax.data import preprocessing
from nfnets_jax.data.pipeline import eval_batches, train_batches
from nfnets_jax.data.preprocessing import SUFFIXES, ImageError, decode, make_transform
from nfnets_jax.data.sources import ImageFolder
from nfnets_jax.errors import UsageError
from nfnets_jax.pixel_format import RGB, PixelFormat

PICTURES = pathlib.Path(sklearn.datasets.__file__).parent / 'images'
GOLDEN_DIRECTORY = pathlib.Path(__file__).parent.parent / 'golden'
GOLDEN = np.load(GOLDEN_DIRECTORY / 'eval_preprocessing.npz')
TIMM_GOLDEN = np.load(GOLDEN_DIRECTORY / 'timm-preprocessing.npz')


@pytest.fixture(scope='module')
def flower():
    return (PICTURES / 'flower.jpg').read_bytes()


@pytest.fixture(scope='module')
def smooth():
    """An image without detail, which every codec keeps: RGB, 24 x 32 pixels."""
    y, x = np.mgrid[:24, :32]
    return Image.fromarray(np.stack([8 * x, 10 * y, 255 - 4 * x - 4 * y], axis=-1).astype(np.uint8))


def encode(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize('mode', ['crop_resize', 'resize_crop_32'])
@pytest.mark.parametrize('number', [0, 1])
def test_evaluation_equals_the_published_preprocessing(mode, number):
    encoded = (PICTURES / str(GOLDEN['files'][number])).read_bytes()
    small = make_transform(mode, 64)(encoded, None)
    np.testing.assert_allclose(small, GOLDEN[f'{number}_{mode}_64'], atol=1e-3)
    large = make_transform(mode, 256)(encoded, None)
    np.testing.assert_allclose(large.mean((0, 1)), GOLDEN[f'{number}_{mode}_256_mean'], atol=2e-3)
    np.testing.assert_allclose(large[100], GOLDEN[f'{number}_{mode}_256_row100'], atol=1e-3)


@pytest.mark.parametrize('file', ['china.jpg', 'flower.jpg'])
@pytest.mark.parametrize(
    ('model', 'mode', 'size'),
    [
        ('dm_nfnet_f0', 'timm_squash_0.9', 256),
        ('nf_resnet50', 'timm_center_0.94', 288),
        ('nf_regnet_b1', 'timm_center_0.9', 288),
        ('eca_nfnet_l0', 'timm_center_1.0', 288),
        ('test_nfnet', 'timm_center_0.95', 160),
    ],
)
def test_evaluation_equals_timms_preprocessing(model, mode, size, file):
    image = make_transform(mode, size)((PICTURES / file).read_bytes(), None)
    assert image.dtype == np.uint8
    difference = np.abs(image.astype(int) - TIMM_GOLDEN[f'{model}/{file}'])
    assert difference.max() <= 1


@pytest.mark.parametrize('size', [(32, 75), (75, 32)])
@pytest.mark.parametrize('mode', ['timm_squash_0.9', 'timm_center_0.9'])
def test_timms_preprocessing_of_sizes_that_are_not_square(flower, mode, size):
    """Pillow's resize of the whole image, or with its aspect, and the central crop."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(flower)))
    resized = [int(side / 0.9) for side in size]
    if mode.startswith('timm_center'):  # covers both sides
        shrunk = min(image.height / resized[0], image.width / resized[1])
        resized = [round(image.height / shrunk), round(image.width / shrunk)]
    large = np.asarray(image.resize(resized[::-1], Image.Resampling.BICUBIC))
    top, left = (round((large.shape[i] - size[i]) / 2) for i in (0, 1))
    found = make_transform(mode, size)(flower, None)
    assert found.shape == (*size, 3)
    np.testing.assert_array_equal(found, large[top : top + size[0], left : left + size[1]])


@pytest.mark.parametrize('size', [(32, 75), [75, 32]])
def test_published_evaluation_of_sizes_that_are_not_square(flower, size):
    """Each side is treated as the side of a square of its size; `resize` has its own tests."""
    pixels = decode(flower)
    large = preprocessing.resize(pixels, (size[0] + 32, size[1] + 32))
    found = make_transform('resize_crop_32', size)(flower, None)
    np.testing.assert_array_equal(found, large[16 : 16 + size[0], 16 : 16 + size[1]])

    top, left, rows, columns = preprocessing.center_box(*pixels.shape[:2], size)
    assert abs(rows / columns * size[1] / size[0] - 1) < 0.02
    shares = rows / pixels.shape[0], columns / pixels.shape[1]
    limits = [side / (side + 32) for side in size]
    # One side reaches the published share, the other stays below it.
    assert min(limit - share for limit, share in zip(limits, shares, strict=True)) < 0.01
    assert all(share <= limit for limit, share in zip(limits, shares, strict=True))
    crop = preprocessing.resize(pixels[top : top + rows, left : left + columns], tuple(size))
    np.testing.assert_array_equal(make_transform('crop_resize', size)(flower, None), crop)


@pytest.mark.parametrize('size', [(32, 75), (75, 32)])
def test_random_crops_have_the_aspect_of_their_size(flower, size, monkeypatch):
    """Within 3/4 to 4/3 of it, as those of squares; JPEGs are decoded smaller only if they fit."""
    boxes, reductions = [], []
    box, decode_jpeg = preprocessing.random_box, preprocessing._decode_rgb_jpeg

    def recording_box(*args):
        boxes.append(box(*args))
        return boxes[-1]

    def recording_decode(encoded, reduction):
        reductions.append(reduction)
        return decode_jpeg(encoded, reduction)

    monkeypatch.setattr(preprocessing, 'random_box', recording_box)
    monkeypatch.setattr(preprocessing, '_decode_rgb_jpeg', recording_decode)
    for seed in range(60):
        assert make_transform('random_crop', size)(flower, rng(seed)).shape == (*size, 3)
    stretch = size[1] / size[0]
    aspects = [columns / rows / stretch for _, _, rows, columns in filter(None, boxes)]
    assert 0.73 < min(aspects) < 0.8
    assert 1.25 < max(aspects) < 1.37
    for drawn, reduction in zip(boxes, reductions, strict=True):
        if drawn and reduction > 1:
            assert drawn[2] >= reduction * size[0]
            assert drawn[3] >= reduction * size[1]
    assert len(set(reductions)) > 1


@pytest.mark.parametrize('size', [0, (8, 0), (8,), (8, 8, 8), 'x', True])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(UsageError, match=r'image_size=.*: must be a side in pixels, or height'):
        make_transform('random_crop', size)


@pytest.mark.parametrize('mode', ['timm_squash_1.1', 'timm_center_0', 'timm_center_', 'squash_0.9'])
def test_an_unknown_mode_is_refused(mode):
    with pytest.raises(UsageError, match='timm_squash_FRACTION'):
        make_transform(mode, 64)


def test_timms_resize_of_a_line_is_refused():
    """Its shorter side of one pixel would become 71, and the other 14 million."""
    line = np.zeros((1, 200_000, 3), np.uint8)
    with pytest.raises(ImageError, match='pixels are more than'):
        make_transform('timm_center_0.9', 64)(line, None)


def test_resize_crop_takes_pixels_or_a_fraction(flower):
    pixels, fraction = (
        make_transform('resize_crop_32', 224),
        make_transform('resize_crop_0.875', 224),
    )
    np.testing.assert_array_equal(pixels(flower, None), fraction(flower, None))
    whole = make_transform('resize_crop_1', 40)(flower, None)
    np.testing.assert_array_equal(whole, preprocessing.resize(decode(flower), (40, 40)))


def test_resize_keeps_what_cubics_keep():
    """Constants everywhere; away from the border also straight lines."""
    ramp = np.broadcast_to(np.arange(20, dtype=np.uint8)[:, None, None], (20, 7, 3))
    np.testing.assert_allclose(
        preprocessing.resize(np.full((5, 7, 3), 9, np.uint8), (8, 3)), 9, rtol=1e-6
    )
    doubled = preprocessing.resize(ramp, (40, 7))
    expected = (np.arange(40) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(doubled[4:-4, 3, 0], expected[4:-4], atol=1e-5)
    np.testing.assert_array_equal(preprocessing.resize(ramp, (20, 7)), ramp)


@pytest.mark.parametrize('size', [16, 64, 300, 500])
def test_random_crop_is_uint8_of_its_size_and_follows_the_generator(flower, size):
    transform = make_transform('random_crop', size)
    first = transform(flower, rng(0))
    assert first.shape == (size, size, 3)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, transform(flower, rng(0)))
    assert (first != transform(flower, rng(1))).any()


def test_random_crop_shows_a_part_of_the_image(flower):
    pixels = decode(flower)
    top, left, rows, columns = preprocessing.random_box(
        rng(3), *pixels.shape[:2], (0.08, 1), (3 / 4, 4 / 3)
    )
    part = Image.fromarray(pixels[top : top + rows, left : left + columns])
    part = part.resize((100, 100), Image.Resampling.BICUBIC)
    crop = preprocessing.random_crop(pixels, rng(3), 100)
    assert np.abs(crop.astype(float) - part).mean() < 5


def test_a_small_crop_is_decoded_smaller_and_shows_the_same_part(flower):
    """It is nearer to the average of the pixels than a crop of them all, which aliases."""
    pixels = decode(flower)
    for seed in range(5):
        top, left, rows, columns = preprocessing.random_box(
            rng(seed), *pixels.shape[:2], (0.5, 1), (3 / 4, 4 / 3)
        )
        part = Image.fromarray(pixels[top : top + rows, left : left + columns])
        part = part.resize((24, 24), Image.Resampling.BOX)
        small, whole = (
            np.abs(
                preprocessing.random_crop(image, rng(seed), 24, area=(0.5, 1))
                - np.array(part, float)
            )
            for image in (flower, pixels)
        )
        assert small.mean() < whole.mean()
        assert small.mean() < 9


@pytest.mark.parametrize(
    ('height', 'width', 'mean'), [(375, 500, 0.387), (500, 333, 0.337), (100, 900, 0.115)]
)
def test_random_boxes_are_those_of_the_papers(height, width, mean):
    """The means of TensorFlow's sample_distorted_bounding_box, of which .1 has to be covered."""
    boxes = [
        preprocessing.random_box(rng(seed), height, width, (0.08, 1), (3 / 4, 4 / 3))
        for seed in range(3000)
    ]
    found = [box for box in boxes if box]
    assert len(found) > 0.98 * len(boxes)
    top, left, rows, columns = np.transpose(found)
    assert min(top.min(), left.min()) >= 0
    assert (top + rows).max() <= height
    assert (left + columns).max() <= width
    area = rows * columns / (height * width)
    assert 0.1 <= area.min() < 0.101
    np.testing.assert_allclose(area.mean(), mean, rtol=0.02)
    ratio = columns / rows
    assert ratio.min() > 0.74
    assert 1.31 < ratio.max() < 1.35


def test_random_boxes_may_be_small_where_nothing_has_to_be_covered():
    draw = functools.partial(preprocessing.random_box, area=(0.08, 1), aspect=(3 / 4, 4 / 3))
    boxes = [draw(rng(seed), 375, 500, min_covered=0) for seed in range(1000)]
    area = np.array([rows * columns for *_, rows, columns in boxes]) / (375 * 500)
    assert 0.08 <= area.min() < 0.082
    # What is too small is drawn again, from the same random numbers on.
    assert [draw(rng(seed), 375, 500) for seed in np.flatnonzero(area >= 0.1)] == [
        box for box, share in zip(boxes, area, strict=True) if share >= 0.1
    ]


def test_the_whole_image_is_cropped_to_its_centre():
    """As published, where the whole image stands for a part that was not found."""
    image = rng().integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert preprocessing.random_box(rng(), 64, 64, (1, 1), (1, 1)) == (0, 0, 64, 64)
    crop = preprocessing.random_crop(image, rng(), 32, area=(1, 1), aspect=(1, 1))
    np.testing.assert_array_equal(crop, image[16:48, 16:48])


def test_training_crops_are_near_the_published_kernel(flower):
    """The documented difference: 0.7 grey levels in the mean, and no brighter or darker."""
    pixels, differences = decode(flower), []
    for seed in range(10):
        top, left, rows, columns = preprocessing.random_box(
            rng(seed), *pixels.shape[:2], (0.08, 1), (3 / 4, 4 / 3)
        )
        part = pixels[top : top + rows, left : left + columns]
        published = preprocessing.resize(part, (224, 224)).clip(0, 255)
        differences.append(preprocessing.random_crop(pixels, rng(seed), 224) - published)
    assert 0 < np.abs(differences).mean() < 1
    assert abs(np.mean(differences)) < 0.05


def test_random_crop_falls_back_to_the_centre():
    stripe = rng().integers(0, 256, (2, 500, 3), dtype=np.uint8)
    assert preprocessing.random_box(rng(), 2, 500, (0.08, 1), (3 / 4, 4 / 3)) is None
    crop = preprocessing.random_crop(stripe, rng(), 8)
    top, left, rows, columns = preprocessing.center_box(2, 500, 8)
    assert (rows, columns) == (1, 1)
    assert (crop == stripe[top, left]).all()


@pytest.mark.parametrize('mode', ['random_crop', 'crop_resize', 'resize_crop_32'])
@pytest.mark.parametrize('height_width', [(1, 1), (1, 40), (40, 1), (3, 2)])
def test_tiny_images(mode, height_width):
    image = Image.new('RGB', height_width[::-1], (10, 200, 30))
    for format in ('PNG', 'JPEG'):
        out = make_transform(mode, 32)(encode(image, format), rng())
        np.testing.assert_allclose(out - np.array([10.0, 200, 30]), 0, atol=4)


needs_avif = pytest.mark.skipif('.avif' not in SUFFIXES, reason='Pillow without AVIF')
AVIF = pytest.param('AVIF', marks=needs_avif)


@pytest.mark.parametrize('format', ['PNG', 'BMP', 'TIFF', 'PPM', 'GIF', 'WEBP', 'JPEG', AVIF])
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_formats(smooth, format, mode):
    image = smooth.convert(mode)
    pixels = decode(encode(image, format))
    assert pixels.dtype == np.uint8
    difference = pixels.astype(float) - np.asarray(image.convert('RGB'))
    assert np.abs(difference).mean() < (10 if format == 'GIF' and mode == 'RGB' else 3)


def test_cmyk_jpeg(smooth):
    pixels = decode(encode(smooth.convert('CMYK'), 'JPEG', quality=95))
    assert np.abs(pixels.astype(float) - np.asarray(smooth)).mean() < 5


def test_sixteen_bits():
    values = np.linspace(0, 65535, 12 * 8).reshape(8, 12).astype(np.uint16)
    for format in ('PNG', 'TIFF'):
        pixels = decode(encode(Image.fromarray(values), format))
        np.testing.assert_array_equal(pixels, np.repeat((values >> 8)[..., None], 3, axis=-1))


def test_transparent_parts_become_white():
    image = Image.new('RGBA', (4, 2), (200, 100, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 0))
    for variant in (image, image.quantize()):
        pixels = decode(encode(variant, 'PNG'))
        assert pixels[0, 0].tolist() == [255, 255, 255]
        assert pixels[1, 3].tolist() == [200, 100, 0]


def test_the_first_frame_of_an_animation_counts():
    frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue')]
    for format in ('GIF', 'WEBP', 'PNG', 'TIFF'):
        pixels = decode(encode(frames[0], format, save_all=True, append_images=frames[1:]))
        assert pixels.shape == (8, 8, 3)
        assert np.abs(pixels - np.array([255.0, 0, 0])).max() < 5


@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'WEBP'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation(smooth, format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(smooth, format, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert('RGB'))
    pixels = decode(encoded)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(float) - expected).mean() < 2


@pytest.mark.parametrize('orientation', range(1, 9))
def test_random_crop_turns_the_part_of_a_jpeg(smooth, orientation):
    """Equal to the crop of the image as stored, turned by Pillow."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(preprocessing.random_crop(encode(smooth, 'JPEG'), rng(), 8))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encode(stored, 'PNG', exif=exif))))
    crop = preprocessing.random_crop(encode(smooth, 'JPEG', exif=exif), rng(), 8)
    np.testing.assert_array_equal(crop, upright)


def test_a_jpeg_with_stray_bytes_is_read(smooth):
    encoded = encode(smooth, 'JPEG')
    table = encoded.index(b'\xff\xdb')
    stray = encoded[:table] + b'\0\0\0' + encoded[table:]
    np.testing.assert_allclose(decode(stray).astype(float), decode(encoded), atol=8)


def test_a_png_in_jpegs_clothes_is_read(tmp_path, smooth):
    for name in ('cat', 'dog'):
        (tmp_path / 'train' / name).mkdir(parents=True)
        (tmp_path / 'train' / name / 'a.jpg').write_bytes(encode(smooth, 'PNG'))
    source = ImageFolder('train', tmp_path)
    np.testing.assert_array_equal(decode(source[0]['image']), smooth)


@pytest.mark.parametrize(
    'damage',
    [
        lambda encoded: b'',
        lambda encoded: b'not an image',
        lambda encoded: encoded[:4],
        lambda encoded: encoded[:200],
        lambda encoded: encoded[: len(encoded) // 2],
        lambda encoded: encoded[:2] + bytes(len(encoded) - 2),
    ],
)
@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'GIF', 'WEBP', 'TIFF', 'BMP'])
def test_damaged_images_are_image_errors(smooth, damage, format):
    encoded = encode(smooth.resize((320, 240)), format)
    for mode in ('crop_resize', 'random_crop'):
        with pytest.raises(ImageError, match='cannot be decoded'):
            make_transform(mode, 16)(damage(encoded), rng())


def mutations(encoded, rng, count):
    """Yields damaged copies of a file: some bytes replaced, a part lost, doubled or zeroed."""
    for _ in range(count):
        mutated = bytearray(encoded)
        for place in rng.integers(0, len(mutated), rng.integers(1, 10)):
            mutated[place] = rng.integers(256)
        start, stop = sorted(rng.integers(0, len(mutated), 2))
        part = mutated[start:stop]
        match rng.integers(6):
            case 0:
                mutated[start:stop] = b''
            case 1:
                mutated[start:start] = part
            case 2:
                mutated[start:stop] = bytes(len(part))
        yield bytes(mutated)


def read_or_refuse(encoded, rng):
    """Returns whether the image was read; anything but that and an ImageError is a failure."""
    try:
        pixels = make_transform('random_crop', 16)(encoded, rng)
    except ImageError:
        return False
    assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
    return True


FORMATS = ('JPEG', 'PNG', 'GIF', 'WEBP', 'BMP', 'PPM', 'TIFF', AVIF)


@pytest.mark.filterwarnings('ignore')  # Pillow's, about the damage
@pytest.mark.parametrize('format', FORMATS)
def test_mutated_images_never_do_worse_than_an_image_error(smooth, format):
    random = rng()
    read = [read_or_refuse(x, random) for x in mutations(encode(smooth, format), random, 100)]
    assert 0 < sum(read) < 100


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # Pillow's, about the damage
@pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK', 'P', 'RGBA'])
@pytest.mark.parametrize('format', ['JPEG', 'PNG', 'GIF', 'WEBP', 'TIFF'])
def test_ten_thousand_mutated_images(format, mode):
    """No crash, no hang: one that takes 10 seconds of processor time would end the tests."""
    image = Image.open(PICTURES / 'flower.jpg').resize((160, 120)).convert(mode)
    try:
        encoded = encode(image, format)
    except (OSError, ValueError):
        pytest.skip(f'{format} has no {mode}')
    random = rng(1)
    for mutated in mutations(encoded, random, 600):
        signal.setitimer(signal.ITIMER_PROF, 10)  # SIGPROF ends the process.
        try:
            read_or_refuse(mutated, random)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


@pytest.mark.parametrize('format', ['JPEG', 'PNG'])
def test_a_huge_image_is_refused_by_its_header(format):
    encoded = bytearray(encode(Image.new('RGB', (16, 16)), format))
    if format == 'PNG':
        encoded[16:24] = (20_000).to_bytes(4) * 2
        encoded[29:33] = zlib.crc32(encoded[12:29]).to_bytes(4)
    else:
        size = encoded.index(b'\xff\xc0') + 5
        encoded[size : size + 4] = (20_000).to_bytes(2) * 2
    for mode in ('crop_resize', 'random_crop'):
        with pytest.raises(ImageError, match='pixels'):
            make_transform(mode, 16)(bytes(encoded), rng())


def test_floating_point_images_are_refused():
    image = Image.fromarray(np.zeros((4, 4), np.float32))
    with pytest.raises(ImageError, match='floating-point'):
        decode(encode(image, 'TIFF'))


def test_the_pipeline_names_the_bad_file(tmp_path, smooth):
    directory = tmp_path / 'train' / 'cat'
    for name in ('cat/a', 'cat/b', 'dog/c'):
        (tmp_path / 'train' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'train' / f'{name}.jpg').write_bytes(encode(smooth, 'JPEG'))
    source = ImageFolder('train', tmp_path)
    batch = next(
        train_batches(source, batch_size=3, seed=0, transform=make_transform('random_crop', 8))
    )
    assert batch['image'].shape == (3, 8, 8, 3)
    (directory / 'b.jpg').write_bytes(b'text')
    batches = eval_batches(source, batch_size=3, transform=make_transform('crop_resize', 8))
    with pytest.raises(ImageError, match=r'cat/b\.jpg: cannot be decoded: not an image'):
        next(batches)


@pytest.mark.parametrize(
    ('mode', 'size', 'match'),
    [
        ('crop', 8, "preprocessing 'crop': unknown .known: random_crop"),
        ('resize_crop_', 8, "'resize_crop_': unknown"),
        ('resize_crop_-1', 8, "'resize_crop_-1': unknown"),
        ('resize_crop_nan', 8, "'resize_crop_nan': unknown"),
        ('crop_resize', 0, 'image_size=0'),
    ],
)
def test_unknown_modes_and_sizes(mode, size, match):
    with pytest.raises(UsageError, match=match):
        make_transform(mode, size)


GRAY = PixelFormat(1)


def encode_array(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize('format', ['PNG', 'JPEG', 'TIFF'])
def test_one_channel_is_pillows_gray(flower, format):
    picture = Image.open(io.BytesIO(flower))
    encoded = encode(picture, format)
    expected = np.asarray(Image.open(io.BytesIO(encoded)).convert('L'))
    found = decode(encoded, GRAY, exact_dct=True)
    assert found.shape == (*expected.shape, 1)
    np.testing.assert_array_equal(found[..., 0], expected)
    gray = picture.convert('L')
    np.testing.assert_array_equal(decode(encode(gray, 'PNG'), GRAY)[..., 0], np.asarray(gray))


def test_gray_images_of_sixteen_bits_and_transparent_ones_have_one_channel():
    wide = Image.fromarray(np.full((3, 4), 0x1234, np.uint16))
    assert decode(encode(wide, 'PNG'), GRAY).tolist() == [[[0x12]] * 4] * 3
    clear = Image.new('RGBA', (4, 3), (9, 9, 9, 0))
    assert (decode(encode(clear, 'PNG'), GRAY) == 255).all()


@pytest.mark.parametrize('mode', ['timm_squash_0.9', 'timm_center_0.8'])
@pytest.mark.parametrize('channels', [1, 2, 5])
def test_timms_evaluation_resizes_every_channel_as_pillow_does(flower, mode, channels):
    rgb = np.asarray(Image.open(io.BytesIO(flower)).resize((91, 60)))
    bands = np.concatenate([rgb, 255 - rgb], axis=-1)[..., :channels]
    found = make_transform(mode, 40, PixelFormat(channels))(bands, None)
    for channel in range(channels):
        gray = np.repeat(bands[..., channel : channel + 1], 3, axis=-1)
        expected = make_transform(mode, 40)(gray, None)
        np.testing.assert_array_equal(found[..., channel], expected[..., 0])


@pytest.mark.parametrize('mode', ['random_crop', 'crop_resize', 'resize_crop_8'])
def test_every_channel_is_cropped_and_resized_alike(flower, mode):
    rgb = np.asarray(Image.open(io.BytesIO(flower)).resize((91, 60)))
    six = np.concatenate([rgb, rgb[..., ::-1]], axis=-1)
    found = make_transform(mode, (24, 40), PixelFormat(6))(six, rng())
    expected = make_transform(mode, (24, 40))(rgb, rng())
    atol = 1 if mode == 'random_crop' else 1e-4  # OpenCV rounds the last bit differently.
    np.testing.assert_allclose(np.float32(found[..., :3]), expected, atol=atol)
    np.testing.assert_allclose(np.float32(found[..., 3:]), expected[..., ::-1], atol=atol)
    gray = make_transform(mode, (24, 40), GRAY)(rgb[..., 1], rng())
    assert gray.shape == (24, 40, 1)
    np.testing.assert_allclose(np.float32(gray), expected[..., 1:2], atol=atol)


def test_a_crop_of_a_jpeg_in_gray_is_the_luma_of_its_crop(flower):
    crop = make_transform('random_crop', 32, GRAY)(flower, rng())
    color = make_transform('random_crop', 32)(flower, rng())
    luma = np.asarray(Image.fromarray(color).convert('L'))
    differences = abs(crop[..., 0].astype(int) - luma)  # It is taken before resizing.
    assert differences.mean() < 0.5
    assert differences.max() < 10  # where the cubic overshoots


@pytest.mark.parametrize('dtype', ['uint16', 'int16', 'float16', 'float32', 'float64'])
def test_a_range_of_values_becomes_eight_bits(dtype):
    low, high = (-80, 0) if dtype != 'uint16' else (0, 10_000)
    values = rng().uniform(1.2 * low, 1.2 * high + 1, (7, 5, 4)).astype(dtype)
    values[0, 0, :2] = low, high
    scaled = (values.astype(np.float64) - low) / (high - low) * 255
    expected = np.floor(scaled.clip(0, 255) + 0.5)
    found = decode(encode_array(values), PixelFormat(4, (low, high)))
    assert found.dtype == np.uint8
    assert abs(found - expected).max() <= 1  # halves are rounded to even
    assert np.mean(found != expected) < 0.05
    assert {found.min(), found.max()} == {0, 255}


def test_eight_bits_are_left_as_they_are():
    values = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    for pixels in (PixelFormat(5), PixelFormat(5, (0, 1))):
        np.testing.assert_array_equal(decode(encode_array(values), pixels), values)
    flat = values[..., 0]
    np.testing.assert_array_equal(decode(encode_array(flat), GRAY)[..., 0], flat)
    np.testing.assert_array_equal(decode(flat)[..., 2], flat)  # gray becomes RGB


@pytest.mark.parametrize(
    ('array', 'pixels', 'match'),
    [
        (np.zeros((4, 4, 5), np.uint8), RGB, 'has 5 channels, .* takes 3: give model.channels=5'),
        (np.zeros((5, 4, 4), np.uint8), PixelFormat(5), 'has 4 channels, .* must be the last axis'),
        (np.zeros((4, 4), np.uint8), PixelFormat(2), 'has 1 channels, but the network takes 2'),
        (np.zeros((4, 4), np.float32), GRAY, 'float32 has no known range: .* data.value_range=LOW'),
        (np.full((4, 4), np.nan), PixelFormat(1, (0, 1)), 'holds NaN'),
        (np.zeros((4, 4), complex), PixelFormat(1, (0, 1)), 'complex128 has no known range'),
        (np.zeros(4), GRAY, r'must be \[H, W\] or \[H, W, C\], not \[4\]'),
        (np.zeros((0, 4), np.uint8), GRAY, r'not \[0, 4, 1\]'),
    ],
)
def test_arrays_that_are_no_images_are_refused(array, pixels, match):
    for image in (array, encode_array(array)):
        with pytest.raises(ImageError, match=match):
            decode(image, pixels)


@pytest.mark.parametrize('damage', [b'', b'\x01', b'\x01\x00v\x00{}'])
def test_damaged_arrays_are_image_errors(damage):
    with pytest.raises(ImageError, match='cannot be read as an array'):
        decode(b'\x93NUMPY' + damage, GRAY)


def test_pickled_arrays_are_not_executed():
    with pytest.raises(ImageError, match='cannot be read as an array'):
        decode(encode_array(np.array([[{}]])), GRAY)


def test_bands_of_an_image_with_transparency_are_read_as_they_are():
    bands = rng().integers(0, 256, (5, 6, 4), np.uint8)
    encoded = encode(Image.fromarray(bands, 'RGBA'), 'PNG')
    np.testing.assert_array_equal(decode(encoded, PixelFormat(4)), bands)
    with pytest.raises(ImageError, match='has 3 channels, but the network takes 5'):
        decode(encode(Image.fromarray(bands[..., :3]), 'PNG'), PixelFormat(5))


@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'float32'])
@pytest.mark.parametrize('layout', ['samples', 'planes', 'pages'])
def test_bands_of_a_tiff(dtype, layout):
    tifffile = pytest.importorskip('tifffile')
    bands = rng().integers(0, 200, (6, 7, 5)).astype(dtype)
    options = {'photometric': 'minisblack'}
    if layout != 'pages':
        options['planarconfig'] = {'samples': 'contig', 'planes': 'separate'}[layout]
    stream = io.BytesIO()
    stored = bands if layout == 'samples' else np.moveaxis(bands, -1, 0)
    tifffile.imwrite(stream, stored, compression='zlib', **options)
    found = decode(stream.getvalue(), PixelFormat(5, (0, 255)))
    np.testing.assert_array_equal(found, bands)
    with pytest.raises(ImageError, match='has 5 channels, but the network takes 4'):
        decode(stream.getvalue(), PixelFormat(4))
    if layout == 'samples':  # Of others Pillow shows the first.
        with pytest.raises(ImageError, match='TIFF that is neither gray nor RGB'):
            decode(stream.getvalue())
    for cut in (20, 60):
        with pytest.raises(ImageError, match='cannot be decoded'):
            decode(stream.getvalue()[:cut], PixelFormat(5, (0, 255)))
