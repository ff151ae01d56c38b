"""Shards that tarfile and pyarrow write are read back, or refused in one line."""

import io
import json
import pathlib
import tarfile

import pytest

from nfnets_jax.data import shards
from nfnets_jax.errors import UsageError

EXAMPLES = [(bytes([255, 216, i]) * 700, label) for i, label in enumerate((2, 0, 1, 2, 1))]


def write_tar(path, examples=EXAMPLES, kind='cls', folder=''):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for i, (image, label) in enumerate(examples):
            text = json.dumps({'label': label, 'caption': 'x'}) if kind == 'json' else str(label)
            for suffix, content in (('JPG', image), (kind, text.encode()), ('seg.txt', b'')):
                member = tarfile.TarInfo(f'{folder}{i:04d}.{suffix}')
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_parquet(path, examples=EXAMPLES, names=(), column='label', as_struct=True):
    pa = pytest.importorskip('pyarrow')
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    images, labels = zip(*examples, strict=True)
    cells = [{'bytes': image, 'path': 'x.jpg'} for image in images] if as_struct else images
    table = pa.table({'image': cells, column: list(labels), 'id': [str(i) for i in labels]})
    if names:
        feature = {'names': names, '_type': 'ClassLabel'}
        if isinstance(labels[0], list):
            feature = {'feature': feature, '_type': 'List'}
        features = {column: feature}
        stored = json.dumps({'info': {'features': features}})
        table = table.replace_schema_metadata({'huggingface': stored})
    options = {'write_statistics': False, 'write_page_checksum': True, 'compression': 'none'}
    parquet.write_table(table, path, row_group_size=2, **options)
    return path


@pytest.mark.parametrize('kind', ['cls', 'json'])
def test_tar_files(tmp_path, kind):
    path = write_tar(tmp_path / '0.tar', kind=kind, folder='a.b/')
    assert list(shards.read_shard(path)) == EXAMPLES
    labels = [label for _, label in shards.read_shard(path, images=False)]
    assert labels == [label for _, label in EXAMPLES]
    named = [(image, f'class {label}') for image, label in EXAMPLES]
    assert list(shards.read_shard(write_tar(path, named, kind))) == named


@pytest.mark.parametrize('as_struct', [True, False])
def test_parquet_files(tmp_path, as_struct):
    path = write_parquet(tmp_path / '0.parquet', as_struct=as_struct, names=['a', 'b', 'c'])
    assert list(shards.read_shard(path)) == EXAMPLES
    assert [label for _, label in shards.read_shard(path, images=False)] == [2, 0, 1, 2, 1]
    assert shards.declared_names(path) == ['a', 'b', 'c']
    other = write_parquet(tmp_path / '1.parquet', column='fine')
    assert list(shards.read_shard(other, 'fine')) == EXAMPLES
    assert shards.declared_names(other, 'fine') == ()


@pytest.mark.parametrize(
    ('files', 'splits'),
    [
        (['a-train-0.tar', 'a-val-0.tar', 'deep/test_1.tar'], ['train', 'validation', 'test']),
        (['x/train/0.tar', 'x/Test/train-like/0.tar', 'x/y.txt'], ['test', 'train']),
        (['0.tar', '1.tar'], ['train', 'train']),
    ],
)
def test_names_say_the_splits(tmp_path, files, splits):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    if 'x/y.txt' in files:  # the nearest directory counts: train-like says train
        splits = ['train', 'train']
    assert [shard.split for shard in shards.find_shards(tmp_path)] == splits


@pytest.mark.parametrize(
    ('files', 'message'),
    [
        ([], 'there are no .tar or .parquet files'),
        (['train_val.tar'], "'train_val' says train and validation; rename it"),
        (['train-0.tar', 'rest.tar'], 'rest.tar: its name says no split'),
    ],
)
def test_names_that_do_not_say_it_are_one_line(tmp_path, files, message):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=message):
        shards.find_shards(tmp_path)


def read_all(path: pathlib.Path) -> int:
    return len(list(shards.read_shard(path)))


def test_a_truncated_tar_is_one_line_wherever_it_ends(tmp_path):
    """Blocks of 512 bytes: a header and what it describes; a whole file ends with zeros."""
    whole = write_tar(tmp_path / 'whole.tar').read_bytes()
    blocks = len(EXAMPLES) * (1 + 5 + 1 + 1 + 1)  # 2100 bytes, a label, and an empty file
    path = tmp_path / 'cut.tar'
    path.write_bytes(whole[: (blocks + 1) * 512])
    assert read_all(path) == len(EXAMPLES)
    for size in range(0, (blocks + 1) * 512, 512):
        for extra in (0, 100):
            path.write_bytes(whole[: size + extra])
            with pytest.raises(UsageError, match=r'cut\.tar: ') as error:
                read_all(path)
            assert '\n' not in str(error.value)


def test_a_damaged_parquet_is_one_line(tmp_path):
    path = write_parquet(tmp_path / '0.parquet')
    whole = path.read_bytes()
    at = whole.index(EXAMPLES[3][0][:50])
    for damaged in (
        whole[: len(whole) // 2],
        whole[:-1],
        b'',
        whole[:at] + b'\0' + whole[at + 1 :],
    ):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match=r'0\.parquet: damaged: .*; replace it') as error:
            read_all(path)
        assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('members', 'message'),
    [
        ({'0.jpg': b'x'}, 'has no label: must be an integer or a name in .cls'),
        ({'0.jpg': b'x', '0.json': b'{"label": [1.5]}'}, 'has no label'),
        ({'0.jpg': b'x', '0.json': b'{"label": ["a", ""]}'}, 'has no label'),
        ({'0.jpg': b'x', '0.json': b'{"labels": null}'}, "or a list of them, as 'label'"),
        ({'0.jpg': b'x', '0.json': b'{'}, 'damaged'),
        ({'0.jpg': b'x', '0.cls': b' '}, 'has no label'),
        ({'0.cls': b'1'}, 'has no images'),
        ({'0.jpg': b'x', '0.png': b'x', '0.cls': b'1'}, 'has 2 images'),
    ],
)
def test_an_example_that_is_not_whole_is_one_line(tmp_path, members, message):
    path = tmp_path / '0.tar'
    with tarfile.open(path, 'w') as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(UsageError, match=message):
        read_all(path)


def test_columns_that_are_not_clear_are_one_line(tmp_path):
    path = write_parquet(tmp_path / '0.parquet', column='fine')
    with pytest.raises(UsageError, match=r'no column of labels .*: image, fine, id.*label_column'):
        read_all(path)
    none = [(EXAMPLES[0][0], 1), (EXAMPLES[0][0], None)]
    with pytest.raises(UsageError, match='a label is None'):
        read_all(write_parquet(path, none))
    with pytest.raises(UsageError, match='an image has no bytes'):
        read_all(write_parquet(path, [(None, 1), (b'x', 1)]))


@pytest.mark.parametrize('key', ['label', 'labels', 'tags'])
@pytest.mark.parametrize('suffix', ['.tar', '.parquet'])
def test_a_list_has_all_labels_of_its_image(tmp_path, suffix, key):
    lists = [list(names) for names in ('ab', 'c', 'bca', 'aa', '')]
    path = tmp_path / f'0{suffix}'
    examples = [(image, names) for (image, _), names in zip(EXAMPLES, lists, strict=True)]
    if suffix == '.tar':
        with tarfile.open(path, 'w') as tar:
            for i, (image, names) in enumerate(examples):
                for kind, content in (('jpg', image), ('json', json.dumps({key: names}).encode())):
                    member = tarfile.TarInfo(f'{i}.{kind}')
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    else:
        write_parquet(path, examples, ['a', 'b', 'c'], column=key)
        assert shards.declared_names(path, key if key == 'tags' else '') == ['a', 'b', 'c']
    found = list(shards.read_shard(path, key if key == 'tags' else ''))
    assert found == [(image, tuple(dict.fromkeys(names))) for image, names in examples]
