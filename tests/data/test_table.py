import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.preprocessing import MultiLabelBinarizer

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
        (f'{name}/{i}', 10 if name == 'cat' else -9) for name in ('cat', 'dog') for i in range(6)
    ]
    path = write(tmp_path / 't.csv', rows, ('id', 'Target'))
    source = ImageTable(
        'train', path, root=str(images), image_column='id', suffix='.png', test_fraction=0.5
    )
    assert source.class_names == ('-9', '10')
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


SEVERAL = [['red', 'big'], [], ['big'], ['red'], ['red', 'wild', 'big'], ['wild']] * 2


@pytest.fixture(scope='module')
def several(images, tmp_path_factory):
    """The options of two tables with the same labels of twelve images, and these as indicators."""
    directory, paths = tmp_path_factory.mktemp('several'), [path for path, _ in rows_of(images)]
    splits = ['train'] * 8 + ['test'] * 4
    names = MultiLabelBinarizer(classes=['big', 'red', 'wild'])
    indicators = names.fit_transform(SEVERAL)
    in_one = [
        (path, ' | '.join(labels), split)
        for path, labels, split in zip(paths, SEVERAL, splits, strict=True)
    ]
    in_three = [
        (path, row[0], f'{row[1]}.0', bool(row[2]), split)
        for path, row, split in zip(paths, indicators, splits, strict=True)
    ]
    header = ('file', 'is_big', 'is_red', 'is_wild', 'split')
    one = write(directory / 'one.csv', in_one, ('file', 'label', 'split'))
    three = write(directory / 'three.csv', in_three, header)
    tables = {
        'separator': {'path': one, 'label_separator': '|'},
        'columns': {'path': three, 'label_columns': ('is_*',)},
    }
    return {name: options | {'root': str(images)} for name, options in tables.items()}, indicators


@pytest.mark.parametrize('kind', ['separator', 'columns'])
def test_several_labels_for_an_image(several, kind):
    options, indicators = several[0][kind], several[1]
    for split, expected in (('train', indicators[:8]), ('test', indicators[8:])):
        source = open_source('table', split, **options)
        np.testing.assert_array_equal(source.labels, expected)
        assert source.labels.dtype == np.uint8
        np.testing.assert_array_equal(source[1]['label'], expected[1])
        assert source.left_out == {}
    prefix = 'is_' if kind == 'columns' else ''
    assert source.class_names == (f'{prefix}big', f'{prefix}red', f'{prefix}wild')


def test_a_parquet_column_of_lists_has_several_labels(images, tmp_path):
    pa = pytest.importorskip('pyarrow')
    from pyarrow import parquet

    paths = [path for path, _ in rows_of(images)]
    table = pa.table({'image': paths, 'label': SEVERAL, 'split': ['train'] * 6 + ['test'] * 6})
    parquet.write_table(table, tmp_path / 't.parquet')
    options = {'path': str(tmp_path / 't.parquet'), 'root': str(images), 'label_separator': '|'}
    source = open_source('table', 'test', **options)
    expected = MultiLabelBinarizer(classes=['big', 'red', 'wild']).fit_transform(SEVERAL[6:])
    np.testing.assert_array_equal(source.labels, expected)
    with pytest.raises(UsageError, match=r'label_separator is missing: .*t\.parquet has lists'):
        open_source('table', 'test', **{**options, 'label_separator': ''})


def test_the_identity_sees_each_of_several_labels(several, images, tmp_path):
    options = several[0]['separator']
    text = pathlib.Path(options['path']).read_text()
    (tmp_path / 'other.csv').write_text(text.replace('red | wild | big', 'red | wild', 1))
    other = options | {'path': str(tmp_path / 'other.csv')}
    first, second = (identify(open_source('table', 'train', **each)) for each in (options, other))
    assert first.class_names == second.class_names
    assert first.checksum != second.checksum


def test_a_share_of_all_rows_is_held_out_where_images_have_several_labels(images, tmp_path):
    rows = [(path, 'a;b' if i % 3 else '') for i, (path, _) in enumerate(rows_of(images))]
    path = write(tmp_path / 't.csv', rows)
    options = {'root': str(images), 'label_separator': ';', 'test_fraction': 0.25}
    train, test = (ImageTable(split, path, **options) for split in ('train', 'test'))
    assert (len(train), len(test)) == (9, 3)
    found = [source.where(i) for source in (train, test) for i in range(len(source))]
    assert sorted(found) == sorted(str(images / path) for path, _ in rows)


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
        (
            'image,label\ncat/0.png,cat;dog\n',
            {'label_separator': '|'},
            "data.label_separator='|': stands in no row",
        ),
        (
            'image,cat,dog\ncat/0.png,1,0\ncat/1.png,1,-1\n',
            {'label_columns': ('cat', 'dog')},
            "row 3 has '-1' in the column 'dog' of data.label_columns: must be 0 or 1",
        ),
        (
            'image,cat,dog\ncat/0.png,1,0\n',
            {'label_columns': ('cats',)},
            "data.label_columns='cats': ",
        ),
        (
            'image,cat,dog\ncat/0.png,1,0\n',
            {'label_columns': ('cat', 'dog'), 'label_separator': '|'},
            "data.label_separator='|': data.label_columns say the labels",
        ),
        ('image,label\ncat/0.png,cat\n', {'test_fraction': 2.0}, 'data.test_fraction=2.0'),
        ('image,label,label\ncat/0.png,cat,dog\n', {}, "has two columns 'label'"),
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
