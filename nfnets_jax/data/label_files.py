"""Files that say the classes of images in one directory, as of ImageNet's validation images."""

import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

from nfnets_jax.data.preprocessing import SUFFIXES
from nfnets_jax.errors import UsageError, nearest

_KAGGLE = 'imageid,predictionstring'


def read_classes(
    path: pathlib.Path, images: Sequence[pathlib.Path], class_names: Sequence[str]
) -> list[str | None]:
    """Returns the class of each image by a file in one of these forms; None: it names none.

    * A line for each image: its file, with or without directory and suffix, and its class: the
      name, or the number from 0 in the order of `class_names`.
    * LOC_val_solution.csv of Kaggle: ImageId,PredictionString.
    * The name of a class in each line, in the order of the images.
    * ILSVRC2012_validation_ground_truth.txt: a number in each line, in the order of the images.
      These numbers, from 1, are in another order than the WordNet IDs, which meta.mat of the same
      development kit gives; it must lie beside the file.

    Args:
      path: the file.
      images: sorted.
      class_names: the classes that are known.

    Raises:
      UsageError: the file is in none of these forms, may be read in two ways, or does not fit the
        images.
    """
    lines = _read(path)
    if lines[0].replace(' ', '').lower() == _KAGGLE:
        classes = dict(_kaggle_row(path, line) for line in lines[1:])
    elif all(re.fullmatch(r'\S+', line) and ',' not in line for line in lines):
        return list(_in_order(path, lines, len(images), class_names))
    else:
        classes = _by_name(path, lines, class_names)
    _check_classes(path, classes.values(), class_names)
    return [classes.get(_stem(image.name)) for image in images]


def _read(path: pathlib.Path) -> list[str]:
    try:
        text = path.read_text(encoding='utf-8-sig')
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UsageError(f'{_key(path)} cannot be read: {reason}') from error
    if not (lines := [line.strip() for line in text.splitlines() if line.strip()]):
        raise UsageError(f'{_key(path)} is empty')
    return lines


def _kaggle_row(path: pathlib.Path, line: str) -> tuple[str, str]:
    """Returns image and class of a row like 'ILSVRC2012_val_00048981,n03995372 85 1 499 272 '."""
    image, _, boxes = line.partition(',')
    found = set(boxes.split()[::5])  # each class is followed by the corners of its box
    if len(found) != 1:
        raise UsageError(f'{_key(path)} must name one class for an image, not {line[:60]!r}')
    return _stem(image), found.pop()


def _by_name(
    path: pathlib.Path, lines: Sequence[str], class_names: Sequence[str]
) -> dict[str, str]:
    classes: dict[str, str] = {}
    for line in lines:
        image, name = (*re.split(r'[,\t ]\s*', line, maxsplit=1), '')[:2]
        if classes.setdefault(_stem(image), name) != name:
            raise UsageError(f'{_key(path)} gives two classes to {image}')
    if set(classes.values()) <= set(class_names) or not all(map(str.isdecimal, classes.values())):
        return classes
    numbers = {image: int(name) for image, name in classes.items()}
    first, last = min(numbers.values()), max(numbers.values())
    if first != 0 or last >= len(class_names):
        raise UsageError(
            f'{_key(path)} has numbers from {first} to {last}; must be names of classes, or their '
            f'numbers from 0 to {len(class_names) - 1} in the order of the names'
        )
    return {image: class_names[number] for image, number in numbers.items()}


def _in_order(
    path: pathlib.Path, lines: Sequence[str], count: int, class_names: Sequence[str]
) -> Sequence[str]:
    if len(lines) != count:
        raise UsageError(f'{_key(path)} has {len(lines):,} lines for {count:,} images')
    if not set(lines) <= set(class_names) and all(map(str.isdecimal, lines)):
        by_number = _read_meta(path)
        lines = [by_number.get(int(line), line) for line in lines]
    _check_classes(path, lines, class_names)
    return lines


def _read_meta(path: pathlib.Path) -> Mapping[int, str]:
    """Returns number -> WordNet ID, by meta.mat of ImageNet's development kit."""
    import scipy.io  # here: a slow import

    meta = path.with_name('meta.mat')
    if not meta.exists():
        raise UsageError(
            f'{_key(path)} has numbers of ILSVRC2012, which are not in the order of the WordNet '
            f'IDs: put meta.mat of the same development kit beside it, or give LOC_val_solution.csv'
        )
    try:
        synsets = scipy.io.loadmat(meta, squeeze_me=True)['synsets']
        numbers, names = synsets['ILSVRC2012_ID'], synsets['WNID']
        return {int(x): str(name) for x, name in zip(numbers, names, strict=True)}
    except Exception as error:  # SciPy raises many kinds for a damaged file
        raise UsageError(f'{meta}: is not meta.mat of the development kit: {error}') from error


def _check_classes(path: pathlib.Path, names: Iterable[str], class_names: Sequence[str]) -> None:
    known = frozenset(class_names)
    if name := next((name for name in names if name not in known), ''):
        hint = nearest(name, class_names)
        raise UsageError(
            f'{_key(path)} names {name!r}, which is no class to train on'
            f'{hint if len(hint) < 200 else ""}'  # which may be a list of thousands
        )


def _stem(name: str) -> str:
    """Returns the name of an image without directory and suffix."""
    stem, suffix = os.path.splitext(pathlib.PurePosixPath(name.strip()).name)
    return stem if suffix.lower() in SUFFIXES else stem + suffix


def _key(path: pathlib.Path) -> str:
    return f'data.val_labels={str(path)!r}:'
