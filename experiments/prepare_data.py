"""Prepares a data set of tensorflow_datasets for random access.

    python -m experiments.prepare_data --dataset=cifar10 --data_dir=~/tensorflow_datasets
    python -m experiments.prepare_data --shards=DIRECTORY --dataset=my_images

The first downloads the data set and writes ArrayRecord files; TensorFlow is not needed. A data set
that exists as TFRecords is converted beside them. --shards converts files that others have
prepared, tar files of WebDataset or Parquet files with image bytes, as of Hugging Face.

If it was stopped, run it again: finished downloads and files are kept, and nothing unfinished is
used, because a data set counts as prepared only when its dataset_info.json says so, which is
written last.
"""

import contextlib
import io
import os
import pathlib
import shutil
import struct
from collections.abc import Iterable, Iterator

import numpy as np
import tqdm
from absl import flags
from PIL import Image

from experiments.export import read_class_names
from experiments.launch import cli
from experiments.run import convert_shards
from nfnets_jax import files
from nfnets_jax.data.tfds import DEFAULT_DATA_DIR, open_builder
from nfnets_jax.errors import UsageError

_IMAGENET_ARCHIVES = ('ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar')


def prepare_dataset(dataset: str, data_dir: str) -> pathlib.Path:
    """Prepares a data set as ArrayRecord files, unless it is prepared already.

    Args:
        dataset: its name in tensorflow_datasets, e.g. 'cifar10'.
        data_dir: directory of the prepared data sets.

    Returns:
        The directory of the data set.

    Raises:
        UsageError: no such data set; archives, disk space or a network connection are missing.
    """
    builder = open_builder(dataset, data_dir)
    formats = {f.value for f in builder.info.available_file_formats()}
    directory = pathlib.Path(builder.data_dir)
    if builder.info.splits and 'array_record' in formats:
        return directory
    with _resumable(dataset, directory):
        if builder.info.splits and 'tfrecord' in formats:
            _convert(builder)
        else:
            _download_and_prepare(builder)
    return directory


def prepare_shards(
    shards: str, dataset: str, data_dir: str, classes: str | None = None, label_column: str = ''
) -> pathlib.Path:
    """Converts shards of others to a data set of ArrayRecord files, unless that is done.

    Args:
        shards: their directory, see `nfnets_jax.data.shards`.
        dataset: the name that the data set shall have.
        data_dir: directory of the prepared data sets.
        classes: a file with the names of the classes, one a line, where labels are integers.
        label_column: see `nfnets_jax.data.shards.read_shard`.

    Returns:
        The directory of the data set.

    Raises:
        UsageError: a shard is damaged, or there is no space on the disk.
    """
    root = pathlib.Path(files.expand(data_dir))
    if not (root / dataset).exists():
        _check_space(dataset, convert_shards.size(shards), root)
    names = read_class_names(classes) if classes else ()
    with _resumable(dataset, root / dataset):
        return convert_shards.convert(
            shards, dataset, root, classes=names, label_column=label_column
        )


@contextlib.contextmanager
def _resumable(dataset: str, directory: pathlib.Path) -> Iterator[None]:
    """Turns errors of the disk into one line that says how to go on."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, 'strerror', None) or str(error).partition(';')[0]
        # ArrayRecord's writer reports a full disk by a RuntimeError.
        if isinstance(error, RuntimeError) and 'write() failed' not in reason:
            raise
        raise UsageError(
            f'{dataset} is not prepared: {reason} ({directory}); the same command continues'
        ) from error


def _download_and_prepare(builder) -> None:
    import tensorflow_datasets as tfds

    root = pathlib.Path(builder.data_dir_root)
    manual = root / 'downloads' / 'manual'
    if builder.name == 'imagenet2012':
        missing = [name for name in _IMAGENET_ARCHIVES if not (manual / name).exists()]
        if missing:
            raise UsageError(
                f'imagenet2012 needs {" and ".join(missing)} in {manual}: download them by hand '
                'from https://image-net.org/download-images (148 GB; as much again is written)'
            )
    # TFDS knows the size of most data sets.
    needed = int(builder.info.download_size or 0) + int(builder.info.dataset_size or 0)
    _check_space(builder.name, needed, root)
    _without_tensorflow(builder)
    config = tfds.download.DownloadConfig(manual_dir=str(manual), try_download_gcs=False)
    try:
        builder.download_and_prepare(file_format='array_record', download_config=config)
    except OSError:
        raise
    except AssertionError as error:  # how builders ask for files that must be downloaded by hand
        raise UsageError(f'{builder.name}: {" ".join(str(error).split())[:400]}') from error
    except Exception as error:
        if 'download' in type(error).__name__.lower() or 'request' in type(error).__module__:
            reason = ' '.join(str(error).split())[:200]
            raise UsageError(
                f'{builder.name}: cannot be downloaded ({reason}); the same command continues'
            ) from error
        raise


def _check_space(name: str, needed: int, root: pathlib.Path) -> None:
    """Raises a UsageError if the disk has less space than a data set needs, in bytes."""
    there = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UsageError(
            f'{name} needs {needed / 1e9:.1f} GB in {root}, where {free / 1e9:.1f} GB are '
            'free: make room or choose another --data_dir'
        )


def _without_tensorflow(builder) -> None:
    """Makes a builder pass encoded images to TFDS, for which TFDS needs no TensorFlow.

    TFDS uses TensorFlow to encode arrays, and to convert ImageNet's 22 CMYK images and its PNG to
    RGB JPEGs. Here arrays are encoded as PNG, and our decoder reads CMYK and PNG.
    """
    if not hasattr(builder, '_generate_examples'):
        return
    generate = builder._generate_examples
    builder._generate_examples = lambda *args, **kwargs: _encoded(generate(*args, **kwargs))
    if hasattr(builder, '_fix_image'):
        builder._fix_image = lambda name, image: image


def _encoded(examples: Iterable[tuple]) -> Iterator[tuple]:
    for key, example in examples:
        yield key, {name: _encode(value) for name, value in example.items()}


def _encode(value):
    """Returns an image array as a PNG file, anything else unchanged."""
    if not (isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3):
        return value
    stream = io.BytesIO()
    Image.fromarray(value[..., 0] if value.shape[-1] == 1 else value).save(stream, 'PNG')
    stream.seek(0)
    return stream


def _convert(builder) -> None:
    """Copies every TFRecord file of a data set to an ArrayRecord file beside it."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core import dataset_info, file_adapters

    directory = pathlib.Path(builder.data_dir)
    files = [
        (pathlib.Path(path), count)
        for split in builder.info.splits.values()
        for path, count in zip(split.filepaths, split.shard_lengths, strict=True)
    ]
    for path, count in tqdm.tqdm(files, unit='file', desc=f'converting {builder.info.full_name}'):
        target = path.with_name(path.name.replace('.tfrecord-', '.array_record-'))
        if target.exists():  # Only a whole file has this name.
            continue
        beside = target.with_name(f'.{target.name}.tmp')
        writer = ArrayRecordWriter(
            str(beside), 'group_size:1'
        )  # one record each, for random access
        written = 0
        for record in read_tfrecords(path):
            writer.write(record)
            written += 1
        writer.close()
        if written != count:
            raise UsageError(f'{path}: holds {written} records instead of {count}; replace it')
        os.replace(beside, target)
    proto = dataset_info.read_proto_from_builder_dir(directory)
    proto.alternative_file_formats.append(file_adapters.FileFormat.ARRAY_RECORD.value)
    new = directory / 'new'
    new.mkdir(exist_ok=True)
    dataset_info.write_dataset_info_proto(proto, dataset_info_dir=new)
    os.replace(new / 'dataset_info.json', directory / 'dataset_info.json')
    new.rmdir()


def read_tfrecords(path: str | os.PathLike) -> Iterator[bytes]:
    """Yields the records of a TFRecord file, in which lengths and checksums surround each.

    The checksums are not compared. A truncated file raises a UsageError.
    """
    with open(path, 'rb') as file:
        while header := file.read(12):
            length = struct.unpack('<Q', header[:8])[0] if len(header) == 12 else 0
            record = file.read(length)
            if len(header) < 12 or len(record) < length or len(file.read(4)) < 4:
                raise UsageError(f'{path}: truncated; replace it')
            yield record


def main() -> None:
    if _SHARDS.value is None:
        for flag in (_CLASSES, _LABEL_COLUMN):
            if flag.value:
                raise UsageError(f'--{flag.name} is for --shards: leave it out')
        directory = prepare_dataset(_DATASET.value, _DATA_DIR.value)
    else:
        options = _DATASET.value, _DATA_DIR.value, _CLASSES.value, _LABEL_COLUMN.value
        directory = prepare_shards(_SHARDS.value, *options)
    print(
        f'{_DATASET.value} is prepared in {directory}; train with --config.data.name=tfds '
        f'--config.data.dataset={_DATASET.value} --config.data.data_dir={_DATA_DIR.value}'
    )


if __name__ == '__main__':
    _DATASET = flags.DEFINE_string(
        'dataset', None, 'Name of the data set in TFDS; with --shards a new one.', required=True
    )
    _SHARDS = cli.define_path('shards', None, 'Directory of .tar or .parquet files to convert.')
    _CLASSES = cli.define_path(
        'classes',
        None,
        'Names of the classes, one a line, where labels are integers.',
    )
    _LABEL_COLUMN = flags.DEFINE_string(
        'label_column', '', 'Column of labels, or their key in .json.'
    )
    _DATA_DIR = cli.define_path(
        'data_dir', DEFAULT_DATA_DIR, 'Directory of the prepared data sets.'
    )
    cli.run(main, groups={'shards': ('shards', 'classes', 'label_column')})
