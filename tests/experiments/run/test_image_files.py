"""The images that a command names, and the network's output for each of them."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from experiments.run import image_files
from nfnets_jax.data.preprocessing import crop_resize
from nfnets_jax.errors import UsageError
from nfnets_jax.pixel_format import PixelFormat
from nfnets_jax.weights import pretrained

METADATA = pretrained.Metadata(
    model='NF-ResNet-8', options={'widths': (8,), 'depths': (1,)}, num_classes=3, test_size=16
)


def save_image(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(path, 'PNG')
    return path


def make_weights(**changes):
    metadata = dataclasses.replace(METADATA, **changes)
    rng = np.random.RandomState(0)
    variables = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32),
        pretrained.variable_shapes(metadata),
    )
    return pretrained.Weights(*variables, metadata)


def test_directories_are_searched_at_any_depth(tmp_path):
    inside = save_image(tmp_path / 'd' / 'deep' / 'a.JPG')
    beside = save_image(tmp_path / 'd' / 'b.png')
    (tmp_path / 'd' / 'notes.txt').write_text('no image')
    named = tmp_path / 'anything'
    found = image_files.expand_directories([str(named), str(tmp_path / 'd')])
    assert found == [named, beside, inside]
    (tmp_path / 'empty').mkdir()
    assert image_files.expand_directories([str(tmp_path / 'empty')]) == [tmp_path / 'empty']
    long = 300 * 'a'  # longer than a name may be
    assert image_files.expand_directories([long]) == [pathlib.Path(long)]
    ((_, problem),) = image_files.outputs(make_weights(), [pathlib.Path(long)], 1)
    assert problem == 'cannot be read: File name too long'


@pytest.mark.parametrize('paths', [[], ['a.png', '']])
def test_a_path_must_be_named(paths):
    with pytest.raises(UsageError, match='^name images, or directories of images$'):
        image_files.expand_directories(paths)


def test_each_row_is_of_its_own_image_whatever_the_batch(tmp_path):
    weights = make_weights()
    paths = [save_image(tmp_path / f'{i}.png', seed=i) for i in range(5)]
    paths.insert(2, tmp_path / 'absent.png')
    (tmp_path / 'empty').mkdir()
    paths.append(tmp_path / 'empty')
    one_by_one = list(image_files.outputs(weights, paths, 1))
    batches = list(image_files.outputs(weights, paths, 3))
    assert [path for path, _ in batches] == paths
    assert batches[2][1] == one_by_one[2][1] == 'cannot be read: No such file or directory'
    assert batches[6][1] == 'there are no images in this directory'
    for i in (0, 1, 3, 4, 5):
        np.testing.assert_allclose(batches[i][1], one_by_one[i][1], rtol=1e-4)
    assert np.abs(batches[0][1] - batches[1][1]).max() > 0.01


def test_images_have_the_channels_of_the_weights(tmp_path):
    """Gray from a color image; what has other channels is named."""
    channels = {'channels': 1}
    weights = make_weights(options=METADATA.options | channels, mean=(100.0,), std=(50.0,))
    path, bands = save_image(tmp_path / 'a.png'), tmp_path / 'b.npy'
    np.save(bands, np.zeros((20, 20, 2), np.uint8))
    (_, found), (_, refused) = image_files.outputs(weights, [path, bands], 2)
    assert refused == 'has 2 channels, but the network takes 1: give model.channels=2'
    gray = np.asarray(Image.open(path).convert('L'))[..., None]
    pixels = (crop_resize(gray, 16, PixelFormat(1)) - 100) / 50
    network = pretrained.network(weights.metadata)
    apply = jax.jit(network.apply, static_argnums=4)
    outputs, _ = apply(weights.params, weights.state, None, pixels[None], False)
    np.testing.assert_allclose(found, outputs['logits'][0], rtol=1e-4, atol=1e-4)
