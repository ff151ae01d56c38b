"""Features are those of the network applied directly; each file holds them in order."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from experiments import embed
from nfnets_jax.data.preprocessing import resize_crop
from nfnets_jax.weights import pretrained
from tests.experiments.run.test_image_files import make_weights, save_image


@pytest.fixture(scope='module')
def weights():
    return make_weights(eval_mode='resize_crop_4', mean=(100.0,) * 3, std=(50.0,) * 3)


@pytest.fixture
def images(tmp_path):
    return [save_image(tmp_path / f'images/{i}.png', seed=i) for i in range(3)]


def directly(weights, path):
    pixels = resize_crop(path.read_bytes(), 16, 20)[None]
    normalized = np.float32((pixels - 100.0) / 50)
    network = pretrained.network(weights.metadata)
    outputs, _ = network.apply(weights.params, {}, None, normalized, False)
    return np.asarray(outputs['pool'][0])


def test_features_are_those_of_the_network_applied_directly(weights, images):
    found = list(embed.embed(weights, images, batch_size=2))
    assert [path for path, _ in found] == images
    for path, features in found:
        np.testing.assert_allclose(features, directly(weights, path), rtol=1e-3, atol=1e-4)


def test_images_that_are_not_square(weights, tmp_path):
    metadata = dataclasses.replace(
        weights.metadata, test_size=(12, 24), eval_mode='resize_crop_1.0'
    )
    pixels = np.random.RandomState(0).randint(0, 256, (12, 24, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'wide.png')  # of the size that it is resized to
    network = pretrained.network(metadata)
    normalized = (pixels[None].astype(np.float32) - 100) / 50
    expected, _ = network.apply(weights.params, {}, None, normalized, False)
    ((_, features),) = embed.embed(weights._replace(metadata=metadata), [tmp_path / 'wide.png'])
    np.testing.assert_allclose(features, expected['pool'][0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('suffix', embed.FORMATS)
def test_a_file_holds_paths_and_features_in_order(suffix, tmp_path):
    # A name that is not UTF-8, as Linux permits; one image may be named twice.
    paths = [tmp_path / 'b.png', tmp_path / '\udcff.png', tmp_path / 'b.png']
    features = list(np.random.RandomState(0).standard_normal((3, 5)).astype(np.float32))
    out = tmp_path / f'features{suffix}'
    if suffix == '.npz':
        embed.write_features(out, paths, features)
        with np.load(out) as arrays:
            assert arrays['path'].tolist() == [str(path) for path in paths]
            rows = arrays['features']
    else:
        parquet = pytest.importorskip('pyarrow.parquet')
        embed.write_features(out, paths, features)
        table = parquet.read_table(out)
        names = table['path'].to_pylist()
        assert names == [str(paths[0]), f'{tmp_path}/\\udcff.png', str(paths[2])]
        rows = np.array(table['features'].to_pylist(), np.float32)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.stack(features))
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_the_command_names_what_it_cannot_read_and_does_the_rest(
    command, weights, images, tmp_path
):
    file, out = tmp_path / 'w.safetensors', tmp_path / 'features.npz'
    pretrained.save_weights(file, weights)
    bad = tmp_path / 'images' / '1b.png'
    bad.write_text('no image')
    process = command('embed', f'--weights={file}', f'--out={out}', tmp_path / 'images', devices=1)
    stdout, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert stdout == f'{out}: 8 features of each of 3 images\n'
    assert f'{bad}: ' in err
    assert err.splitlines()[-1] == 'error: 1 of 4 images could not be read'
    with np.load(out) as arrays:
        assert arrays['path'].tolist() == list(map(str, images))
        for path, features in zip(images, arrays['features'], strict=True):
            np.testing.assert_allclose(features, directly(weights, path), rtol=1e-3, atol=1e-4)
