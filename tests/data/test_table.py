import shutil

import numpy as np
import pytest
from PIL import Image

from nfnets_jax.data.folder import ImageFolder
from nfnets_jax.data.preprocessing import decode
from nfnets_jax.data.sources import identify, open_source
from nfnets_jax.data.splits import MissingSplit
from nfnets_jax.data.table import ImageTable
from nfnets_jax.errors import UsageError

HEADER = ('image', 'label')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """A directory with six images of each of two classes: cat/0.png, ..."""
    root = tmp_path_factory.mktemp('images')
    for value, name in enumerate(('cat', 'dog')):
        (root / name).mkdir()
        for i in range(6):
            Image.new('RGB', (4, 4), (100 * value, 10 * i, 0)).save(root / name / f'{i}.png')
    return root


def rows_of(images):
    return [(f'{name}/{i}.png', name) for name in ('dog', 'cat') for i in range(6)]


def write(path, rows, header=HEADER, delimiter=','):
    lines = [delimiter.join(map(str, row)) for row in (header, *rows)]
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return str(path)


@pytest.mark.parametrize('suffix', ['.csv', '.tsv', '.CSV', '.parquet'])
def test_without_splits_it_equals_the_folder(images, tmp_path, suffix):
    path = tmp_path / f'table{suffix}'
    rows = rows_of(images)
    if suffix == '.parquet':
        pa = pytest.importorskip('pyarrow')
        from pyarrow import parquet

        columns = dict(zip(HEADER, map(list, zip(*rows, strict=True)), strict=True))
        parquet.write_table(pa.table(columns), path)
    else:
        write(path, rows, delimiter='\t' if suffix == '.tsv' else ',')
    for split in ('train', 'test'):
        table = open_source('table', split, path=str(path), root=str(images), split_seed=3)
        folder = ImageFolder(split, images, split_seed=3)
        assert [table.where(i) for i in range(len(table))] == [
            folder.where(i) for i in range(len(folder))
        ]
        assert [table[i] for i in range(len(table))] == [folder[i] for i in range(len(folder))]
        assert table.class_names == folder.class_names == ('cat', 'dog')


def test_splits_are_those_of_their_column(images, tmp_path):
    names = ('Train', 'training', 'train', 'VAL', 'valid', 'testing')
    rows = [(path, name, names[i % 6]) for i, (path, name) in enumerate(rows_of(images))]
    path = write(tmp_path / 't.csv', rows, ('FileName', 'class', 'Subset'))
    sizes = {
        split: len(ImageTable(split, path, root=str(images)))
        for split in ('train', 'validation', 'test')
    }
    assert sizes == {'train': 6, 'validation': 4, 'test': 2}
    no_test = [row for row in rows if row[2] != 'testing']
    path = write(tmp_path / 'v.csv', no_test, ('FileName', 'class', 'Subset'))
    assert len(ImageTable('test', path, root=str(images))) == 4
    with pytest.raises(MissingSplit):
        ImageTable('validation', path, root=str(images))


def test_integers_are_ordered_by_value_and_paths_get_a_suffix(images, tmp_path):
    rows = [
        (f'{name}/{i}', 10 if name == 'cat' else 9) for name in ('cat', 'dog') for i in range(6)
    ]
    path = write(tmp_path / 't.csv', rows, ('id', 'Target'))
    source = ImageTable(
        'train', path, root=str(images), image_column='id', suffix='.png', test_fraction=0.5
    )
    assert source.class_names == ('9', '10')
    labels = [source[i]['label'] for i in range(len(source))]
    reds = [decode(source[i]['image'])[0, 0, 0] for i in range(len(source))]
    np.testing.assert_array_equal(np.array(labels) == 0, np.array(reds) == 100)


def test_paths_are_relative_to_the_table_and_rows_without_a_label_are_counted(images, tmp_path):
    shutil.copytree(images, tmp_path / 'here')
    rows = [*rows_of(images), ('cat/0.png', ''), ('', 'dog'), ('', '')]
    source = ImageTable('train', write(tmp_path / 'here' / 't.csv', rows))
    assert len(source) == 10
    assert source.left_out == {'rows without a label': 1, 'rows without a path': 2}


def test_the_identity_sees_labels_and_names(images, tmp_path):
    rows = rows_of(images)
    first = identify(ImageTable('train', write(tmp_path / 'a.csv', rows), root=str(images)))
    moved = identify(ImageTable('train', write(tmp_path / 'b.csv', rows[::-1]), root=str(images)))
    assert moved == first  # the order of rows does not matter where classes are held out
    swapped = [(path, 'dog' if i == 11 else name) for i, (path, name) in enumerate(rows)]
    other = identify(ImageTable('train', write(tmp_path / 'c.csv', swapped), root=str(images)))
    assert other != first


@pytest.mark.parametrize(
    ('text', 'options', 'message'),
    [
        ('image,label\n', {}, 'has no rows below its header'),
        ('a,b\ncat/0.png,cat\n', {}, "has no column 'image'; name the one of the images by"),
        ('image,b\ncat/0.png,cat\n', {}, "has no column 'label'; name the one of the labels by"),
        ('image,path,label\na,b,c\n', {}, 'has image and path; name the one'),
        ('image,label\na,b,c\n', {}, 'row 2 has 3 values, but the header 2'),
        ('image,label\n"a,b\n', {}, 'cannot be read as a table'),
        (
            'image,label,split\ncat/0.png,cat,trian\n',
            {},
            "row 2 is of the split 'trian' (did you mean 'train'?)",
        ),
        ('image,label,split\ncat/0.png,cat,\n', {}, "row 2 is of the split ''"),
        ('image,label\ncat/0.png,cat\ndog/0.png,dog\n', {}, 'cat: one image cannot be split'),
        (
            'image,label,split\nx.png,cat,train\ny.png,dog,train\n',
            {},
            "its image 'x.png' is not in",
        ),
        (
            'image,label,split\ncat/0.png,cat,train\ncat/0.png,cta,test\n',
            {'split': 'test'},
            "has the label 'cta', which no training image has (did you mean 'cat'?)",
        ),
        (
            'image,label,split\ncat/0.png,cat,train\n',
            {'test_fraction': 0.3},
            'because a column says the splits',
        ),
        ('image,label\ncat/0.png,cat\n', {'label_column': 'lable'}, "data.label_column='lable'"),
        ('image,label\ncat/0.png,cat\n', {'test_fraction': 2.0}, 'data.test_fraction=2.0'),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(images, tmp_path, text, options, message):
    path = tmp_path / 't.csv'
    path.write_text(text)
    split = options.pop('split', 'train')
    with pytest.raises(UsageError) as error:
        ImageTable(split, str(path), root=str(images), **options)
    assert message in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['none.csv', 'table.xlsx', 'broken.parquet'])
def test_what_is_no_table_is_one_line(tmp_path, name):
    if name.startswith('broken'):
        pytest.importorskip('pyarrow')
        (tmp_path / name).write_bytes(b'PAR1 nothing')
    with pytest.raises(UsageError, match=f'{name}.*: (cannot be read as a table|must be a .csv)'):
        ImageTable('train', str(tmp_path / name))
