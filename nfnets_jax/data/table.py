"""A table of image files with their labels: CSV, TSV or Parquet."""

import collections
import csv
import fnmatch
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from nfnets_jax import extras, fields, files
from nfnets_jax.data.folder import SplitSeed, TestFraction, hold_out
from nfnets_jax.data.preprocessing import ImageError
from nfnets_jax.data.splits import ALL, SPLIT_NAMES, SPLITS, MissingSplit, check_split
from nfnets_jax.errors import UsageError, nearest
from nfnets_jax.fields import Field

_DELIMITERS = {'.csv': ',', '.tsv': '\t'}

# What the columns of a table may be called, in upper or lower case.
COLUMN_NAMES = {
    'image': (
        'image',
        'path',
        'file',
        'filename',
        'file_name',
        'filepath',
        'image_path',
        'image_id',
    ),
    'label': ('label', 'class', 'category', 'target', 'class_name'),
    'split': ('split', 'subset', 'partition', 'set'),
}


Labels = tuple[str, ...]  # of one image
Row = tuple[str, Labels]  # path of the image, and its labels


class ImageTable:
    """A table with a row for each image file: its path, its label and perhaps its split.

    Labels are numbered in the order of their names, or of their values where all are integers;
    those of the training split are the classes. Without a column for the split, a fixed share of
    every class, drawn by `split_seed`, is held out as 'test', as `ImageFolder` does. The values of
    that column are the names in `SPLIT_NAMES`; where there is val but no test, 'test' is val, and
    there is no 'validation'. Rows without a path or without a label are left out and counted.

    With `label_separator` or `label_columns` an image may have several labels, or none, and
    `labels` is uint8 [N, K]. The share to hold out is then one of all rows.

    `split` is 'train', 'validation' or 'test', or 'all' where there are no splits.

    Raises:
        MissingSplit: the table has no such split.
        UsageError: the file is not such a table, has no such column, names an unknown split, or its
            first image is not there.
    """

    @fields.checked('data')
    def __init__(
        self,
        split: str,
        path: Annotated[str | os.PathLike, Field('The .csv, .tsv or .parquet file.')],
        root: Annotated[str, Field("Directory of its paths; '': that of the table.")] = '',
        image_column: Annotated[str, Field("Its column of paths; '': found by its name.")] = '',
        label_column: Annotated[str, Field("Its column of labels; '': found by its name.")] = '',
        label_separator: Annotated[
            str, Field("Between the labels of an image, such as '|'; '': it has one label.")
        ] = '',
        label_columns: Annotated[
            Sequence[str],
            Field(
                "Columns of 0 and 1, one for each class, instead of a column of labels; '*' stands "
                'for any characters.'
            ),
        ] = (),
        split_column: Annotated[str, Field("Its column of splits; '': found by its name.")] = '',
        suffix: Annotated[str, Field("Appended to every path, such as '.jpg'.")] = '',
        test_fraction: TestFraction = None,
        split_seed: SplitSeed = None,
    ):
        check_split('table', split, (*SPLITS, ALL))
        table = pathlib.Path(files.expand(path))
        self._root = pathlib.Path(files.expand(root)) if root else table.parent
        columns = _read(table)
        images = _column(table, columns, 'image', image_column)
        splits = _column(table, columns, 'split', split_column)
        several = bool(label_separator or label_columns)
        if label_columns:
            either = {'label_column': label_column, 'label_separator': label_separator}
            for option, value in either.items():
                if value:
                    raise UsageError(
                        f'data.{option}={value!r}: data.label_columns say the labels; leave one out'
                    )
            others = {k: v for k, v in columns.items() if v is not images and v is not splits}
            chosen = _matching(table, others, label_columns)
            labels = _indicated(table, {name: columns[name] for name in chosen})
        else:
            column = _column(table, columns, 'label', label_column)
            if label_separator and not any(label_separator in text for text in column):
                raise UsageError(
                    f'data.label_separator={label_separator!r}: stands in no row of {path}; give '
                    "what is between the labels of an image, or '' where each has one"
                )
            if not label_separator and any(isinstance(text, _JoinedList) for text in column):
                raise UsageError(
                    f"data.label_separator is missing: {path} has lists of labels; give '|'"
                )
            labels = [_split_labels(text, label_separator) for text in column]
        self.name, self.origin = f'{path} ({split})', str(path)
        self.left_out: dict[str, int] = collections.Counter()
        rows: dict[str, list[Row]] = collections.defaultdict(list)
        for i, (image, names) in enumerate(zip(images, labels, strict=True)):
            if image and (names or several):
                owner = _split_name(splits[i], table, i + 2) if splits else ALL
                rows[owner].append((image + suffix, names))
            else:
                self.left_out['rows without ' + ('a label' if image else 'a path')] += 1
        if splits and (test_fraction is not None or split_seed is not None):
            raise UsageError(
                f'data.test_fraction, data.split_seed: nothing is held out of {path}, because a '
                'column says the splits; leave them out'
            )
        if 'test' not in rows and 'validation' in rows:
            rows['test'] = rows.pop('validation')
        if label_columns:
            self.class_names = tuple(chosen)
        else:
            training = rows[ALL] + rows['train']
            self.class_names = _class_names(name for _, names in training for name in names)
        numbers = {name: number for number, name in enumerate(self.class_names)}
        if not splits and split not in ('validation', ALL):
            groups = [str(path)] if several else self.class_names
            rows[split] = _held_out(rows[ALL], split, groups, test_fraction, split_seed or 0)
        if not (found := rows[split]):
            raise MissingSplit(f'{path}: no rows of the split {split!r}')
        for image, names in found:
            for name in names:
                if name not in numbers:
                    raise UsageError(
                        f'{path}: {image} of {split} has the label {name!r}, which no training '
                        f'image has{nearest(name, self.class_names)}'
                    )
        self._images = [image for image, _ in found]
        if several:
            self.labels = np.zeros((len(found), len(numbers)), np.uint8)
            for i, (_, names) in enumerate(found):
                self.labels[i, [numbers[name] for name in names]] = 1
        else:
            self.labels = np.array([numbers[name] for _, (name,) in found], np.int32)
        if not os.path.exists(self.where(0)):
            raise UsageError(
                f'{path}: its image {self._images[0]!r} is not in {self._root}; say where the '
                "images are by data.root, or what their names end with by data.suffix='.jpg'"
            )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            with open(self.where(index), 'rb') as file:
                label = self.labels[index]
                return {'image': file.read(), 'label': label if label.ndim else int(label)}
        except OSError as error:
            raise ImageError(f'cannot be read: {error.strerror}') from error

    def where(self, index: int) -> str:
        return str(self._root / self._images[index])

    def checksum(self) -> str:
        def names(label):
            if label.ndim:
                return [self.class_names[i] for i in np.flatnonzero(label)]
            return self.class_names[label]

        rows = [(x, names(label)) for x, label in zip(self._images, self.labels, strict=True)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _read(path: pathlib.Path) -> dict[str, Sequence[str]]:
    """Returns the columns of a table as text, '' where a value is missing."""
    suffix = path.suffix.lower()
    if suffix not in (*_DELIMITERS, '.parquet'):
        raise UsageError(f'data.path={str(path)!r}: must be a .csv, .tsv or .parquet file')
    try:
        if suffix == '.parquet':
            return _read_parquet(path)
        with open(path, encoding='utf-8-sig', errors='surrogateescape', newline='') as file:
            reader = csv.reader(file, delimiter=_DELIMITERS[suffix], strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows = [row for row in reader if row]
    except (OSError, ValueError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UsageError(f'data.path={str(path)!r}: cannot be read as a table: {reason}') from error
    if not rows:
        raise UsageError(f'data.path={str(path)!r}: has no rows below its header')
    if repeated := {name for name in header if header.count(name) > 1}:
        raise UsageError(f'data.path={str(path)!r}: has two columns {min(repeated)!r}')
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise UsageError(
                f'{path}: row {number} has {len(row)} values, but the header {len(header)}'
            )
    return {name: [row[i].strip() for row in rows] for i, name in enumerate(header)}


def _read_parquet(path: pathlib.Path) -> dict[str, Sequence[str]]:
    with extras.optional():
        from pyarrow import parquet
    table = parquet.read_table(path)
    return {name: list(map(_as_text, table[name].to_pylist())) for name in table.column_names}


class _JoinedList(str):
    """A list of a Parquet file as a text."""


def _as_text(value: Any) -> str:
    """Returns a value of a Parquet file as a .csv would have it; '|' separates those of a list."""
    if isinstance(value, list):
        return _JoinedList('|'.join(map(_as_text, value)))
    return '' if value is None else str(value)


def _column(
    path: pathlib.Path, columns: Mapping[str, Sequence[str]], kind: str, given: str
) -> Sequence[str]:
    """Returns the column of a kind; an empty one for splits that the table does not have."""
    if given:
        if given not in columns:
            raise UsageError(
                f'data.{kind}_column={given!r}: {path} has no such column{nearest(given, columns)}'
            )
        return columns[given]
    names = [name for name in columns if name.lower() in COLUMN_NAMES[kind]]
    if len(names) == 1:
        return columns[names[0]]
    if not names and kind == 'split':
        return ()
    what = f'has {" and ".join(names)}' if names else f'has no column {COLUMN_NAMES[kind][0]!r}'
    raise UsageError(
        f'{path}: {what}; name the one of the {kind}s by data.{kind}_column (its columns: '
        f'{", ".join(columns)})'
    )


def _split_labels(text: str, separator: str) -> Labels:
    """Returns the labels in a cell, each once; all of it is one label if there is no separator."""
    if not separator:
        return (text,) if text else ()
    return tuple(dict.fromkeys(filter(None, map(str.strip, text.split(separator)))))


def _matching(
    path: pathlib.Path, columns: Mapping[str, Sequence[str]], patterns: Sequence[str]
) -> list[str]:
    """Returns the names of the columns that the patterns stand for, in the order of the table."""
    matched: set[str] = set()
    for pattern in patterns:
        exact = {pattern} & set(columns)
        if not (found := exact or set(fnmatch.filter(columns, pattern))):
            raise UsageError(
                f'data.label_columns={pattern!r}: {path} has no such column'
                f'{nearest(pattern, columns)}'
            )
        matched |= found
    return [name for name in columns if name in matched]


_IS_THERE = {'1': True, '1.0': True, 'true': True, '0': False, '0.0': False, 'false': False}


def _indicated(path: pathlib.Path, columns: Mapping[str, Sequence[str]]) -> list[Labels]:
    """Returns the labels of every row: the names of the columns that are 1 there, not 0."""
    indicators = []
    for name, values in columns.items():
        known = {value: _IS_THERE.get(value.lower()) for value in set(values)}
        if wrong := [value for value, is_there in known.items() if is_there is None]:
            row = min(map(values.index, wrong))
            raise UsageError(
                f'{path}: row {row + 2} has {values[row]!r} in the column {name!r} of '
                'data.label_columns: must be 0 or 1'
            )
        indicators.append([known[value] for value in values])
    return [tuple(itertools.compress(columns, row)) for row in zip(*indicators, strict=True)]


def _split_name(text: str, path: pathlib.Path, row: int) -> str:
    """Returns the split that a row names, a key of `SPLIT_NAMES`."""
    for split, names in SPLIT_NAMES.items():
        if text.lower() in names:
            return split
    known = [name for names in SPLIT_NAMES.values() for name in names]
    raise UsageError(f'{path}: row {row} is of the split {text!r}{nearest(text, known)}')


def _class_names(labels: Iterable[str]) -> tuple[str, ...]:
    names = set(labels)
    are_integers = all(re.fullmatch(r'-?[0-9]+', name) for name in names)
    return tuple(sorted(names, key=int if are_integers else None))


def _held_out(
    rows: Sequence[Row],
    split: str,
    groups: Sequence[str],
    test_fraction: float | None,
    seed: int,
) -> list[Row]:
    """Returns the train or test part of the rows of every class; a single group holds all rows."""
    members: dict[str, list[Row]] = {name: [] for name in groups}
    for row in sorted(rows):
        members[row[1][0] if len(groups) > 1 else groups[0]].append(row)
    return [
        row
        for number, name in enumerate(groups)
        for row in hold_out(members[name], split, test_fraction, seed=(seed, number), name=name)
    ]
