"""Evaluation on data that a run was not trained on."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from experiments.evaluate import evaluate
from experiments.train import train
from nfnets_jax.data.sources import ArraySource, Digits, RenumberedSource
from nfnets_jax.errors import UsageError
from tests.experiments.conftest import tiny_config

IMAGES = 120  # of each split


def save(source, root, name='{label}/{index}.png'):
    """Writes the images of a source as files, and returns their paths and labels."""
    rows = []
    for index in range(len(source)):
        label = source.class_names[source.labels[index]]
        path = root / name.format(label=label, index=index)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.images[index]).save(path)
        rows.append((str(path.relative_to(root)), label))
    return rows


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run on digits that are not there any more, and its last metrics."""
    root = tmp_path_factory.mktemp('runs')
    arrays = {}
    for split in ('train', 'test'):
        source = Digits(split, image_size=8)
        arrays[f'{split}_images'] = source.images[:IMAGES]
        arrays[f'{split}_labels'] = source.labels[:IMAGES]
    names = [f'n{9 - digit}' for digit in range(10)]  # not in the order of their names
    np.savez(root / 'digits.npz', class_names=names, **arrays)
    config = tiny_config(data={'name': 'arrays', 'path': str(root / 'digits.npz')})
    final = train(config, root / 'run', quiet=True)['final']
    (root / 'digits.npz').unlink()
    return root / 'run', final


@pytest.fixture
def test_images():
    source = Digits('test', image_size=8)
    names = tuple(f'n{9 - digit}' for digit in range(10))
    return ArraySource(source.images[:IMAGES], source.labels[:IMAGES], names)


def test_a_folder_and_a_table_of_the_same_images_give_the_same_metrics(run, test_images, tmp_path):
    directory, final = run
    rows = save(test_images, tmp_path / 'folder')
    table = tmp_path / 'folder' / 'table.csv'
    table.write_text('\n'.join(['path,label', *map(','.join, rows)]))
    for name in ('train', 'test', 'val'):
        source = test_images if name == 'test' else ArraySource(
            test_images.images[:50], test_images.labels[:50], test_images.class_names
        )  # fmt: skip
        save(source, tmp_path / 'splits' / name)
    for other in (tmp_path / 'folder', table, tmp_path / 'splits'):
        found = evaluate(directory, other=str(other))
        assert found.pop('step') == 6
        assert found == pytest.approx({name: final[name] for name in found}, rel=1e-5)
    part = evaluate(directory, other=str(tmp_path / 'splits'), split='validation')
    assert part['test/loss'] != found['test/loss']


def test_images_that_are_not_square(tmp_path):
    arrays, rng = {'class_names': ['a', 'b']}, np.random.RandomState(0)
    for split in ('train', 'test'):
        arrays[f'{split}_images'] = rng.randint(0, 256, (64, 8, 12, 3)).astype(np.uint8)
        arrays[f'{split}_labels'] = np.arange(64) % 2
    np.savez(tmp_path / 'wide.npz', **arrays)
    config = tiny_config(
        data={'name': 'arrays', 'path': str(tmp_path / 'wide.npz')},
        ema=0.0,
        augment__shift=0,
        optimizer__clip__name='none',
    )
    final = train(config, tmp_path / 'run', quiet=True)['final']
    test = ArraySource(arrays['test_images'], arrays['test_labels'], ('a', 'b'))
    save(test, tmp_path / 'folder')
    found = evaluate(tmp_path / 'run', other=str(tmp_path / 'folder'))
    assert found['test/loss'] == pytest.approx(final['test/loss'], rel=1e-5)


def test_some_of_the_classes_are_enough(run, test_images, tmp_path):
    directory, _ = run
    chosen = np.isin(test_images.labels, (3, 7))
    some = ArraySource(
        test_images.images[chosen], test_images.labels[chosen], test_images.class_names
    )
    save(some, tmp_path / 'some')
    found = evaluate(directory, other=str(tmp_path / 'some'), report=str(tmp_path / 'report'))
    lines = (tmp_path / 'report' / 'classes.csv').read_text().splitlines()[1:]
    images = {line.split(',')[0]: int(line.split(',')[1]) for line in lines}
    counts = np.bincount(some.labels, minlength=10)
    assert images == dict(zip(test_images.class_names, counts.tolist(), strict=True))
    summary = json.loads((tmp_path / 'report' / 'summary.json').read_text())
    assert summary['top1'] == found['test_ema/top1']
    shutil.rmtree(tmp_path / 'some' / 'n2')
    one = evaluate(directory, other=str(tmp_path / 'some'), report=str(tmp_path / 'report'))
    summary = json.loads((tmp_path / 'report' / 'summary.json').read_text())
    assert summary['images'] == counts[3]
    assert summary['top1'] == one['test_ema/top1']


def test_directories_of_numbers_are_labels_in_the_order_of_the_run(run, test_images, tmp_path):
    directory, final = run
    test_images.class_names = tuple(map(str, range(10)))
    save(test_images, tmp_path)
    found = evaluate(directory, other=str(tmp_path))
    assert found['test/loss'] == pytest.approx(final['test/loss'], rel=1e-5)


def test_numbers_are_not_sorted_as_text():
    """A folder of 12 classes sorts '10' before '2'."""
    names = tuple(sorted(map(str, range(12))))
    labels = np.arange(12)
    source = ArraySource(np.zeros((12, 2, 2, 3), np.uint8), labels, names)
    found = RenumberedSource(source, [f'n{i:08d}' for i in range(12)])
    assert found.are_numbers
    np.testing.assert_array_equal(found.labels, [int(name) for name in names])
    assert [found[i]['label'] for i in range(12)] == [int(name) for name in names]
    by_name = RenumberedSource(source, names[::-1])
    assert not by_name.are_numbers
    np.testing.assert_array_equal(by_name.labels, 11 - labels)


def test_several_labels_are_renumbered():
    labels = np.array([[1, 0, 1], [0, 1, 0]])
    source = ArraySource(np.zeros((2, 2, 2, 3), np.uint8), labels, ('a', 'b', 'c'))
    found = RenumberedSource(source, ('c', 'x', 'b', 'a'))
    np.testing.assert_array_equal(found.labels, [[1, 0, 0, 1], [0, 0, 1, 0]])
    np.testing.assert_array_equal(found[0]['label'], [1, 0, 0, 1])


def test_mistakes_are_one_line(run, test_images, tmp_path):
    directory, _ = run
    save(test_images, tmp_path / 'folder')
    labels = np.eye(10, dtype=np.uint8)[test_images.labels]
    arrays = {f'{split}_images': test_images.images for split in ('train', 'test')}
    arrays |= {f'{split}_labels': labels for split in ('train', 'test')}
    np.savez(tmp_path / 'several.npz', class_names=test_images.class_names, **arrays)
    (tmp_path / 'folder' / 'n0').rename(tmp_path / 'folder' / 'm0')
    for options, message in (
        ({'other': str(tmp_path / 'folder')}, "'m0' is none of the 10 classes (did you mean"),
        ({'other': str(tmp_path / 'none')}, 'not a directory'),
        ({'other': str(tmp_path / 'several.npz')}, 'have several labels, those of the run one'),
        ({'other': str(tmp_path / 'folder'), 'split': 'test'}, 'holds no splits, but --split=test'),
        ({'other': 'x', 'data': {'path': 'y'}}, '--config.data.path is of the data of the run'),
    ):
        with pytest.raises(UsageError) as error:
            evaluate(directory, **options)
        assert message in str(error.value)
        assert '\n' not in str(error.value)


def test_a_run_that_does_not_say_its_classes_is_one_line(run, tmp_path):
    (tmp_path / 'config.json').write_text((run[0] / 'config.json').read_text())
    with pytest.raises(UsageError, match=r'holds no model\.json, by which --data is prepared'):
        evaluate(tmp_path, other='x')


def test_images_in_one_directory_with_a_file_of_labels(run, test_images, tmp_path):
    """As ImageNet's val/: alone, or beside train/; the classes are those of the run."""
    directory, final = run
    rows = save(test_images, tmp_path / 'val', name='{index:04d}.png')
    (tmp_path / 'labels.txt').write_text('\n'.join(' '.join(row) for row in rows))
    train_images = ArraySource(
        test_images.images[:50], test_images.labels[:50], test_images.class_names
    )
    save(train_images, tmp_path / 'train')
    labels = str(tmp_path / 'labels.txt')
    for other in (tmp_path / 'val', tmp_path):
        found = evaluate(directory, other=str(other), val_labels=labels)
        assert found.pop('step') == 6
        assert found == pytest.approx({name: final[name] for name in found}, rel=1e-5)
    (tmp_path / 'in_order.txt').write_text('\n'.join(label for _, label in rows[:-1]))
    for options, match in (
        ({'other': str(tmp_path / 'val'), 'split': 'test'}, 'holds no splits, but --split=test'),
        ({'other': str(tmp_path / 'a.npz')}, '--val_labels=.* is for images in a directory, not'),
        ({}, '--val_labels=.* is for --data: give that, too'),
    ):
        with pytest.raises(UsageError, match=match):
            evaluate(directory, val_labels=labels, **options)
    with pytest.raises(UsageError, match=r'--data=.*in_order.txt.* has 119 lines for 120 images'):
        evaluate(directory, other=str(tmp_path / 'val'), val_labels=str(tmp_path / 'in_order.txt'))
