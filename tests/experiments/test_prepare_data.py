import json
import pathlib
import shutil
import struct

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import prepare_data
from nfnets_jax.data.sources import open_source
from nfnets_jax.errors import UsageError


class PreparedPictures(tfds.core.GeneratorBasedBuilder):
    """Pictures by class, and nothing to download."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        features = {
            'image': tfds.features.Image(shape=(4, 4, 1)),
            'label': tfds.features.ClassLabel(names=['ape', 'bee', 'cat']),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {'train': self._generate_examples()}

    def _generate_examples(self):
        for i in range(20):
            yield i, {'image': np.full((4, 4, 1), i, np.uint8), 'label': i % 3}


def read(data_dir):
    source = open_source('tfds', 'train', dataset='prepared_pictures', data_dir=str(data_dir))
    return [source[i] for i in range(len(source))]


@pytest.fixture
def prepared(tmp_path):
    directory = prepare_data.prepare('prepared_pictures', str(tmp_path))
    assert directory == tmp_path / 'prepared_pictures' / '1.0.0'
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
    assert prepare_data.prepare('prepared_pictures', str(tmp_path)) == prepared
    assert {path: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


def test_tfrecords_are_converted_by_the_command_the_error_names(prepared, tmp_path):
    expected = read(tmp_path)
    as_tfrecords(prepared)
    with pytest.raises(UsageError, match=r'as tfrecord.*prepare_data --dataset=prepared_pictures'):
        read(tmp_path)
    prepare_data.prepare('prepared_pictures', str(tmp_path))
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
            prepare_data.prepare('prepared_pictures', str(tmp_path))
        with pytest.raises(UsageError, match='prepared as tfrecord'):
            read(tmp_path)
    records.write_bytes(whole)
    prepare_data.prepare('prepared_pictures', str(tmp_path))
    assert read(tmp_path) == expected


def test_preparing_that_stops_is_not_taken_for_whole(tmp_path, monkeypatch):
    """As when the disk is full."""
    generate = PreparedPictures._generate_examples

    def full_disk(self):
        yield from list(generate(self))[:10]
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(PreparedPictures, '_generate_examples', full_disk)
    with pytest.raises(UsageError, match='No space left on device.*same command continues'):
        prepare_data.prepare('prepared_pictures', str(tmp_path))
    with pytest.raises(UsageError, match='not found'):
        read(tmp_path)
    monkeypatch.undo()
    prepare_data.prepare('prepared_pictures', str(tmp_path))
    assert len(read(tmp_path)) == 20


def test_space_is_checked_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10, 10, 0))
    monkeypatch.setattr(tfds.core.DatasetInfo, 'download_size', 3_000_000_000)
    with pytest.raises(UsageError, match=r'needs 3\.0 GB in .* 0\.0 GB are free'):
        prepare_data.prepare('prepared_pictures', str(tmp_path))
    assert not list(tmp_path.rglob('*.array_record*'))


def test_imagenet_says_what_it_needs(tmp_path):
    manual = tmp_path / 'downloads' / 'manual'
    manual.mkdir(parents=True)
    (manual / 'ILSVRC2012_img_train.tar').write_bytes(b'')
    with pytest.raises(UsageError, match=r'needs ILSVRC2012_img_val\.tar in .*manual'):
        prepare_data.prepare('imagenet2012', str(tmp_path))
    assert not (tmp_path / 'imagenet2012').exists() or not list(
        pathlib.Path(tmp_path / 'imagenet2012').rglob('*record*')
    )
