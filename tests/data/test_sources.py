import numpy as np
import pytest
import sklearn.datasets

from nfnets_jax.data import sources
from nfnets_jax.data.sources import (
    SOURCES,
    ArraySource,
    Digits,
    identify,
    load_digits,
    open_source,
    source_options,
)
from nfnets_jax.data.splits import MissingSplit
from nfnets_jax.errors import UsageError
from tests.data.test_folder import make_folder


def test_digits_are_split_once_and_for_all():
    train, test = Digits('train'), Digits('test')
    assert (len(train), len(test)) == (1442, 355)
    assert train.class_names == tuple('0123456789')
    shares = np.bincount(test.labels) / (np.bincount(train.labels) + np.bincount(test.labels))
    np.testing.assert_allclose(shares, 0.2, atol=0.005)
    seen = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in seen for image in test.images)


def test_digits_are_those_of_scikit_learn():
    images, labels = load_digits()
    expected = sklearn.datasets.load_digits()
    np.testing.assert_array_equal(images, expected.images)
    np.testing.assert_array_equal(labels, expected.target)


def test_digits_may_be_fewer():
    train = Digits('train', classes=(7, 3), per_class=10)
    np.testing.assert_array_equal(np.bincount(train.labels), [10, 10])
    assert train.class_names == ('7', '3')
    every = Digits('train')
    sevens = every.images[every.labels == 7]
    np.testing.assert_array_equal(train.images[train.labels == 0], sevens[:10])
    test = Digits('test', classes=(7, 3), per_class=10)
    assert len(test) == np.sum(np.isin(Digits('test').labels, (3, 7)))


@pytest.mark.parametrize(
    'options',
    [
        {'classes': ()},
        {'classes': (1, 1)},
        {'classes': (10,)},
        {'classes': (3,)},
        {'per_class': 0},
        {'per_class': 141},  # there are 140 eights
    ],
)
def test_digits_that_are_not_there_are_named(options):
    with pytest.raises(UsageError, match=rf'data\.{next(iter(options))}(\[0\])?='):
        Digits('train', **options)


def test_arrays_may_come_from_a_file(tmp_path):
    images = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    path = tmp_path / 'pictures.npz'
    arrays = {'train_images': images[:2], 'test_images': images[2:], 'test_labels': [2]}
    np.savez(path, train_labels=[0, 1], **arrays)
    train, test = (open_source('arrays', split, path=str(path)) for split in ('train', 'test'))
    np.testing.assert_array_equal(train[1]['image'], images[1])
    assert (test[0]['label'], test.class_names) == (2, ('0', '1', '2'))
    assert train.class_names == test.class_names

    np.savez(path, **arrays)
    with pytest.raises(UsageError, match=r'pictures.npz.*train_labels are missing: it holds'):
        open_source('arrays', 'train', path=str(path))
    np.savez_compressed(path, train_labels=[0, 1], **arrays)
    whole = path.read_bytes()
    for damaged in (b'', whole[:-30], whole[:200] + bytes(64) + whole[264:]):
        (tmp_path / 'damaged.npz').write_bytes(damaged)
        with pytest.raises(UsageError, match=r'damaged\.npz.*: not an \.npz file'):
            open_source('arrays', 'train', path=str(tmp_path / 'damaged.npz'))
    path.write_text('no archive')
    with pytest.raises(UsageError, match=r'not an \.npz file'):
        open_source('arrays', 'train', path=str(path))
    with pytest.raises(UsageError, match=r'No such file'):
        open_source('arrays', 'train', path=str(tmp_path / 'other.npz'))


def test_an_array_file_may_have_a_validation_split(tmp_path):
    images = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)
    parts = {'Train': slice(0, 3), 'val': slice(3, 5), 'test': slice(5, 6)}
    arrays = {f'{name}_images': images[part] for name, part in parts.items()}
    arrays |= {f'{name}_labels': np.arange(6)[part] % 3 for name, part in parts.items()}

    def opened(split, **more):
        np.savez(tmp_path / 'a.npz', **arrays, **more)
        return open_source('arrays', split, path=str(tmp_path / 'a.npz'))

    assert [len(opened(split)) for split in ('train', 'validation', 'test')] == [3, 2, 1]
    assert opened('train').left_out == {}
    assert opened('train', x_train=images).left_out == {'x_train': 1}
    with pytest.raises(UsageError, match='more than one split is called like validation'):
        opened('train', valid_images=images)
    del arrays['test_images']
    with pytest.raises(UsageError, match='test_images are missing: it holds Train_images'):
        opened('test')
    del arrays['test_labels']
    assert len(opened('test')) == 2
    with pytest.raises(MissingSplit):
        opened('validation')
    with pytest.raises(MissingSplit, match='digits has no split'):
        open_source('digits', 'validation')


@pytest.mark.parametrize('labels', [[1, 1], [0, 0]])
def test_arrays_of_a_single_class_are_refused(tmp_path, labels):
    images = np.zeros((2, 4, 4, 3), np.uint8)
    path = str(tmp_path / 'a.npz')
    splits = {'train_images': images, 'test_images': images, 'test_labels': [0, 1]}
    np.savez(path, train_labels=labels, **splits)
    with pytest.raises(UsageError, match=rf"one class only, '{labels[0]}': there is nothing"):
        open_source('arrays', 'train', path=path)


def test_digits_keep_their_picture_when_enlarged():
    small, large = Digits('test', image_size=8), Digits('test', image_size=32)
    assert large[0]['image'].shape == (32, 32, 3)
    assert large[0]['image'].dtype == np.uint8
    assert small.images.max() == 255
    assert small.images.min() == 0
    blocks = large.images.astype(float).reshape(-1, 8, 4, 8, 4, 3).mean((2, 4))
    assert np.corrcoef(blocks.ravel(), small.images.ravel())[0, 1] > 0.98


def test_array_source_returns_what_it_was_given():
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    source = ArraySource(images, [1, 0], ('cat', 'dog'))
    assert len(source) == 2
    np.testing.assert_array_equal(source[1]['image'], images[1])
    assert source.class_names[source[0]['label']] == 'dog'
    assert ArraySource(images, [0, 2]).class_names == ('0', '1', '2')


def test_images_may_have_several_labels(tmp_path):
    images = np.zeros((3, 4, 4, 3), np.uint8)
    labels = np.array([[1, 1, 0], [0, 0, 0], [0, 1, 0]])
    for given in (labels, labels.astype(bool), labels.astype(float), np.asfortranarray(labels)):
        source = ArraySource(images, given)
        np.testing.assert_array_equal(source[0]['label'], [1, 1, 0])
        assert (source.labels.dtype, source.class_names) == (np.uint8, ('0', '1', '2'))
        assert source.checksum() == ArraySource(images, labels).checksum()
    assert source.checksum() != ArraySource(images, labels[::-1]).checksum()

    path = tmp_path / 'several.npz'
    arrays = {'train_images': images, 'test_images': images, 'test_labels': labels}
    np.savez(path, train_labels=labels, **arrays)
    assert open_source('arrays', 'train', path=path).class_names == ('0', '1', '2')
    np.savez(path, train_labels=[0, 1, 2], **arrays)
    with pytest.raises(UsageError, match='one split has several labels for an image, another has'):
        open_source('arrays', 'train', path=path)
    np.savez(path, train_labels=np.repeat(labels[:1], 3, 0), **arrays)
    with pytest.raises(UsageError, match='of no class are there images that have it and images'):
        open_source('arrays', 'train', path=path)


def test_a_single_column_of_labels_counts_as_one_label():
    """As MedMNIST stores them."""
    source = ArraySource(np.zeros((3, 4, 4, 3), np.uint8), [[0], [2], [1]])
    np.testing.assert_array_equal(source.labels, [0, 2, 1])
    assert source[1]['label'] == 2


@pytest.mark.parametrize(
    ('images', 'labels', 'match'),
    [
        (
            np.zeros((2, 4, 4, 3), bool),
            [0, 1],
            r'images must be numbers \[N, H, W, C\] or .* not bool',
        ),
        (np.zeros((2, 4), np.uint8), [0, 1], r'not uint8 \[2, 4\]'),
        (np.zeros((2, 4, 4, 3), np.uint8), [0], 'labels must be 2 integers'),
        (np.zeros((2, 4, 4, 3), np.uint8), [0.0, 1.0], 'labels must be 2 integers'),
        (np.zeros((2, 4, 4, 3), np.uint8), [0, 2], 'from 0 to 2, but there are 2 classes'),
        (np.zeros((2, 4, 4, 3), np.uint8), [-1, 1], 'from -1 to 1'),
        (np.zeros((2, 4, 4, 3), np.uint8), [[0, 1], [2, 0]], r'\[N, classes\] .* 0 or 1, not 2'),
        (np.zeros((2, 4, 4, 3), np.uint8), [[0, 1]], r'or \[2, classes\] of 0 and 1, not'),
        (np.zeros((2, 4, 4, 3), np.uint8), [[0, 1, 0]] * 2, '3 columns, but there are 2 classes'),
    ],
)
def test_array_source_refuses_what_does_not_fit(images, labels, match):
    with pytest.raises(UsageError, match=match):
        ArraySource(images, labels, ('a', 'b'))


def test_open_source(tmp_path):
    assert open_source('digits', 'train', image_size=8)[0]['image'].shape == (8, 8, 3)
    make_folder(tmp_path, ['cat', 'dog'])
    assert open_source('folder', 'train', path=tmp_path).class_names == ('cat', 'dog')


@pytest.mark.parametrize(
    ('arguments', 'options', 'match'),
    [
        (('digit', 'train'), {}, r"data\.name='digit' is unknown .did you mean 'digits'"),
        (('digits', 'tset'), {}, "did you mean 'test'"),
        (
            ('digits', 'train'),
            {'imagesize': 16},
            r"unknown key data\.imagesize .did you mean 'image_size'",
        ),
        (('digits', 'train'), {'image_size': 4}, 'must be an integer of at least 8'),
        (('digits', 'train'), {'image_size': '8'}, r"data\.image_size='8': must be an integer"),
        (
            ('digits', 'train'),
            {'per_class': 2.0},
            r'per_class=2\.0: must be None or an integer of at least 1',
        ),
        (
            ('digits', 'train'),
            {'classes': (1, True)},
            r'data\.classes\[1\]=True: must be an integer',
        ),
        (('noise', 'train'), {'classes': 1}, r'data\.classes=1: must be an integer of at least 2'),
        (('noise', 'train'), {'examples': 9}, r'data\.examples=9: fewer than the 10 classes'),
        (('noise', 'train'), {'examples': False}, r'data\.examples=False: must be an integer'),
        (('folder', 'train'), {'path': 3}, r'data\.path=3: must be a string or a path'),
        (('folder', 'train'), {}, r'data\.path is missing: it must be a string or a path'),
        (('folder', 'train'), {'path': '.', 'test_fraction': 2}, r'data\.test_fraction=2'),
        (('folder', 'train'), {'path': '.', 'split_seed': -1}, r'data\.split_seed=-1'),
    ],
)
def test_open_source_names_what_is_wrong(arguments, options, match):
    with pytest.raises(UsageError, match=match):
        open_source(*arguments, **options)


@pytest.mark.parametrize('name', SOURCES)
def test_every_source_checks_its_options(name):
    with pytest.raises(UsageError, match='unknown key data.nonsense'):
        SOURCES[name]('train', nonsense=1)
    assert 'split' not in source_options(name)


def test_identity_of_arrays_sees_pixels_labels_and_names():
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    first = identify(ArraySource(images, [1, 0], ('cat', 'dog')))
    assert first.class_names == ('cat', 'dog')
    assert first.num_examples == 2
    assert first == identify(ArraySource(images.copy(), np.int8([1, 0]), ('cat', 'dog')))
    others = [
        ArraySource(images, [1, 1], ('cat', 'dog')),
        ArraySource(images, [1, 0], ('cat', 'fox')),
        ArraySource(images[::-1], [1, 0], ('cat', 'dog')),
        ArraySource(images.reshape(2, 2, 8, 3), [1, 0], ('cat', 'dog')),
    ]
    assert first not in [identify(other) for other in others]
    assert identify(Digits('train')) != identify(Digits('test'))
    assert identify(Digits('test')) == identify(open_source('digits', 'test'))


@pytest.mark.parametrize('dtype', ['uint8', 'int8', 'int64'])
def test_labels_may_be_of_any_integer_type(tmp_path, dtype):
    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 100, 127, 1], dtype)
    arrays = {f'{s}_images': images for s in ('train', 'test')}
    np.savez(tmp_path / 'a.npz', **arrays, train_labels=labels, test_labels=labels)
    source = open_source('arrays', 'train', path=str(tmp_path / 'a.npz'))
    assert len(source.class_names) == 128
    assert source[2]['label'] == 127
    largest = ArraySource(images, np.array([0, 255, 1, 2], np.uint8))
    assert len(largest.class_names) == 256


def test_a_share_of_each_class_is_held_out_and_nothing_is_lost():
    images = np.arange(40, dtype=np.uint8).repeat(12).reshape(40, 2, 2, 3)
    labels = np.repeat([0, 1], [30, 10])
    source = sources.ArraySource(images, labels)
    train, validation = sources.hold_out_validation(source, 0.2)
    assert np.bincount(train.labels).tolist() == [24, 8]
    assert np.bincount(validation.labels).tolist() == [6, 2]
    seen = [
        int(part[i]['image'][0, 0, 0]) for part in (train, validation) for i in range(len(part))
    ]
    assert sorted(seen) == list(range(40))
    assert train.where(0) == source.where(seen[0])
    assert len({source.checksum(), train.checksum(), validation.checksum()}) == 3
    again, _ = sources.hold_out_validation(source, 0.2)
    assert again.checksum() == train.checksum()
    several = sources.ArraySource(images, np.eye(2, dtype=int)[labels])
    assert [len(part) for part in sources.hold_out_validation(several, 0.25)] == [30, 10]
    alone = sources.ArraySource(images, [0] * 39 + [1])
    with pytest.raises(UsageError, match=r'data.validation_fraction=0.2: 1: one image'):
        sources.hold_out_validation(alone, 0.2)
