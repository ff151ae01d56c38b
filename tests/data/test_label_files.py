"""ImageNet's validation directory, whose images lie directly in it, and its files of labels."""

import numpy as np
import pytest
import scipy.io
from PIL import Image

from nfnets_jax.data.sources import identify, open_source
from nfnets_jax.data.splits import MissingSplit
from nfnets_jax.errors import UsageError

# The first WordNet IDs of ILSVRC2012 in the order of its own numbers, 1 to 4.
ILSVRC = ('n02119789', 'n02100735', 'n02110185', 'n02096294')
CLASSES = tuple(sorted(ILSVRC))
LABELS = (2, 0, 3, 1, 1, 0)  # of the validation images, numbers in CLASSES
IMAGES = tuple(f'ILSVRC2012_val_{i:08d}' for i in range(1, 7))
WORDNET = tuple(CLASSES[label] for label in LABELS)


@pytest.fixture
def imagenet(tmp_path):
    for name in CLASSES:
        for i in range(2):
            save(tmp_path / 'train' / name / f'{name}_{i}.JPEG')
    for image in IMAGES:
        save(tmp_path / 'val' / f'{image}.JPEG')
    return tmp_path


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8)).save(path, 'JPEG')


def write_meta(path):
    """As in the development kit: the synsets with images, then some above them."""
    kinds = [('ILSVRC2012_ID', 'O'), ('WNID', 'O'), ('num_children', 'O')]
    rows = [(number, name, 0) for number, name in enumerate(ILSVRC, start=1)]
    synsets = np.array([*rows, (5, 'n00001740', 3)], dtype=kinds)
    scipy.io.savemat(path, {'synsets': synsets.reshape(-1, 1)})


def lines(*columns, separator=' '):
    return ''.join(f'{separator.join(map(str, row))}\n' for row in zip(*columns, strict=True))


NUMBERS = [ILSVRC.index(name) + 1 for name in WORDNET]
BOXES = [f'{name} 10 20 30 40 {name} 1 2 3 4 ' for name in WORDNET]
FORMS = {
    'names': lines([f'{image}.JPEG' for image in IMAGES[::-1]], WORDNET[::-1]),
    'paths': lines([f'val/{image}.JPEG' for image in IMAGES], WORDNET, separator='\t'),
    'caffe': lines([f'{image}.JPEG' for image in IMAGES], LABELS),
    'csv': lines(IMAGES, WORDNET, separator=', '),
    'kaggle': 'ImageId,PredictionString\n' + lines(IMAGES[::-1], BOXES[::-1], separator=','),
    'in_order': lines(WORDNET),
    'devkit': lines(NUMBERS),
}


@pytest.mark.parametrize('form', FORMS)
def test_labels_of_validation_images(imagenet, form):
    (imagenet / 'labels.txt').write_text(FORMS[form])
    write_meta(imagenet / 'meta.mat')
    source = open_source('folder', 'test', path=str(imagenet), val_labels='labels.txt')
    assert source.class_names == CLASSES
    np.testing.assert_array_equal(source.labels, LABELS)
    assert [source[i]['label'] for i in range(6)] == list(LABELS)
    assert source.where(3) == str(imagenet / 'val' / f'{IMAGES[3]}.JPEG')
    with pytest.raises(MissingSplit):
        open_source('folder', 'validation', path=str(imagenet), val_labels='labels.txt')
    train = open_source('folder', 'train', path=str(imagenet), val_labels='labels.txt')
    assert len(train) == 8


def test_the_identity_is_that_of_files_and_classes(imagenet):
    found = set()
    for form in ('names', 'kaggle', 'devkit'):
        (imagenet / form).write_text(FORMS[form])
        write_meta(imagenet / 'meta.mat')
        found.add(identify(open_source('folder', 'test', path=str(imagenet), val_labels=form)))
    assert len(found) == 1


def test_another_split_may_be_left_out(imagenet):
    (imagenet / 'labels.txt').write_text(FORMS['names'])
    save(imagenet / 'test' / 'ILSVRC2012_test_00000001.JPEG')
    options = {'path': str(imagenet), 'val_labels': 'labels.txt'}
    with pytest.raises(UsageError, match=r"neither val/ nor test/ .* data.test_split='val'"):
        open_source('folder', 'test', **options)
    assert len(open_source('folder', 'test', test_split='val', **options)) == 6


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'is empty'),
        (FORMS['devkit'], 'has numbers of ILSVRC2012, which are not in the order of the WordNet'),
        (lines(WORDNET[:5]), 'has 5 lines for 6 images'),
        (lines(IMAGES[:5], WORDNET[:5]), f'does not name .*{IMAGES[5]}'),
        (lines(IMAGES, NUMBERS), 'has numbers from 1 to 4; must be names of classes, or their'),
        (lines(IMAGES, [1, 2, 1, 2, 1, 2]), 'has numbers from 1 to 2; must be'),
        (FORMS['names'] + f'{IMAGES[0]} {WORDNET[1]}', f'gives two classes to {IMAGES[0]}'),
        (FORMS['names'].replace(CLASSES[0], 'n0'), "names 'n0', which is no class to train on"),
        (FORMS['in_order'].replace(CLASSES[0], 'n0'), "names 'n0', which is no class to train"),
        (FORMS['kaggle'].replace(' 40 n0', ' 40 n1', 1), 'must name one class for an image'),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(imagenet, text, message):
    (imagenet / 'labels.txt').write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        open_source('folder', 'test', path=str(imagenet), val_labels='labels.txt')
    assert str(error.value).startswith('data.val_labels=')
    assert '\n' not in str(error.value)


def test_it_is_refused_where_it_has_no_effect(imagenet):
    options = {'path': str(imagenet), 'val_labels': 'none.txt'}
    with pytest.raises(UsageError, match='cannot be read: No such file'):
        open_source('folder', 'test', **options)
    with pytest.raises(UsageError, match=r'\(data.val_labels is for a val without them\)'):
        open_source('folder', 'test', path=str(imagenet))
    save(imagenet / 'val' / CLASSES[0] / 'image.JPEG')
    with pytest.raises(UsageError, match='data.val_labels: .* holds no split whose images have no'):
        open_source('folder', 'train', **options)
