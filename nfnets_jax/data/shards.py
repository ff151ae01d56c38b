"""Shards of examples as others store them: tar files of WebDataset, Parquet with image bytes.

They are read from front to back, so they are converted before training, see
`experiments.prepare_data`.
"""

import itertools
import json
import pathlib
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from nfnets_jax import extras
from nfnets_jax.data.preprocessing import SUFFIXES
from nfnets_jax.data.splits import SPLIT_NAMES
from nfnets_jax.data.table import COLUMN_NAMES
from nfnets_jax.errors import UsageError, first_line

FORMATS = ('.tar', '.parquet')
_SEVERAL = 'labels'  # the column or key of lists, if there is no 'label'
Name = int | str  # number or name of a class
Label = Name | tuple[Name, ...]  # a tuple where an image may have several


class Shard(NamedTuple):
    """A file with examples."""

    path: pathlib.Path
    split: str  # a key of `SPLIT_NAMES`


def find_shards(directory: pathlib.Path) -> list[Shard]:
    """Returns the shards in a directory, at any depth, in the order of their paths.

    The name of a file or of the nearest directory says the split: train-0001.tar,
    test-00000-of-00004.parquet, validation/7.tar. If none does, all are of 'train'.

    Raises:
      UsageError: there are none, a name says two splits, or some files say none.
    """
    paths = sorted(path for path in directory.rglob('*') if path.suffix in FORMATS)
    if not paths:
        raise UsageError(f'--shards={directory}: there are no {" or ".join(FORMATS)} files in it')
    splits = [_split(path, directory) for path in paths]
    if not any(splits):
        splits = ['train'] * len(paths)
    if '' in splits:
        raise UsageError(
            f'{paths[splits.index("")]}: its name says no split, such as train or test, but that '
            f'of {next(path for path, split in zip(paths, splits, strict=True) if split)} does'
        )
    return [Shard(*pair) for pair in zip(paths, splits, strict=True)]


def _split(path: pathlib.Path, root: pathlib.Path) -> str:
    """Returns the split that the path of a shard names below `root`, '' if none."""
    for name in (path.stem, *path.relative_to(root).parts[-2::-1]):
        words = set(re.split(r'[^a-z]+', name.lower()))
        found = [split for split, names in SPLIT_NAMES.items() if words & set(names)]
        if len(found) > 1:
            raise UsageError(f'{path}: {name!r} says {" and ".join(found)}; rename it')
        if found:
            return found[0]
    return ''


def read_shard(
    path: pathlib.Path, label_column: str = '', *, images: bool = True
) -> Iterator[tuple[bytes, Label]]:
    """Yields the image, as encoded bytes, and the label of every example of a shard.

    Args:
      path: a .tar, in which the files of an example follow one another and differ in what comes
        after the first dot, such as 0001.jpg and 0001.cls, or 0001.json with a 'label' or
        'labels'; or a .parquet with one column of bytes, or of bytes and path, and one of labels.
        A list has all labels of its image.
      label_column: the label's key in .json, or column; '': 'label', or found by its name.
      images: whether to read the images; without them they are empty.

    Raises:
      UsageError: the shard is damaged, or an example has no image or no label.
    """
    read = _read_tar if path.suffix == '.tar' else _read_parquet
    try:
        yield from read(path, label_column, images)
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f'{path}: damaged: {first_line(error)}; replace it') from error


def _read_tar(path: pathlib.Path, key: str, images: bool) -> Iterator[tuple[bytes, Label]]:
    def name(member: tarfile.TarInfo) -> str:
        folder, _, file = member.name.rpartition('/')
        return f'{folder}/{file.partition(".")[0]}'

    with tarfile.open(path, 'r:') as tar:
        files = (member for member in tar if member.isfile())
        for example, group in itertools.groupby(files, name):
            members = {'.' + m.name.rpartition('/')[2].partition('.')[2].lower(): m for m in group}
            found = [suffix for suffix in members if suffix in SUFFIXES]
            if len(found) != 1:
                raise UsageError(
                    f'{path}: {example.lstrip("/")} has {len(found) or "no"} images '
                    f'({", ".join(members)}); each example must have one'
                )
            label = _label_of(path, example, tar, members, (key,) if key else ('label', _SEVERAL))
            yield _content(tar, members[found[0]]) if images else b'', label
        # Two blocks of zeros end a whole file.
        with open(path, 'rb') as file:
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError('it ends without the mark of the end')


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    if len(content := file.read()) != member.size:
        raise tarfile.ReadError('unexpected end of data')
    return content


def _label_of(
    path: pathlib.Path,
    example: str,
    tar: tarfile.TarFile,
    members: dict[str, tarfile.TarInfo],
    keys: Sequence[str],
) -> Label:
    label: Any = None
    if '.cls' in members:
        label = _content(tar, members['.cls']).decode().strip()
        label = int(label) if label.isdecimal() else label
    elif '.json' in members:
        content = json.loads(_content(tar, members['.json']))
        found = [content[k] for k in keys if k in content] if isinstance(content, dict) else []
        label = _as_label(found[0]) if found else None
    if label is None or label == '':
        raise UsageError(
            f'{path}: {example.lstrip("/")} ({", ".join(members)}) has no label: must be an '
            f'integer or a name in .cls, or in .json, or a list of them, as {keys[0]!r}'
        )
    return label


def _as_label(value: Any) -> Label | None:
    """Returns what a .json or .parquet has as a label; None if it is none."""
    if isinstance(value, list):
        names = tuple(dict.fromkeys(value)) if all(type(x) in (int, str) for x in value) else None
        return names if names is None or '' not in names else None
    return value if type(value) in (int, str) else None


def _read_parquet(path: pathlib.Path, column: str, images: bool) -> Iterator[tuple[bytes, Label]]:
    with extras.optional():
        from pyarrow import parquet
    with parquet.ParquetFile(path, page_checksum_verification=True) as file:
        image, label = _columns(path, file.schema_arrow, column)
        columns = [image, label] if images else [label]
        for batch in file.iter_batches(64, columns=columns):
            labels = batch[label].to_pylist()
            contents = batch[image].to_pylist() if images else [b''] * len(labels)
            for content, value in zip(contents, labels, strict=True):
                encoded = content.get('bytes') if isinstance(content, dict) else content
                if encoded is None:
                    raise UsageError(f'{path}: an image has no bytes in the column {image!r}')
                if (found := _as_label(value)) is None:
                    raise UsageError(
                        f'{path}: a label is {value!r} in the column {label!r}; must be an integer '
                        'or a name, or a list of them'
                    )
                yield encoded, found


def _columns(path: pathlib.Path, schema, given: str) -> tuple[str, str]:
    """Returns the names of the columns of images and labels."""
    import pyarrow

    def is_image(kind) -> bool:
        if pyarrow.types.is_struct(kind):
            kind = kind.field('bytes').type if kind.get_field_index('bytes') >= 0 else kind
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    images = [field.name for field in schema if is_image(field.type)]
    known = (given,) if given else COLUMN_NAMES['label']
    labels = [name for name in schema.names if name in known or name.lower() in known]
    labels = labels or [name for name in schema.names if not given and name.lower() == _SEVERAL]
    for found, what in ((images, 'of image bytes'), (labels, 'of labels')):
        if len(found) != 1:
            raise UsageError(
                f'{path}: has {" and ".join(found) or "no"} column{"s" * (len(found) > 1)} {what} '
                f'(its columns: {", ".join(schema.names)}); name that of the labels by '
                '--label_column'
            )
    return images[0], labels[0]


def declared_names(path: pathlib.Path, label_column: str = '') -> Sequence[str]:
    """Returns the names of the classes that Hugging Face stores in a .parquet; () if none."""
    if path.suffix != '.parquet':
        return ()
    with extras.optional():
        from pyarrow import parquet
    try:
        schema = parquet.read_schema(path)
        _, label = _columns(path, schema, label_column)
        stored = json.loads((schema.metadata or {}).get(b'huggingface', b'{}'))
        feature = stored['info']['features'][label]
        return (feature.get('feature') or feature)['names']  # of each entry of a list
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(f'{path}: damaged: {first_line(error)}; replace it') from error
    except (KeyError, TypeError):
        return ()
