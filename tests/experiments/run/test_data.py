import numpy as np
import pytest
from PIL import Image

from experiments import prepare_data
from experiments.config import default_config
from experiments.experiment import build
from experiments.run.data import open_data
from nfnets_jax.augment import IMAGENET_MEAN, IMAGENET_STD
from nfnets_jax.data import sources
from nfnets_jax.errors import UsageError
from tests.tfds_builders import TinyPictures


def config_of(**data):
    config = default_config()
    config.data = data
    return config


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    """Options of a data set whose images have one size."""
    data_dir = str(tmp_path_factory.mktemp('tfds'))
    prepare_data.prepare_dataset('tiny_pictures', data_dir)
    assert TinyPictures.SHAPE == (8, 8, 3)
    return {'name': 'tfds', 'dataset': 'tiny_pictures', 'data_dir': data_dir}


def test_pictures_of_one_size_are_left_as_they_are(tiny):
    train, _, test, spec = open_data(config_of(**tiny))
    assert (len(train), len(test)) == (20, 6)
    assert (spec.shape, spec.test_size) == ((8, 8, 3), 8)
    assert spec.train_transform is None
    assert spec.test_transform is None


def test_pictures_of_one_size_are_cropped_if_a_size_is_given(tiny):
    train, _, test, spec = open_data(config_of(**tiny, image_size=12, test_image_size=10))
    image = spec.train_transform(train[0]['image'], np.random.default_rng(0))
    assert (image.shape, image.dtype) == (spec.shape, np.uint8) == ((12, 12, 3), np.uint8)
    assert spec.test_transform(test[0]['image'], None).shape == (10, 10, 3)


@pytest.mark.parametrize(
    ('options', 'match'),
    [
        ({'image_size': 6}, r"data\.image_size=6: the images of 'tfds' are 8x8 and left as they"),
        ({'test_image_size': 16}, r'data\.test_image_size=16: the images'),
        ({'test_mode': 'resize_crop_32'}, r"data\.test_mode='resize_crop_32': the images"),
        ({'image_size': 8, 'test_mode': 'crop_resize'}, r"data\.test_mode='crop_resize': the im"),
    ],
)
def test_images_of_one_size_are_not_cropped_by_a_single_option(tiny, options, match):
    with pytest.raises(UsageError, match=match):
        open_data(config_of(**tiny, **options))


def test_the_size_that_images_have_leaves_them_as_they_are(tiny):
    spec = open_data(config_of(**tiny, image_size=8)).image_spec
    assert spec == open_data(config_of(**tiny)).image_spec


def arrays(path, test_size=8, **more):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    labels = np.arange(4) % 2
    test = np.zeros((4, test_size, test_size, 3), np.uint8)
    splits = {'train_images': images, 'train_labels': labels}
    np.savez(path, **splits, test_images=test, test_labels=labels, **more)
    return {'name': 'arrays', 'path': str(path)}


def test_arrays_of_two_sizes_are_refused(tmp_path):
    options = arrays(tmp_path / 'a.npz', test_size=6)
    with pytest.raises(UsageError, match=r"'arrays' are 8x8 to train on but 6x6 in another split"):
        open_data(config_of(**options))
    assert (
        open_data(config_of(**options, image_size=6, test_image_size=6)).image_spec.test_size == 6
    )


def test_a_validation_split_is_there_or_none(tmp_path):
    options = arrays(tmp_path / 'a.npz')
    assert open_data(config_of(**options)).validation is None
    images, labels = np.zeros((3, 8, 8, 3), np.uint8), [0, 1, 0]
    options = arrays(tmp_path / 'a.npz', val_images=images, val_labels=labels)
    data = open_data(config_of(**options))
    assert [len(source) for source in data[:3]] == [4, 3, 4]
    assert data.validation.origin == options['path']


@pytest.fixture
def folder(tmp_path):
    for name in ('ant', 'bee'):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new('RGB', (20 + i, 15)).save(tmp_path / name / f'{i}.png')
    return {'name': 'folder', 'path': str(tmp_path)}


def test_encoded_pictures_come_to_the_published_sizes(folder):
    train, _, test, spec = open_data(config_of(**folder))
    assert (spec.shape, spec.test_size) == ((224, 224, 3), 224)  # of NF-ResNet-50
    image = spec.train_transform(train[0]['image'], np.random.default_rng(0))
    assert (image.shape, image.dtype) == ((224, 224, 3), np.uint8)
    assert spec.test_transform(test[0]['image'], None).shape == (224, 224, 3)


def test_encoded_images_come_to_sizes_that_are_not_square(folder):
    sizes = {'image_size': [12, 20], 'test_image_size': (16, 30)}
    train, _, test, spec = open_data(config_of(**folder, **sizes))
    assert (spec.shape, spec.test_size) == ((12, 20, 3), (16, 30))
    image = spec.train_transform(train[0]['image'], np.random.default_rng(0))
    assert image.shape == spec.shape
    assert spec.test_transform(test[0]['image'], None).shape == (16, 30, 3)


def test_arrays_that_are_not_square_have_their_size(tmp_path):
    images = np.zeros((4, 8, 12, 3), np.uint8)
    splits = {
        f'{s}_{k}': v
        for s in ('train', 'test')
        for k, v in (('images', images), ('labels', [0, 1, 0, 1]))
    }
    np.savez(tmp_path / 'a.npz', **splits)
    options = {'name': 'arrays', 'path': str(tmp_path / 'a.npz')}
    spec = open_data(config_of(**options, image_size=(8, 12))).image_spec
    assert (spec.shape, spec.test_size, spec.test_transform) == ((8, 12, 3), (8, 12), None)
    with pytest.raises(
        UsageError, match=r'image_size=\(12, 8\): the images of .* are 8x12 and left'
    ):
        open_data(config_of(**options, image_size=(12, 8)))


@pytest.mark.parametrize(
    ('model', 'mode'), [('NFNet-F0', 'resize_crop_32'), ('NF-RegNet-B0', 'crop_resize')]
)
def test_images_are_evaluated_as_the_models_authors_do(folder, model, mode):
    config = config_of(**folder)
    config.model.name = model
    assert open_data(config)[-1].test_mode == mode
    config.data.test_mode = 'resize_crop_0.5'
    assert open_data(config)[-1].test_mode == 'resize_crop_0.5'


@pytest.mark.parametrize(
    ('options', 'match'),
    [
        ({'image_size': 0}, r'image_size=0: must be a side in pixels, or height and width'),
        ({'image_size': (8, 8, 3)}, r'image_size=\(8, 8, 3\): must be a side in pixels'),
        ({'image_size': (8, 0)}, r'image_size=\(8, 0\): must be a side in pixels, or height'),
        ({'test_image_size': '8'}, r"test_image_size='8': must be a side in pixels"),
        ({'test_mode': 'crop'}, "preprocessing 'crop': unknown"),
        ({'mean': (0.5, 0.5)}, r'mean=\(0\.5, 0\.5\): must be 3 numbers'),
        ({'std': (1, 1, 0)}, r'std\[2\]=0: must be a number above 0'),
        ({'imagesize': 8}, r"imagesize .did you mean 'image_size'"),
    ],
)
def test_mistakes_are_named(folder, options, match):
    with pytest.raises(UsageError, match=f'config.data.*{match}'):
        build(config_of(**folder, **options))


def save_arrays(path, images, **more):
    labels = np.arange(len(images)) % 2
    each = {'images': images, 'labels': labels}
    np.savez(path, **{f'{s}_{k}': v for s in ('train', 'test') for k, v in each.items()}, **more)
    return {'name': 'arrays', 'path': str(path)}


def of_channels(channels, **options):
    config = config_of(**options)
    config.model = {'name': 'SmallCNN', 'channels': channels}
    return config


@pytest.mark.parametrize('shape', [(8, 12), (8, 12, 1), (8, 12, 3)])
def test_arrays_become_gray_where_the_network_takes_one_channel(tmp_path, shape):
    images = np.random.default_rng(0).integers(0, 256, (4, *shape)).astype(np.uint8)
    options = save_arrays(tmp_path / 'a.npz', images)
    train, _, _, spec = open_data(of_channels(1, **options))
    expected = images[2].reshape(8, 12, -1)
    if shape[-1] == 3:
        expected = np.asarray(Image.fromarray(expected).convert('L'))[..., None]
    np.testing.assert_array_equal(train[2]['image'], expected)
    assert (spec.shape, spec.pixels.channels) == ((8, 12, 1), 1)
    assert spec.mean == (pytest.approx(np.mean(IMAGENET_MEAN)),)
    assert spec.std == (pytest.approx(np.mean(IMAGENET_STD)),)


def test_gray_arrays_become_rgb_for_a_network_of_three_channels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8)).astype(np.uint8)
    train, *_, spec = open_data(config_of(**save_arrays(tmp_path / 'a.npz', images)))
    assert spec.shape == (8, 8, 3)
    np.testing.assert_array_equal(train[1]['image'], np.stack([images[1]] * 3, axis=-1))


def test_multispectral_arrays_of_sixteen_bits(tmp_path):
    images = np.random.default_rng(0).integers(0, 12_000, (4, 8, 8, 5)).astype(np.uint16)
    options = save_arrays(tmp_path / 'a.npz', images) | {'value_range': (1000, 10_000)}
    config = of_channels(5, **options, mean=(1, 2, 3, 4, 5), image_size=6, test_image_size=4)
    train, _, test, spec = open_data(config)
    expected = np.rint((images[3].clip(1000, 10_000) / 9000 - 1 / 9) * 255)
    np.testing.assert_array_equal(train[3]['image'], expected)
    assert train.checksum() == sources.ArrayFile('train', options['path']).checksum()
    assert spec.mean == (1, 2, 3, 4, 5)
    assert spec.std == (*IMAGENET_STD, *IMAGENET_STD[:2])
    assert spec.train_transform(train[0]['image'], np.random.default_rng(0)).shape == (6, 6, 5)
    assert spec.test_transform(test[0]['image'], None).shape == (4, 4, 5)


@pytest.mark.parametrize(
    ('channels', 'dtype', 'options', 'match'),
    [
        (3, 'uint8', {}, r'a.npz \(train\)\[0\]: has 5 channels, .* give model.channels=5'),
        (5, 'float32', {}, r'\[0\]: float32 has no known range: .* by data.value_range=LOW,HIGH'),
        (5, 'uint8', {'value_range': (0, 1)}, r'value_range=\(0.0, 1.0\): .* are uint8 as they'),
        (5, 'float32', {'value_range': (1, 0)}, r'value_range=\(1, 0\): must be two growing num'),
        (5, 'float32', {'value_range': (0, float('inf'))}, r'value_range.*inf'),
        (5, 'uint8', {'mean': (1, 2, 3)}, r'mean=\(1, 2, 3\): must be 5 numbers, one for each'),
    ],
)
def test_channels_and_values_that_do_not_fit_are_named(tmp_path, channels, dtype, options, match):
    options |= save_arrays(tmp_path / 'a.npz', np.zeros((4, 8, 8, 5), dtype))
    with pytest.raises(UsageError, match=f'config.data.*{match}'):
        build(of_channels(channels, **options))


def test_files_of_arrays_are_tried_before_anything_is_written(tmp_path):
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        for i in range(5):
            np.save(tmp_path / name / f'{i}.npy', np.zeros((8, 8), np.float32))
    options = {'name': 'folder', 'path': str(tmp_path)}
    with pytest.raises(UsageError, match=r'config.data: .*/a/.*npy: float32 has no known range'):
        build(of_channels(1, **options))
    spec = open_data(of_channels(1, **options, value_range=(-1, 1), image_size=6)).image_spec
    image = (tmp_path / 'a' / '0.npy').read_bytes()
    crop = spec.train_transform(image, np.random.default_rng(0))
    np.testing.assert_array_equal(crop, np.full((6, 6, 1), 128))  # 127.5 is rounded to even


def test_synthetic_images_have_any_number_of_channels():
    config = of_channels(4, name='noise')
    config.data.channels = 4
    assert open_data(config).image_spec.shape == (32, 32, 4)
