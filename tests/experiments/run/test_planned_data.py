import pytest

from experiments.run import planned_data
from nfnets_jax.data import sources
from nfnets_jax.data.splits import MissingSplit
from nfnets_jax.errors import UsageError


def open_source(split, dataset='imagenet2012', **options):
    return planned_data.open_source('tfds', split, dataset=dataset, **options)


@pytest.fixture
def nowhere(tmp_path):
    return {'data_dir': str(tmp_path)}


@pytest.mark.parametrize(
    ('split', 'options', 'examples'),
    [
        ('train', {}, 1_281_167),
        ('train', {'train_split': 'TRAIN'}, 1_271_167),
        ('train', {'train_split': 'train[:50%]+validation'}, 640_584 + 50_000),
        ('validation', {'validation_split': 'VALID'}, 10_000),
        ('test', {}, 50_000),
    ],
)
def test_imagenet_is_known(split, options, examples, nowhere):
    source = open_source(split, **options, **nowhere)
    assert len(source) == examples
    assert len(source.class_names) == 1000
    assert isinstance(source[0]['image'], bytes)  # to be cropped


def test_images_of_cifar_have_one_size(nowhere):
    assert open_source('test', 'cifar10', **nowhere)[0]['image'].shape == (32, 32, 3)


def test_what_cannot_be_planned_with(nowhere):
    with pytest.raises(UsageError, match=r"train_split='trai': .* \(did you mean 'TRAIN'\?\)"):
        open_source('train', train_split='trai', **nowhere)
    with pytest.raises(MissingSplit):
        open_source('validation', **nowhere)
    with pytest.raises(UsageError, match=r'not found in .*; or make them up'):
        open_source('train', 'mnist', advice='; or make them up', **nowhere)


def test_data_of_ones_own(tmp_path):
    source = planned_data.open_source(
        'folder', 'train', examples=70, classes=3, path=str(tmp_path / 'later')
    )
    assert (len(source), source.class_names) == (70, ('0', '1', '2'))


def test_data_that_are_here_are_opened():
    source = planned_data.open_source('digits', 'train', examples=7, classes=3, image_size=8)
    assert len(source) == len(sources.open_source('digits', 'train', image_size=8)) > 7
