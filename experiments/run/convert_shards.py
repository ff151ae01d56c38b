"""Converts shards of others to a data set of tensorflow_datasets, for random access.

Used by `experiments.prepare_data`. Every shard becomes one ArrayRecord file. The data set counts as
prepared only when its dataset_info.json is there, which is written last; what was converted before
a stop is kept.
"""

import io
import json
import os
import pathlib
import re
import zlib
from collections.abc import Sequence
from typing import Any

import tqdm

from nfnets_jax import files
from nfnets_jax.data import shards
from nfnets_jax.data.tfds import is_known
from nfnets_jax.errors import UsageError, first_line

_VERSION = '1.0.0'
_PLAN = 'shards.json'
_NAME = r'[a-z][a-z0-9_]*'


def convert(
    directory: str,
    dataset: str,
    data_dir: pathlib.Path,
    *,
    classes: Sequence[str] = (),
    label_column: str = '',
) -> pathlib.Path:
    """Converts the shards in a directory, unless that is done.

    Args:
      directory: holds the shards, see `nfnets_jax.data.shards`.
      dataset: the name that the data set shall have.
      data_dir: directory of the prepared data sets.
      classes: names of the classes where labels are integers; else those that the shards declare,
        or the integers.
      label_column: see `shards.read_shard`.

    Returns:
      The directory of the data set.

    Raises:
      UsageError: a shard is damaged, the data set there is of other shards, or the name is that of
        another data set.
    """
    if not re.fullmatch(_NAME, dataset):
        raise UsageError(f'--dataset={dataset}: must be like my_images: a-z, 0-9 and _')
    root = pathlib.Path(files.expand(directory))
    found = shards.find_shards(root)
    target = data_dir / dataset / _VERSION
    sizes = {str(s.path.relative_to(root)): s.path.stat().st_size for s in found}
    plan = _read_plan(target, sizes, label_column, classes)
    if plan is None:
        _check_name(dataset, data_dir)
        plan = _make_plan(found, sizes, label_column, classes)
        target.mkdir(parents=True, exist_ok=True)
        files.atomic_write(target / _PLAN, json.dumps(plan, indent=1) + '\n')
    if not (target / 'dataset_info.json').exists():
        _write(target, dataset, found, plan)
    return target


def size(directory: str) -> int:
    """Returns the bytes of the shards in a directory."""
    found = shards.find_shards(pathlib.Path(files.expand(directory)))
    return sum(shard.path.stat().st_size for shard in found)


def _check_name(dataset: str, data_dir: pathlib.Path) -> None:
    """Raises a UsageError if the name would be read as another data set's."""
    found = (data_dir / dataset).glob('*')
    others = [path for path in found if path.is_dir() and path.name != _VERSION]
    if others:
        raise UsageError(f'{others[0]} is of another data set; choose another --dataset')
    if is_known(dataset):
        raise UsageError(f'--dataset={dataset}: is a data set of TFDS; choose another')


def _read_plan(
    target: pathlib.Path, sizes: dict[str, int], label_column: str, classes: Sequence[str]
) -> dict[str, Any] | None:
    """Returns what was found in the shards when their conversion began; None before that."""
    if not (target / _PLAN).exists():
        if target.exists() and any(target.iterdir()):
            raise UsageError(f'{target} holds another data set; choose another --dataset')
        return None
    plan = json.loads((target / _PLAN).read_text())
    given = {'sizes': sizes, 'label_column': label_column, 'classes': list(classes)}
    if any(plan[key] != value for key, value in given.items()):
        raise UsageError(
            f'{target} is of other shards, or other options: remove it, or choose another --dataset'
        )
    return plan


def _make_plan(
    found: Sequence[shards.Shard],
    sizes: dict[str, int],
    label_column: str,
    classes: Sequence[str],
) -> dict[str, Any]:
    """Reads all labels; returns the names of the classes and how many examples each shard has."""
    counts = []
    seen: set[Any] = set()
    several: set[bool] = set()
    for shard in tqdm.tqdm(found, unit='shard', desc='reading labels'):
        labels = [label for _, label in shards.read_shard(shard.path, label_column, images=False)]
        if not labels:
            raise UsageError(f'{shard.path}: holds no examples')
        counts.append(len(labels))
        several |= {isinstance(label, tuple) for label in labels}
        if len(several) > 1:
            raise UsageError(f'{shard.path}: has labels that are lists, and others that are not')
        seen |= {x for label in labels for x in (label if isinstance(label, tuple) else (label,))}
        if len({type(label) for label in seen}) > 1:
            raise UsageError(f'{shard.path}: has labels that are integers, and others that are not')
    declared = classes or shards.declared_names(found[0].path, label_column)
    if not seen:
        raise UsageError(f'{found[0].path}: no image has a label')
    if isinstance(next(iter(seen)), str):
        names = list(declared) or sorted(seen)
        unknown = sorted(seen - set(names))
    else:
        names = list(declared) or [str(number) for number in range(max(seen) + 1)]
        unknown = sorted(label for label in seen if not 0 <= label < len(names))
    if unknown:
        raise UsageError(f'the label {unknown[0]!r} is none of the {len(names):,} classes')
    return {
        'sizes': sizes,
        'label_column': label_column,
        'classes': list(classes),
        'names': names,
        'several': several == {True},
        'counts': counts,
    }


def _write(
    target: pathlib.Path, dataset: str, found: Sequence[shards.Shard], plan: dict[str, Any]
) -> None:
    import tensorflow_datasets as tfds  # here: a slow import
    from tensorflow_datasets.core import example_serializer, file_adapters, naming

    label = tfds.features.ClassLabel(names=plan['names'])
    features = tfds.features.FeaturesDict(
        {
            'image': tfds.features.Image(shape=(None, None, 3)),
            'label': tfds.features.Sequence(label) if plan.get('several') else label,
        }
    )
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())

    def record(image: bytes, label: shards.Label) -> bytes:
        names = list(label) if isinstance(label, tuple) else label
        example = {'image': io.BytesIO(image), 'label': names}
        return serializer.serialize_example(features.encode_example(example))

    template = naming.ShardedFileTemplate(
        data_dir=target, dataset_name=dataset, filetype_suffix='array_record'
    )
    splits = []
    with tqdm.tqdm(total=sum(plan['counts']), unit='image', desc=f'converting {dataset}') as bar:
        for split in dict.fromkeys(shard.split for shard in found):
            own = [
                (shard.path, count)
                for shard, count in zip(found, plan['counts'], strict=True)
                if shard.split == split
            ]
            paths = [
                pathlib.Path(
                    template.replace(split=split).sharded_filepath(
                        shard_index=index, num_shards=len(own)
                    )
                )
                for index in range(len(own))
            ]
            for (path, count), file in zip(own, paths, strict=True):
                if not file.exists():  # Only a whole file has this name.
                    examples = shards.read_shard(path, plan['label_column'])
                    _write_records(file, (record(*example) for example in examples), count, path)
                bar.update(count)
            splits.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[count for _, count in own],
                    num_bytes=sum(file.stat().st_size for file in paths),
                    filename_template=template.replace(split=split),
                )
            )
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=dataset, version=tfds.core.Version(_VERSION), data_dir=str(target), module_name=''
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    info.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
    info.set_splits(tfds.core.splits.SplitDict(splits))
    new = target / 'new'
    new.mkdir(exist_ok=True)
    info.write_to_directory(new)
    for name in sorted(os.listdir(new), key=lambda name: name == 'dataset_info.json'):
        os.replace(new / name, target / name)
    new.rmdir()


def _write_records(file: pathlib.Path, records, count: int, source: pathlib.Path) -> None:
    """Writes records to an ArrayRecord file, and compares it with what was written."""
    from array_record.python import array_record_module

    beside = file.with_name(f'.{file.name}.tmp')
    # One record in a group, for random access.
    writer = array_record_module.ArrayRecordWriter(str(beside), 'group_size:1')
    written, checksum = 0, 0
    for record in records:
        writer.write(record)
        written, checksum = written + 1, zlib.crc32(record, checksum)
    writer.close()
    if written != count:
        raise UsageError(f'{source}: holds {written} examples now, but {count} at first')
    reader = array_record_module.ArrayRecordReader(str(beside))
    again, there = 0, reader.num_records()
    try:
        for index in range(there):
            again = zlib.crc32(reader.read([index])[0], again)
    except (IndexError, RuntimeError, ValueError) as error:
        raise UsageError(f'{beside}: cannot be read back: {first_line(error)}') from error
    finally:
        reader.close()
    if there != count or again != checksum:
        raise UsageError(f'{beside}: does not hold what was written; the same command continues')
    os.replace(beside, file)
