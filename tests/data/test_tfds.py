import functools
import shutil

import chex
import numpy as np
import pytest

from experiments import prepare_data
from nfnets_jax.data import tfds
from nfnets_jax.data.preprocessing import decode
from nfnets_jax.data.sources import identify, open_source, read_labels
from nfnets_jax.data.splits import MissingSplit
from nfnets_jax.errors import UsageError
from tests.tfds_builders import open_prepared


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    data_dir = str(tmp_path_factory.mktemp('tfds'))
    prepare_data.prepare_dataset('tiny_pictures', data_dir)
    prepare_data.prepare_dataset('imagenet_like', data_dir)
    prepare_data.prepare_dataset('three_splits', data_dir)
    return data_dir


def values(source):
    return [int(decode(source[i]['image'])[0, 0, 0]) for i in range(len(source))]


open_tiny = functools.partial(open_prepared, 'tiny_pictures')
open_imagenet_like = functools.partial(open_prepared, 'imagenet_like')


def test_splits_hold_every_picture_once(prepared):
    train, test = open_tiny(prepared), open_tiny(prepared, 'test')
    assert sorted(values(train) + values(test)) == list(range(26))
    assert (len(train), len(test)) == (20, 6)
    assert train.class_names == ('ape', 'bee', 'cat')
    expected = [value % 3 for value in values(train)]
    assert [train[i]['label'] for i in range(20)] == expected
    assert train.labels is None
    np.testing.assert_array_equal(read_labels(train), expected)
    assert train.where(3) == 'tiny_pictures/train[3]'


def test_names_of_files_are_told(tmp_path):
    prepare_data.prepare_dataset('named_pictures', str(tmp_path))
    source = open_prepared('named_pictures', tmp_path, 'test')
    assert source.name == 'named_pictures/validation'
    for i, value in enumerate(values(source)):
        name = f'ILSVRC2012_val_{value + 1:08d}.JPEG'
        assert source.where(i) == f'named_pictures/validation[{i}] {name}'


def test_pictures_of_one_size_come_as_pixels_and_others_as_files(prepared):
    pixels = open_tiny(prepared)[0]['image']
    chex.assert_shape(pixels, (8, 8, 3))
    assert pixels.dtype == np.uint8
    assert isinstance(open_imagenet_like(prepared)[0]['image'], bytes)


def test_split_expressions(prepared):
    whole = values(open_tiny(prepared))
    assert values(open_tiny(prepared, train_split='train[5:]')) == whole[5:]
    assert values(open_tiny(prepared, 'test', test_split='train[:25%]')) == whole[:5]
    both = open_tiny(prepared, train_split='train+test')
    assert sorted(values(both)) == list(range(26))


def test_a_validation_split_is_one_that_is_used_for_nothing_else(prepared):
    def opened(split='validation', **options):
        return values(open_prepared('three_splits', prepared, split, **options))

    assert sorted(opened()) == list(range(10, 16))
    assert sorted(opened('test')) == list(range(16, 20))
    assert opened(validation_split='train[:3]') == opened('train')[:3]
    for used in ({'test_split': 'validation'}, {'train_split': 'train+validation'}):
        with pytest.raises(MissingSplit):
            opened(**used)
    for open_other in (open_tiny, open_imagenet_like):  # the validation split of one is its test
        with pytest.raises(MissingSplit):
            open_other(prepared, 'validation')


@pytest.mark.parametrize(
    ('options', 'match'),
    [
        ({'train_split': 'trian'}, r"data\.train_split='trian': .*did you mean 'train'"),
        ({'train_split': 'train[5'}, r"data\.train_split='train\[5'"),
        ({'train_split': 'train[20:]'}, 'no examples'),
        ({'data_dir': 'nowhere'}, r'run python -m experiments\.prepare_data --dataset=tiny_p'),
        ({'dataset': 'cifar1'}, r"data\.dataset='cifar1': unknown \(did you mean 'cifar10'"),
        ({'dataset': 'imagenet2012'}, 'not found in .* run python -m experiments.prepare_data'),
    ],
)
def test_mistakes_are_named(prepared, options, match):
    with pytest.raises(UsageError, match=match):
        open_source(
            'tfds', 'train', **({'dataset': 'tiny_pictures', 'data_dir': prepared} | options)
        )


def test_files_that_disappear(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    (file,) = tmp_path.glob('tiny_pictures/*/*train*')
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UsageError, match=r'missing or damaged .* run python'):
        open_tiny(str(tmp_path))
    file.unlink()
    with pytest.raises(UsageError, match=r'missing or damaged .* run python'):
        open_tiny(str(tmp_path))


def test_the_splits_of_the_paper(prepared, monkeypatch):
    """TRAIN and VALID share TFDS's train split (at 10,000; here at 5), TEST is its validation."""
    published = tfds.PAPER_SPLITS['imagenet2012']
    assert published['TRAIN'] == 'train[10000:]'
    assert published['VALID'] == 'train[:10000]'
    small = {name: split.replace('10000', '5') for name, split in published.items()}
    monkeypatch.setattr(tfds, 'PAPER_SPLITS', {'imagenet_like': small})

    def opened(split, **options):
        return values(open_imagenet_like(prepared, split, **options))

    train, valid = (opened('train', train_split=name) for name in ('TRAIN', 'VALID'))
    assert (len(train), len(valid)) == (15, 5)
    assert sorted(train + valid) == list(range(20))
    assert opened('train', train_split='TRAIN_AND_VALID') == valid + train
    assert opened('test') == opened('test', test_split='TEST')
    assert sorted(opened('test')) == [20, 21, 22, 23]


def test_identity_sees_which_examples_are_taken(prepared, tmp_path):
    whole = identify(open_tiny(prepared))
    assert whole[:2] == (('ape', 'bee', 'cat'), 20)
    assert whole == identify(open_tiny(prepared, train_split='train[:100%]'))
    others = [
        open_tiny(prepared, 'test'),
        open_tiny(prepared, train_split='train[:10]'),
        open_tiny(prepared, train_split='train[10:]'),
        open_imagenet_like(prepared),
    ]
    assert len({whole.checksum, *(identify(other).checksum for other in others)}) == 5
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    assert identify(open_tiny(str(tmp_path))) == whole
