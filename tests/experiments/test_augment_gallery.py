import numpy as np
import pytest
from PIL import Image

from experiments import augment_gallery
from nfnets_jax.augment.operations import OPERATIONS
from nfnets_jax.errors import UsageError

PICTURES = augment_gallery.load_originals('')[:, ::8, ::8]


def test_every_operation_is_shown_and_the_picture_is_written(tmp_path):
    tiles = list(augment_gallery.operations(PICTURES[0], 7))
    assert {title.split()[0] for title, _ in tiles} == set(OPERATIONS)
    images = dict(tiles)
    np.testing.assert_array_equal(images['Invert 0'], 255 - PICTURES[0])
    assert (images['Rotate 21'] != images['Rotate -21']).any()
    augment_gallery.draw(tiles, tmp_path / 'gallery.png')
    assert Image.open(tmp_path / 'gallery.png').size == (1440, 1040)


def test_mixed_pictures_say_how_much_of_each_they_are():
    (title, image), _ = augment_gallery.augmented(PICTURES, {'mixup': 0.2}, 'mix', [1])
    share = float(title.split('(')[1].split()[0])
    expected = share * PICTURES[0].astype(float) + (1 - share) * PICTURES[1]
    np.testing.assert_allclose(image, expected, atol=2.5)


def test_pictures_of_a_directory(tmp_path):
    for name in 'ab':
        Image.new('RGB', (300, 240), (10, 20, 30)).save(tmp_path / f'{name}.png')
    np.testing.assert_array_equal(
        augment_gallery.load_originals(str(tmp_path))[1, 0, 0], [10, 20, 30]
    )
    whole = (tmp_path / 'b.png').read_bytes()
    (tmp_path / 'b.png').write_bytes(whole[:40])
    with pytest.raises(UsageError, match=r'^.*/b\.png: '):
        augment_gallery.load_originals(str(tmp_path))
    (tmp_path / 'a.png').unlink()
    with pytest.raises(UsageError, match='holds fewer than two images'):
        augment_gallery.load_originals(str(tmp_path))
