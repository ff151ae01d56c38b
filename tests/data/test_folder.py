import collections
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from nfnets_jax.data.folder import ImageFolder, find_images
from nfnets_jax.data.preprocessing import SUFFIXES, ImageError, decode
from nfnets_jax.data.sources import identify, read_labels
from nfnets_jax.data.splits import MissingSplit
from nfnets_jax.errors import UsageError


def make_folder(root, classes, images=5):
    """Writes `images` files into every class directory; each holds its own path."""
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(images):
            (root / name / f'{i}.jpg').write_text(f'{name}/{i}')


def test_with_split_directories(tmp_path):
    make_folder(tmp_path / 'train', ['dog', 'cat', '.cache'], images=3)
    make_folder(tmp_path / 'val', ['dog'], images=2)
    (tmp_path / 'train' / 'cat' / 'notes.txt').write_text('not an image')
    train, test = ImageFolder('train', tmp_path), ImageFolder('test', tmp_path)
    assert train.class_names == test.class_names == ('cat', 'dog')
    assert [train[i]['image'] for i in range(len(train))] == [
        f'{name}/{i}'.encode() for name in ('cat', 'dog') for i in range(3)
    ]
    assert [test[i]['label'] for i in range(len(test))] == [1, 1]
    np.testing.assert_array_equal(read_labels(test), [1, 1])
    assert train.where(4) == str(tmp_path / 'train' / 'dog' / '1.jpg')


def test_draws_its_own_split(tmp_path):
    make_folder(tmp_path, ['a', 'b', 'c'], images=10)

    def files(split, seed):
        source = ImageFolder(split, tmp_path, test_fraction=0.3, split_seed=seed)
        return [source.where(i) for i in range(len(source))]

    train, test = files('train', 0), files('test', 0)
    assert len(test) == 9
    assert sorted(train + test) == sorted(map(str, tmp_path.glob('*/*.jpg')))
    assert test == files('test', 0)
    assert test != files('test', 1)


def test_names_what_is_wrong(tmp_path):
    with pytest.raises(UsageError, match=r"data\.path='': not a directory"):
        ImageFolder('train', '')
    with pytest.raises(UsageError, match=r'nowhere.*not a directory'):
        ImageFolder('train', tmp_path / 'nowhere')
    with pytest.raises(UsageError, match='no class directories'):
        ImageFolder('train', tmp_path)
    make_folder(tmp_path / 'train', ['cat', 'dog'])
    with pytest.raises(UsageError, match=r"no split 'tset' \(did you mean 'test'\?\)"):
        ImageFolder('tset', tmp_path)
    with pytest.raises(UsageError, match='none of test, testing, val, valid, validation'):
        ImageFolder('test', tmp_path)
    make_folder(tmp_path / 'test', ['dogs'])
    with pytest.raises(UsageError, match=r"dogs: .*did you mean 'dog'"):
        ImageFolder('test', tmp_path)
    (tmp_path / 'train' / 'empty').mkdir()
    with pytest.raises(UsageError, match=r'train/empty: no images'):
        ImageFolder('train', tmp_path)


def test_cannot_split_one_image(tmp_path):
    make_folder(tmp_path, ['many', 'one'])
    for i in range(1, 5):
        (tmp_path / 'one' / f'{i}.jpg').unlink()
    with pytest.raises(UsageError, match=r'one: one image cannot be split'):
        ImageFolder('train', tmp_path)


def test_a_file_that_disappears_is_an_image_error(tmp_path):
    make_folder(tmp_path / 'train', ['cat', 'dog'])
    source = ImageFolder('train', tmp_path)
    (tmp_path / 'train' / 'cat' / '2.jpg').unlink()
    with pytest.raises(ImageError, match='cannot be read: No such file'):
        source[2]


def opened(path, split='train', **options):
    return ImageFolder(split, path, **options)


def names(source):
    return [os.path.relpath(source.where(i), source.origin) for i in range(len(source))]


@pytest.mark.parametrize(
    ('directories', 'train', 'validation', 'test'),
    [
        (('Train', 'Test'), 'Train', None, 'Test'),
        (('training', 'validation'), 'training', None, 'validation'),
        (('TRAINING', 'Testing'), 'TRAINING', None, 'Testing'),
        (('train', 'Valid', 'test'), 'train', 'Valid', 'test'),
        (('train', 'val', 'testing', 'extra'), 'train', 'val', 'testing'),
    ],
)
def test_names_of_splits_have_no_case(tmp_path, directories, train, validation, test):
    for name in directories:
        make_folder(tmp_path / name, ['cat', 'dog'])
    assert opened(tmp_path).origin == str(tmp_path / train)
    assert opened(tmp_path).class_names == ('cat', 'dog')
    assert opened(tmp_path, 'test').origin == str(tmp_path / test)
    if validation:
        assert opened(tmp_path, 'validation').origin == str(tmp_path / validation)
    else:
        with pytest.raises(MissingSplit):
            opened(tmp_path, 'validation')


@pytest.mark.parametrize(
    ('directories', 'match'),
    [
        (('val', 'test'), r'holds val/, test/ but none of train, training; name .*train_split'),
        (('valid', 'Testing', 'VALIDATION'), r'holds VALIDATION/, valid/; say which .*validation_'),
        (('training_set', 'test_set'), r'training_set/ hold no images but directories, cat, dog'),
        (('a', 'b', 'test'), r'test/ looks like a split beside 2 classes; name what to train on'),
        (('train', 'Train', 'test'), r'holds Train/, train/; say which .* data.train_split=Train'),
        (('dataset',), r"one class only, 'dataset', which holds cat/, dog/: .* give .*/dataset"),
        (('train', 'extra'), 'holds train/ but none of test'),
    ],
)
def test_a_layout_that_is_none_is_refused(tmp_path, directories, match):
    for name in directories:
        make_folder(tmp_path / name, ['cat', 'dog'])
    with pytest.raises(UsageError, match=match):
        opened(tmp_path, 'test')


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    make_folder(tmp_path, ['bus', 'car', 'train'])
    assert opened(tmp_path).class_names == ('bus', 'car', 'train')
    make_folder(tmp_path / 'more', ['train', 'test'])
    assert opened(tmp_path / 'more', train_split='.').class_names == ('test', 'train')


def test_images_may_lie_in_a_directory_of_their_class(tmp_path):
    make_folder(tmp_path / 'cat', ['images'])
    make_folder(tmp_path / 'dog', ['images'])
    assert len(opened(tmp_path)) + len(opened(tmp_path, 'test')) == 10


def test_splits_may_be_named(tmp_path):
    for name in ('learn', 'exam', 'val', 'deep/train'):
        make_folder(tmp_path / name, ['cat', 'dog'])
    given = {'train_split': 'learn', 'test_split': 'exam'}
    splits = [opened(tmp_path, split, **given).origin for split in ('train', 'validation', 'test')]
    assert splits == [str(tmp_path / name) for name in ('learn', 'val', 'exam')]
    given = {'train_split': 'deep/train', 'test_split': 'val'}
    assert opened(tmp_path, **given).origin == str(tmp_path / 'deep' / 'train')
    with pytest.raises(MissingSplit):  # val is tested on
        opened(tmp_path, 'validation', **given)


@pytest.mark.parametrize(
    ('options', 'match'),
    [
        ({'test_split': 'vla'}, r"data\.test_split='vla': no such .*did you mean 'val'"),
        ({'train_split': '.', 'test_split': 'val'}, r"data\.test_split='val': .* no splits"),
        ({'test_split': 'train'}, r'train is or lies in .*train: .* would share images'),
        ({'test_split': 'train/cat'}, r'train/cat is or lies in .*train: '),
        ({'test_fraction': 0.5}, r'data\.test_fraction=0\.5: nothing is held out'),
        ({'split_seed': 0}, r'data\.split_seed=0: nothing is held out'),
    ],
)
def test_options_that_cannot_be_are_named(tmp_path, options, match):
    for name in ('train', 'val'):
        make_folder(tmp_path / name, ['cat', 'dog'])
    with pytest.raises(UsageError, match=match):
        opened(tmp_path, **options)


@pytest.mark.parametrize('path', ['one', 'one/cat', 'splits'])
def test_a_single_class_is_refused(tmp_path, path):
    make_folder(tmp_path / 'one', ['cat'])
    make_folder(tmp_path / 'splits' / 'train', ['cat'])
    make_folder(tmp_path / 'splits' / 'val', ['cat'])
    with pytest.raises(UsageError, match='one class only|images lie directly in it'):
        opened(tmp_path / path)


def test_a_link_to_a_parent_shows_no_file_twice(tmp_path):
    make_folder(tmp_path, ['a', 'b'], images=8)
    expected = names(opened(tmp_path)), names(opened(tmp_path, 'test'))
    (tmp_path / 'a' / 'up').symlink_to('..')
    (tmp_path / 'a' / 'deep').mkdir()
    (tmp_path / 'a' / 'deep' / 'upper').symlink_to(tmp_path.parent)
    (tmp_path / 'b' / 'self').symlink_to('self')
    (tmp_path / 'c').symlink_to('.')
    train, test = opened(tmp_path), opened(tmp_path, 'test')
    assert (names(train), names(test)) == expected
    assert (len(train), len(test)) == (12, 4)
    assert train.left_out == {'link to a parent directory': 2, 'link to nowhere': 1}


def test_links_are_followed_to_every_file_once(tmp_path):
    make_folder(tmp_path / 'elsewhere', ['dog', 'more', 'other'], images=3)
    root = tmp_path / 'data'
    make_folder(root / 'test', ['cat', 'dog'])
    make_folder(root / 'train', ['cat'], images=3)
    (root / 'train' / 'dog').symlink_to(tmp_path / 'elsewhere' / 'dog')
    cat = root / 'train' / 'cat'
    (cat / '00.jpg').symlink_to('2.jpg')  # itself in the class
    (cat / '9.jpg').symlink_to(tmp_path / 'elsewhere' / 'other' / '0.jpg')
    (cat / 'a').symlink_to(tmp_path / 'elsewhere' / 'more')
    (cat / 'z').symlink_to(tmp_path / 'elsewhere' / 'more')
    (tmp_path / 'elsewhere' / 'more' / 'back').symlink_to(cat)
    (cat / 'lost.jpg').symlink_to('nowhere.jpg')
    files = ('0.jpg', '1.jpg', '2.jpg', '9.jpg', 'a/0.jpg', 'a/1.jpg', 'a/2.jpg', 'lost.jpg')
    source = opened(root)
    assert names(source) == [f'cat/{f}' for f in files] + [f'dog/{i}.jpg' for i in range(3)]
    with pytest.raises(ImageError, match='No such file'):  # told when it is read
        source[7]


@pytest.mark.parametrize(
    ('link', 'target'), [('b/x.jpg', '../a/1.jpg'), ('b/more', '../a'), ('c', 'a'), ('b/u', '../c')]
)
def test_a_file_in_two_classes_is_refused(tmp_path, link, target):
    make_folder(tmp_path, ['a', 'b', 'c'])
    if not (tmp_path / link).parent.samefile(tmp_path):
        (tmp_path / link).symlink_to(target)
    else:
        (tmp_path / 'd').symlink_to(target)
    with pytest.raises(UsageError, match='are one file in two classes'):
        opened(tmp_path)


def test_splits_that_share_their_images_are_refused(tmp_path):
    make_folder(tmp_path / 'train', ['a', 'b'])
    (tmp_path / 'test').symlink_to('train')
    with pytest.raises(UsageError, match='would share images'):
        opened(tmp_path)


def test_a_class_that_is_a_link_to_nowhere_is_named(tmp_path):
    make_folder(tmp_path, ['a', 'b'])
    (tmp_path / 'c').symlink_to('gone')
    with pytest.raises(UsageError, match='/c: a link to gone, which is not there'):
        opened(tmp_path)


def test_a_directory_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    make_folder(tmp_path / 'b', ['deep', 'other'])
    make_folder(tmp_path, ['a'])
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith('deep'):
            raise PermissionError(13, 'Permission denied')
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(UsageError, match='b/deep: cannot be read: Permission denied'):
        opened(tmp_path)


def test_what_decodes_is_taken_and_the_rest_is_counted(tmp_path):
    """By content where there is no suffix; hidden files do not count."""
    files = ['a.jpg', 'b.JPG', 'c.jfif', 'd.jpe', 'e.Png', 'f.webp', 'g.tif', 'h']
    files += ['i.avif'] if '.avif' in SUFFIXES else []
    for name in ('cat', 'dog'):
        directory = tmp_path / name
        (directory / '.thumbnails').mkdir(parents=True)
        (directory / '.thumbnails' / 'a.jpg').touch()
        for i, file in enumerate(files):
            suffix = pathlib.Path(file).suffix.lower()
            format = Image.registered_extensions().get(suffix, 'PNG')
            Image.new('RGB', (8, 8), (20 * i, 0, 0)).save(directory / file, format)
        for file in ('x.heic', 'y.HEIC', 'notes.txt', 'README', 'Thumbs.db', '.DS_Store'):
            (directory / file).write_text('no image')
        os.mkfifo(directory / 'pipe.jpg')
    (tmp_path / 'loose.png').touch()
    (tmp_path / '__MACOSX').mkdir()
    train, test = opened(tmp_path), opened(tmp_path, 'test')
    assert sorted(names(train) + names(test)) == sorted(
        f'{n}/{f}' for n in train.class_names for f in files
    )
    assert {decode(train[i]['image']).shape for i in range(len(train))} == {(8, 8, 3)}
    counted = {'.heic': 4, '.txt': 2, 'no suffix': 2, 'not a file': 2, 'beside the classes': 1}
    assert train.left_out == test.left_out == counted


def test_identity_sees_names_and_not_where_they_are(tmp_path):
    for split in ('train', 'test'):
        make_folder(tmp_path / 'here' / split, ['cat', 'dog'])
    first = identify(opened(tmp_path / 'here'))
    assert first[:2] == (('cat', 'dog'), 10)
    (tmp_path / 'here').rename(tmp_path / 'there')
    root = tmp_path / 'there'
    assert identify(opened(root)) == first
    cat, dog = root / 'train' / 'cat', root / 'train' / 'dog'
    seen = [first]
    for old, new in (
        (cat / '1.jpg', cat / '7.jpg'),  # renamed
        (dog / '1.jpg', cat / '1.jpg'),  # of another class
        (cat, root / 'train' / 'eel'),  # a class renamed
        (root / 'train' / 'eel' / '0.jpg', tmp_path / '0.jpg'),  # removed
    ):
        old.rename(new)
        seen.append(identify(opened(root)))
    assert len({identity.checksum for identity in seen}) == 5


def test_identity_does_not_depend_on_the_encoding_of_names(tmp_path):
    make_folder(tmp_path, ['cat', 'dog'])
    os.rename(tmp_path / 'cat' / '0.jpg', os.fsencode(tmp_path / 'cat') + b'/\xff.jpg')
    assert len(identify(opened(tmp_path)).checksum) == 64


def test_arrays_are_images_where_a_class_has_no_others(tmp_path):
    for name, suffixes in (('a', ('.npy',)), ('b', ('.npy', '.txt')), ('c', ('.png', '.npy'))):
        (tmp_path / name).mkdir()
        for i, suffix in enumerate(suffixes * 5):
            path = tmp_path / name / f'{i}{suffix}'
            if suffix == '.npy':
                np.save(path, np.full((4, 4), i, np.uint8))
            elif suffix == '.png':
                Image.new('L', (4, 4)).save(path)
            else:
                path.touch()
    source = ImageFolder('all', tmp_path)
    suffixes = [pathlib.Path(source.where(i)).suffix for i in range(len(source))]
    assert collections.Counter(zip(source.labels.tolist(), suffixes, strict=True)) == {
        (0, '.npy'): 5,
        (1, '.npy'): 5,
        (2, '.png'): 5,
    }
    assert source.left_out == {'.txt': 5, '.npy': 5}  # those beside images may be anything
    assert find_images(tmp_path / 'a') == sorted((tmp_path / 'a').iterdir())
    np.testing.assert_array_equal(decode(source[1]['image'])[..., 0], np.full((4, 4), 1))
