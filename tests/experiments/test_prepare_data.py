import contextlib
import json
import pathlib
import resource
import shutil
import struct

import pytest
import tensorflow_datasets as tfds

from experiments import prepare_data
from nfnets_jax.errors import UsageError
from tests.tfds_builders import GreyPictures, open_prepared


def read(data_dir):
    """Returns the labels and pictures of a data set, whose decoding is lossless."""
    source = open_prepared('grey_pictures', data_dir)
    return [(source[i]['label'], source[i]['image'].tobytes()) for i in range(len(source))]


@pytest.fixture
def prepared(tmp_path):
    directory = prepare_data.prepare_dataset('grey_pictures', str(tmp_path))
    assert directory == tmp_path / 'grey_pictures' / '1.0.0'
    return directory


def as_tfrecords(directory):
    """Makes a prepared data set look as TFDS leaves it where TensorFlow writes TFRecords."""
    builder = tfds.builder_from_directory(str(directory))
    records = builder.as_data_source('train').data_source
    (old,) = directory.glob('*array_record*')
    new = old.with_name(old.name.replace('array_record', 'tfrecord'))
    with new.open('wb') as file:
        for record in (records[i] for i in range(len(records))):
            file.write(struct.pack('<QI', len(record), 0) + record + struct.pack('<I', 0))
    old.unlink()
    info = directory / 'dataset_info.json'
    info.write_text(json.dumps(json.loads(info.read_text()) | {'fileFormat': 'tfrecord'}))
    return new


def test_preparing_again_changes_nothing(prepared, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    assert prepare_data.prepare_dataset('grey_pictures', str(tmp_path)) == prepared
    assert {path: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


def test_tfrecords_are_converted_by_the_command_the_error_names(prepared, tmp_path):
    expected = read(tmp_path)
    as_tfrecords(prepared)
    with pytest.raises(UsageError, match=r'as tfrecord.*prepare_data --dataset=grey_pictures'):
        read(tmp_path)
    prepare_data.prepare_dataset('grey_pictures', str(tmp_path))
    assert read(tmp_path) == expected
    assert [path.name for path in prepared.glob('*.tmp')] == []


def test_a_conversion_that_stops_is_not_taken_for_whole(prepared, tmp_path):
    expected = read(tmp_path)
    records = as_tfrecords(prepared)
    whole = records.read_bytes()
    for content, match in (
        (whole[:-9], 'truncated'),
        (whole[: len(whole) // 20 * 19], 'records|trunc'),
    ):
        records.write_bytes(content)
        with pytest.raises(UsageError, match=match):
            prepare_data.prepare_dataset('grey_pictures', str(tmp_path))
        with pytest.raises(UsageError, match='prepared as tfrecord'):
            read(tmp_path)
    records.write_bytes(whole)
    prepare_data.prepare_dataset('grey_pictures', str(tmp_path))
    assert read(tmp_path) == expected


def test_preparing_that_stops_is_not_taken_for_whole(tmp_path, monkeypatch):
    generate = GreyPictures._generate_examples

    def lose_disk(self, start, stop):
        yield from list(generate(self, start, stop))[:10]
        raise OSError(5, 'Input/output error')

    monkeypatch.setattr(GreyPictures, '_generate_examples', lose_disk)
    with pytest.raises(UsageError, match='Input/output error.*same command continues'):
        prepare_data.prepare_dataset('grey_pictures', str(tmp_path))
    with pytest.raises(UsageError, match='not found'):
        read(tmp_path)
    monkeypatch.undo()
    prepare_data.prepare_dataset('grey_pictures', str(tmp_path))
    assert len(read(tmp_path)) == 20


@contextlib.contextmanager
def largest_file(size):
    """Lets writes beyond `size` bytes of a file fail, as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# The progress bar, too, writes to a file where pytest runs.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('size', [300, 3000])  # while examples are collected; in the ArrayRecord
def test_a_full_disk_leaves_nothing_that_is_taken_for_whole(tmp_path, size):
    with (
        largest_file(size),
        pytest.raises(UsageError, match='File too large.*same command continues'),
    ):
        prepare_data.prepare_dataset('grey_pictures', str(tmp_path))
    with pytest.raises(UsageError, match='not found'):
        read(tmp_path)
    prepare_data.prepare_dataset('grey_pictures', str(tmp_path))
    assert len(read(tmp_path)) == 20


def test_a_full_disk_while_converting(prepared, tmp_path):
    expected = read(tmp_path)
    as_tfrecords(prepared)
    with (
        largest_file(3000),
        pytest.raises(UsageError, match='File too large.*same command continues'),
    ):
        prepare_data.prepare_dataset('grey_pictures', str(tmp_path))
    with pytest.raises(UsageError, match='prepared as tfrecord'):
        read(tmp_path)
    prepare_data.prepare_dataset('grey_pictures', str(tmp_path))
    assert read(tmp_path) == expected


def test_space_is_checked_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10, 10, 0))
    monkeypatch.setattr(tfds.core.DatasetInfo, 'download_size', 3_000_000_000)
    with pytest.raises(UsageError, match=r'needs 3\.0 GB in .* 0\.0 GB are free'):
        prepare_data.prepare_dataset('grey_pictures', str(tmp_path))
    assert not list(tmp_path.rglob('*.array_record*'))


def test_imagenet_says_what_it_needs(tmp_path):
    manual = tmp_path / 'downloads' / 'manual'
    manual.mkdir(parents=True)
    (manual / 'ILSVRC2012_img_train.tar').write_bytes(b'')
    with pytest.raises(UsageError, match=r'needs ILSVRC2012_img_val\.tar in .*manual'):
        prepare_data.prepare_dataset('imagenet2012', str(tmp_path))
    assert not (tmp_path / 'imagenet2012').exists() or not list(
        pathlib.Path(tmp_path / 'imagenet2012').rglob('*record*')
    )
