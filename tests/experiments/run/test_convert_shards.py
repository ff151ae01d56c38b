"""Shards become a data set that the source tfds reads, whenever their conversion was stopped."""

import collections
import io

import numpy as np
import pytest
from PIL import Image

from experiments import evaluate, prepare_data, train
from experiments.run import convert_shards
from nfnets_jax.data import shards
from nfnets_jax.data.preprocessing import decode
from nfnets_jax.errors import UsageError
from tests.data.test_shards import write_parquet, write_tar
from tests.experiments.conftest import tiny_config
from tests.tfds_builders import open_prepared

NAMES = ('ape', 'bee', 'cat')


def encoded(value):
    stream = io.BytesIO()
    Image.new('RGB', (9, 7), (value, 0, 0)).save(stream, 'PNG')
    return stream.getvalue()


EXAMPLES = [(encoded(i), i % 3) for i in range(24)]
PARTS = {'train-0': EXAMPLES[:8], 'train-1': EXAMPLES[8:16], 'test-0': EXAMPLES[16:]}


def write(root, suffix='.tar', names=False):
    for name, examples in PARTS.items():
        if names:
            examples = [(image, NAMES[label]) for image, label in examples]
        if suffix == '.tar':
            write_tar(root / f'{name}.tar', [(i, x) for i, x in examples], 'json')
        else:
            write_parquet(root / f'{name}.parquet', examples, () if names else NAMES)
    return root


def prepare(root, tmp_path, **options):
    return prepare_data.prepare_shards(str(root), 'mine', str(tmp_path / 'data'), **options)


def assert_whole(tmp_path):
    for split, parts in (('train', ('train-0', 'train-1')), ('test', ('test-0',))):
        source = open_prepared('mine', tmp_path / 'data', split)
        assert source.class_names == NAMES
        found = [source[i] for i in range(len(source))]
        expected = [example for part in parts for example in PARTS[part]]
        assert [(each['image'], each['label']) for each in found] == expected
        assert int(decode(found[3]['image'])[0, 0, 0]) == decode(expected[3][0])[0, 0, 0]


@pytest.mark.parametrize('names', [False, True], ids=['integers', 'names'])
@pytest.mark.parametrize('suffix', ['.tar', '.parquet'])
def test_every_example_is_converted_once(tmp_path, suffix, names):
    options = {}
    if suffix == '.tar' and not names:
        (tmp_path / 'names.txt').write_text('\n'.join(NAMES))
        options['classes'] = str(tmp_path / 'names.txt')
    root = write(tmp_path / 'shards', suffix, names)
    directory = prepare(root, tmp_path, **options)
    assert_whole(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert prepare(root, tmp_path, **options) == directory
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


@pytest.mark.parametrize('stop', range(0, 24, 5))
def test_a_conversion_that_stops_goes_on(tmp_path, monkeypatch, stop):
    root, reads = write(tmp_path / 'shards', names=True), collections.Counter()
    read = shards.read_shard

    def stopping(path, *args, images=True):
        for example in read(path, *args, images=images):
            reads[images] += 1
            if reads[True] > stop:
                raise OSError(5, 'Input/output error')
            yield example

    monkeypatch.setattr(shards, 'read_shard', stopping)
    with pytest.raises(UsageError, match='Input/output error.*same command continues'):
        prepare(root, tmp_path)
    with pytest.raises(UsageError):
        open_prepared('mine', tmp_path / 'data')
    monkeypatch.setattr(shards, 'read_shard', read)
    kept = list((tmp_path / 'data').rglob('mine-*'))
    assert len(kept) == stop // 8
    before = {path: path.stat().st_mtime_ns for path in kept}
    prepare(root, tmp_path)
    assert_whole(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert not list((tmp_path / 'data').rglob('*.tmp'))


def test_a_broken_shard_is_named_and_can_be_replaced(tmp_path):
    root = write(tmp_path / 'shards', names=True)
    whole = (root / 'train-1.tar').read_bytes()
    (root / 'train-1.tar').write_bytes(whole[:5000])
    with pytest.raises(UsageError, match=r'train-1\.tar: damaged: .*; replace it'):
        prepare(root, tmp_path)
    (root / 'train-1.tar').write_bytes(whole)
    prepare(root, tmp_path)
    assert_whole(tmp_path)


def test_what_is_written_is_read_back(tmp_path, monkeypatch):
    root = write(tmp_path / 'shards', names=True)
    crc32, calls = convert_shards.zlib.crc32, []

    def flipped(data, value=0):
        calls.append(data)
        return crc32(data, value) ^ (len(calls) == 3)

    monkeypatch.setattr(convert_shards.zlib, 'crc32', flipped)
    with pytest.raises(UsageError, match='does not hold what was written'):
        prepare(root, tmp_path)
    monkeypatch.setattr(convert_shards.zlib, 'crc32', crc32)
    prepare(root, tmp_path)
    assert_whole(tmp_path)


def test_other_shards_under_the_same_name_are_refused(tmp_path):
    prepare(write(tmp_path / 'shards', names=True), tmp_path)
    write_tar(tmp_path / 'shards' / 'train-2.tar', [(EXAMPLES[0][0], 'dog')], 'json')
    with pytest.raises(UsageError, match='is of other shards, or other options'):
        prepare(tmp_path / 'shards', tmp_path)


def test_a_name_that_would_be_read_as_another_data_sets_is_refused(tmp_path):
    root = write(tmp_path / 'shards', names=True)
    (tmp_path / 'mine' / '2.0.0').mkdir(parents=True)
    with pytest.raises(UsageError, match=r'mine/2\.0\.0 is of another data set; choose another'):
        convert_shards.convert(str(root), 'mine', tmp_path)
    with pytest.raises(UsageError, match='^--dataset=cifar10: is a data set of TFDS'):
        convert_shards.convert(str(root), 'cifar10', tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['mine', 'shards']


@pytest.mark.parametrize(
    ('examples', 'message'),
    [
        ([(b'x', 1), (b'x', 'cat')], 'has labels that are integers, and others that are not'),
        ([(b'x', -1), (b'x', 1)], 'the label -1 is none of the 2 classes'),
        ([], 'holds no examples'),
    ],
)
def test_labels_that_cannot_be_used_are_one_line(tmp_path, examples, message):
    write_tar(tmp_path / 'shards' / '0.tar', examples, 'json')
    with pytest.raises(UsageError, match=message):
        prepare(tmp_path / 'shards', tmp_path)


def test_space_is_checked_first(tmp_path, monkeypatch):
    import shutil

    root = write(tmp_path / 'shards', names=True)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UsageError, match=r'mine needs 0\.0 GB in .*make room'):
        prepare(root, tmp_path)
    assert not (tmp_path / 'data').exists()


def test_a_name_that_tfds_does_not_take_is_one_line(tmp_path):
    with pytest.raises(UsageError, match='--dataset=My Images: must be like my_images'):
        convert_shards.convert(str(tmp_path), 'My Images', tmp_path)
    assert np.all([not list(tmp_path.iterdir())])


@pytest.mark.parametrize('suffix', ['.tar', '.parquet'])
def test_lists_of_labels_from_shards_to_a_report(tmp_path, suffix):
    """Through the conversion, training and evaluation, with the scores of several labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 12, 12, 3)).astype(np.uint8)
    wanted = rng.integers(0, 2, (24, 3)).astype(np.uint8)
    wanted[5] = 0
    examples = []
    for pixels, label in zip(images, wanted, strict=True):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, 'PNG')
        examples.append((stream.getvalue(), [NAMES[i] for i in np.flatnonzero(label)]))
    for name, part in (('train', examples[:16]), ('test', examples[16:])):
        path = tmp_path / 'shards' / f'{name}{suffix}'
        write_tar(path, part, 'json') if suffix == '.tar' else write_parquet(path, part)
    prepare(tmp_path / 'shards', tmp_path)
    train_source = open_prepared('mine', tmp_path / 'data', 'train')
    assert train_source.class_names == NAMES
    np.testing.assert_array_equal(train_source.labels, wanted[:16])
    for i in (0, 5, 15):
        np.testing.assert_array_equal(train_source[i]['label'], wanted[i])
        np.testing.assert_array_equal(decode(train_source[i]['image']), images[i])
    if suffix == '.parquet':
        return
    config = tiny_config(
        batch_size=8,
        duration='2 steps',
        eval__every=2,
        checkpoint__every=2,
        augment__shift=0,
        optimizer__clip__name='none',
        data={
            **{'name': 'tfds', 'dataset': 'mine', 'data_dir': str(tmp_path / 'data')},
            **{'image_size': 8, 'test_image_size': 8},
        },
    )
    train.train(config, tmp_path / 'run', quiet=True)
    report = tmp_path / 'report'
    found = evaluate.evaluate(tmp_path / 'run', report=str(report))
    assert {'test/map', 'test/auc'} < set(found)
    rows = (report / 'classes.csv').read_text().splitlines()[1:]
    assert [int(row.split(',')[1]) for row in rows] == wanted[16:].sum(axis=0).tolist()


def test_lists_and_single_labels_do_not_mix(tmp_path):
    examples = [(EXAMPLES[0][0], ['a']), (EXAMPLES[1][0], 'b')]
    write_tar(tmp_path / 'shards' / '0.tar', examples, 'json')
    with pytest.raises(UsageError, match='has labels that are lists, and others that are not'):
        prepare(tmp_path / 'shards', tmp_path)
    write_tar(tmp_path / 'shards' / '0.tar', [(EXAMPLES[0][0], [])] * 2, 'json')
    with pytest.raises(UsageError, match='no image has a label'):
        prepare(tmp_path / 'shards', tmp_path)
    write_tar(tmp_path / 'shards' / '0.tar', [(EXAMPLES[0][0], ['a', 1])] * 2, 'json')
    with pytest.raises(UsageError, match='labels that are integers, and others that are not'):
        prepare(tmp_path / 'shards', tmp_path)
