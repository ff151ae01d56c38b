"""The data are part of the experiment: what changed in them is told before anything is written."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from experiments.evaluate import evaluate
from experiments.run import data_record
from experiments.run.data import open_data
from experiments.study import command as study
from experiments.study.config import default_study
from experiments.train import train
from nfnets_jax.errors import UsageError
from tests.experiments.conftest import tiny_config


def write_images(root, *names, count=4):
    rng = np.random.default_rng(0)
    for level, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(80 * level, 80 * level + 80, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f'{i}.png')


def config_of(path, **changes):
    config = tiny_config(
        model={'name': 'SmallCNN'},
        augment__shift=0,
        batch_size=4,
        duration='4 steps',
        eval__every='4 steps',
        checkpoint__every='4 steps',
    )
    config.data = {'name': 'folder', 'path': str(path), 'image_size': 16, 'test_image_size': 16}
    for key, value in changes.items():
        config.data[key] = value
    return config


@pytest.fixture(scope='module')
def first(tmp_path_factory):
    """A folder of three classes, and a run on it."""
    root = tmp_path_factory.mktemp('first')
    for split in ('train', 'test'):
        write_images(root / 'data' / split, 'b', 'd', 'f')
    train(config_of(root / 'data'), root / 'run', quiet=True)
    return root


@pytest.fixture
def here(first, tmp_path):
    """A copy of both; the config of the run names the copy."""
    shutil.copytree(first, tmp_path / 'here')
    file = tmp_path / 'here' / 'run' / 'config.json'
    config = json.loads(file.read_text())
    config['data']['path'] = str(tmp_path / 'here' / 'data')
    file.write_text(json.dumps(config))
    return tmp_path / 'here'


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob('*') if path.is_file()}


def rename_class(data):
    for split in ('train', 'test'):
        (data / split / 'b').rename(data / split / 'z')


def add_class(data):
    for split in ('train', 'test'):
        shutil.copytree(data / split / 'b', data / split / 'c')


def remove_class(data):
    for split in ('train', 'test'):
        shutil.rmtree(data / split / 'f')


def add_images(data):
    for i in range(12):
        shutil.copy(data / 'train/b/0.png', data / f'train/d/more{i}.png')


def add_test_image(data):
    shutil.copy(data / 'test/b/0.png', data / 'test/b/9.png')


def rename_image(data):
    (data / 'test/b/0.png').rename(data / 'test/b/zero.png')


CHANGES = [
    (rename_class, "class 'b' is now 'z'"),
    (add_class, "class 'c' was added"),
    (remove_class, "class 'f' was removed"),
    (add_test_image, '1 image was added to test'),
    (rename_image, 'the 12 images of test are others'),
]


@pytest.mark.parametrize(
    ('change', 'words'), [*CHANGES, (add_images, '12 images were added to train')]
)
def test_a_run_does_not_go_on_with_other_data(here, change, words):
    change(here / 'data')
    before = contents(here / 'run')
    with pytest.raises(UsageError, match=words) as error:
        train(config_of(here / 'data'), here / 'run', quiet=True)
    assert '\n' not in str(error.value)
    assert contents(here / 'run') == before


@pytest.mark.parametrize(('change', 'words'), CHANGES)
def test_a_run_is_not_evaluated_on_other_data(here, change, words):
    change(here / 'data')
    with pytest.raises(UsageError, match=words):
        evaluate(here / 'run')


def test_more_training_images_do_not_matter_to_the_test(here):
    expected = evaluate(here / 'run')
    add_images(here / 'data')
    assert evaluate(here / 'run') == expected


def test_the_same_data_in_another_place_are_the_same(here):
    expected = evaluate(here / 'run')
    (here / 'data').rename(here / 'moved')
    assert evaluate(here / 'run', data={'path': str(here / 'moved')}) == expected
    summary = json.loads((here / 'run' / 'summary.json').read_text())
    moved = config_of(here / 'moved', skip_bad=1)
    assert train(moved, here / 'run', quiet=True) == summary
    rename_class(here / 'moved')
    with pytest.raises(UsageError, match="class 'b' is now 'z'.*--config.data.path"):
        evaluate(here / 'run', data={'path': str(here / 'moved')})


def test_an_option_that_the_data_do_not_have_is_told(here):
    with pytest.raises(UsageError, match=r"config\.data\.data_dir: not an option of 'folder'"):
        evaluate(here / 'run', data={'data_dir': 'x'})


def test_a_run_of_an_earlier_version_goes_on_and_is_then_recorded(here):
    record = (here / 'run' / 'data.json').read_text()
    (here / 'run' / 'data.json').unlink()
    train(config_of(here / 'data'), here / 'run', quiet=True)
    assert (here / 'run' / 'data.json').read_text() == record


@pytest.mark.parametrize('use', ['train', 'evaluate'])
def test_of_a_run_of_an_earlier_version_the_class_names_are_compared(here, use):
    (here / 'run' / 'data.json').unlink()
    rename_class(here / 'data')
    uses = {
        'train': lambda: train(config_of(here / 'data'), here / 'run', quiet=True),
        'evaluate': lambda: evaluate(here / 'run'),
    }
    with pytest.raises(UsageError, match="class 'b' is now 'z'"):
        uses[use]()
    assert not (here / 'run' / 'data.json').exists()


def test_where_an_earlier_version_left_no_record_another_place_is_another_experiment(here):
    (here / 'run' / 'data.json').unlink()
    (here / 'data').rename(here / 'moved')
    with pytest.raises(UsageError, match='config.data.path is .* there'):
        train(config_of(here / 'moved'), here / 'run', quiet=True)


def test_what_the_model_is_is_written_once(here):
    os.utime(here / 'run' / 'model.json', (0, 0))
    (here / 'run' / 'summary.json').unlink()
    train(config_of(here / 'data'), here / 'run', quiet=True)
    assert os.path.getmtime(here / 'run' / 'model.json') == 0


def arrays_file(path, shift=0, count=8):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (count, 16, 16, 3), np.uint8)
    labels = (np.arange(count) + shift) % 2
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)


@pytest.mark.parametrize(
    ('name', 'then', 'now', 'words'),
    [
        ('arrays', {}, {'shift': 1}, 'the 8 images of train are others'),
        ('arrays', {}, {'count': 6}, '2 images were removed from train'),
    ],
)
def test_arrays_are_compared_too(tmp_path, name, then, now, words):
    def record(**options):
        arrays_file(tmp_path / 'a.npz', **options)
        config = config_of('')
        config.data = {'name': name, 'path': str(tmp_path / 'a.npz')}
        data = open_data(config)
        return data_record.make_record({'train': data.train, 'test': data.test})

    assert words in data_record.changes(record(**then), record(**now))


def record_of(names, **splits):
    return {
        'class_names': list(names),
        'splits': {s: {'num_examples': n, 'checksum': c} for s, (n, c) in splits.items()},
    }


@pytest.mark.parametrize(
    ('then', 'now', 'expected'),
    [
        (record_of('ab', train=(2, 'x')), record_of('ab', train=(2, 'x')), []),
        (record_of('ab'), record_of('ab', train=(2, 'x')), []),  # an earlier version's
        (
            record_of('ab', train=(2, 'x')),
            record_of('ba', train=(2, 'x')),
            ["the classes are in another order: label 0 was 'a', is 'b'"],
        ),
        (
            record_of('ab', train=(2, 'x'), test=(1, 'y')),
            record_of('ab', train=(2, 'x'), test=(1, 'y'), validation=(1, 'z')),
            ['there is a validation split now'],
        ),
        (
            record_of('ab', train=(2000, 'x'), validation=(1, 'z')),
            record_of('ab', train=(1, 'x')),
            ['1,999 images were removed from train', 'there is no validation split any more'],
        ),
    ],
)
def test_changes_in_words(then, now, expected):
    assert data_record.changes(then, now) == expected


def test_a_damaged_record_is_one_line(here):
    (here / 'run' / 'data.json').write_text('{"splits": 3}')
    with pytest.raises(UsageError, match=r'data\.json cannot be read'):
        train(config_of(here / 'data'), here / 'run', quiet=True)


def test_a_study_does_not_go_on_with_other_data(tmp_path, monkeypatch):
    for split in ('train', 'test'):
        write_images(tmp_path / 'data' / split, 'b', 'd')
    monkeypatch.setattr(study, 'work', lambda *args, **options: None)

    def run(path='data'):
        config = default_study()
        config.name, config.base = 'tiny', config_of(tmp_path / path)
        config.grid.seed = (0, 1)
        config.arms = ({'name': 'one', 'grid': {'learning_rate': (0.1,)}},)
        study.run_study(config, tmp_path / 'study')

    run()
    (tmp_path / 'data').rename(tmp_path / 'moved')
    run('moved')
    before = contents(tmp_path / 'study')
    rename_class(tmp_path / 'moved')
    with pytest.raises(UsageError, match="a study on other data: class 'b' is now 'z'"):
        run('moved')
    assert contents(tmp_path / 'study') == before
