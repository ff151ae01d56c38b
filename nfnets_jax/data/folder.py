"""A directory of image files, one subdirectory for each class."""

import collections
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Annotated, TypeVar

import numpy as np

from nfnets_jax import fields
from nfnets_jax.data.label_files import read_classes
from nfnets_jax.data.preprocessing import SUFFIXES, ImageError, is_image
from nfnets_jax.data.splits import ALL, SPLIT_NAMES, SPLITS, MissingData, MissingSplit, check_split
from nfnets_jax.errors import UsageError, nearest
from nfnets_jax.fields import Field
from nfnets_jax.files import expand

T = TypeVar('T')

# Options of sources that hold out a share of every class, see `hold_out`.
TestFraction = Annotated[
    float | None,
    Field(
        'Share of each class to test on, where there are no splits; None: 0.2.', above=0, below=1
    ),
]
SplitSeed = Annotated[int | None, Field('Seed that draws them; None: 0.', low=0)]

# Files that file managers create, besides names that begin with a dot.
_HIDDEN = frozenset(('Thumbs.db', 'desktop.ini', '__MACOSX', '@eaDir'))
_ARRAY = '.npy'


class ImageFolder:
    """A directory with one subdirectory of images for each class.

    Labels number the class directories in the order of their names. The layout is one of

        path/train/CLASS/IMAGE, path/test/CLASS/IMAGE, and optionally path/val/CLASS/IMAGE;
            `SPLIT_NAMES` lists other names of the splits. If there is val but no test, 'test' is
            val, and there is no 'validation'.
        path/CLASS/IMAGE. A fixed share of every class, drawn by `split_seed`, is held out as
            'test'.

    A class directory holds its images at any depth: files with a suffix of `SUFFIXES`, in upper or
    lower case, and files without a suffix that begin like an image; if it has none of these, .npy
    files of arrays. `left_out` counts other files that are not hidden. Links are followed, except
    to a directory that contains them; a file that is reached twice in a class counts once.

    With `val_labels` the images of one split lie directly in its directory, as ImageNet's in val;
    the file, relative to `path`, gives their classes, see `label_files`.

    The directories of the splits are relative to `path`, by default those with a name of
    `SPLIT_NAMES`. `split` is 'train', 'validation' or 'test', or 'all' where there are no splits.

    Raises:
        MissingSplit: 'validation' if there is none, 'all' if there are splits.
        UsageError: another layout, a single class, a class without images, one file in two classes,
            or a directory that cannot be read.
    """

    @fields.checked('data')
    def __init__(
        self,
        split: str,
        path: Annotated[str | os.PathLike, Field('The directory.')],
        train_split: Annotated[
            str,
            Field(
                "Its directory to train on; '.': `path` holds the classes, whatever their names."
            ),
        ] = '',
        validation_split: Annotated[str, Field('Its directory to validate on.')] = '',
        test_split: Annotated[str, Field('Its directory to test on.')] = '',
        val_labels: Annotated[
            str,
            Field(
                "File with the labels of the images that lie directly in val, such as ImageNet's; "
                "'': each class has a directory."
            ),
        ] = '',
        test_fraction: TestFraction = None,
        split_seed: SplitSeed = None,
    ):
        check_split('folder', split, (*SPLITS, ALL))
        root = pathlib.Path(expand(path))
        if not path or not root.is_dir():
            raise MissingData(
                f'data.path={str(path)!r}: not a directory; give one with the classes'
            )
        given_hold_out = {'test_fraction': test_fraction, 'split_seed': split_seed}
        layout = _find_splits(
            root, dict(zip(SPLITS, (train_split, validation_split, test_split), strict=True))
        )
        if layout:
            for option, value in given_hold_out.items():
                if value is not None:
                    raise UsageError(
                        f'data.{option}={value}: nothing is held out of {layout["train"]}, because '
                        f'{root} holds splits; leave it out'
                    )
        if split == 'validation' and split not in (layout or ()):
            raise MissingSplit(f'{root}: no split besides those to train and test on')
        if layout and split == ALL:
            raise MissingSplit(f'{root}: holds splits')
        if layout and split not in layout:
            others = SPLIT_NAMES['test'] + SPLIT_NAMES['validation']
            raise MissingSplit(
                f'{root}: holds {layout["train"].name}/ but none of {", ".join(others)}; '
                'name what to test on by data.test_split'
            )
        train, directory = (layout[s] if layout else root for s in ('train', split))
        self.name, self.origin, self._directory = f'{root} ({split})', str(directory), directory
        self.left_out: collections.Counter[str] = collections.Counter()
        self.class_names = tuple(path.name for path in _class_directories(train))
        if len(self.class_names) < 2 and split != ALL:
            raise UsageError(_one_class(root, train))
        labels: list[int] = []
        self._paths = []
        if val_labels:
            without_classes = _split_without_classes(root, layout or {})
            if split == without_classes:
                self._read_flat(root / expand(val_labels))
                return
        owners: dict[str, pathlib.Path] = {}
        for class_directory in _class_directories(directory, self.left_out):
            if class_directory.name not in self.class_names:
                raise UsageError(
                    f'{class_directory}: {train} has no class of that name'
                    f'{nearest(class_directory.name, self.class_names)}'
                )
            label = self.class_names.index(class_directory.name)
            files = _images(class_directory, self.left_out)
            if shared := files.keys() & owners.keys():
                file = min(shared, key=lambda real: files[real])
                raise UsageError(
                    f'{files[file]} and {owners[file]} are one file in two classes; remove the link'
                )
            owners |= files
            paths = sorted(files.values())
            if not layout and split != ALL:
                paths = hold_out(
                    paths,
                    split,
                    test_fraction,
                    seed=(split_seed or 0, label),
                    name=str(paths[0].parent),
                )
            self._paths += paths
            labels += [label] * len(paths)
        self.labels = np.array(labels, np.int32)

    def _read_flat(self, file: pathlib.Path) -> None:
        """Sets paths and labels to those of the images in the directory, by a file of labels."""
        images = sorted(_images(self._directory, self.left_out).values())
        classes = read_classes(file, images, self.class_names)
        numbers = {name: number for number, name in enumerate(self.class_names)}
        for image, name in zip(images, classes, strict=True):
            if name is None:
                raise UsageError(f'data.val_labels={str(file)!r}: does not name {image}')
        self._paths = images
        self.labels = np.array([numbers[name] for name in classes if name is not None], np.int32)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict:
        try:
            encoded = self._paths[index].read_bytes()
        except OSError as error:
            raise ImageError(f'cannot be read: {error.strerror}') from error
        return {'image': encoded, 'label': int(self.labels[index])}

    def where(self, index: int) -> str:
        return str(self._paths[index])

    def checksum(self) -> str:
        files = [
            (path.relative_to(self._directory).as_posix(), self.class_names[label])
            for path, label in zip(self._paths, self.labels, strict=True)
        ]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()  # ASCII JSON: takes any name


class FlatImageFolder(ImageFolder):
    """Images that lie directly in a directory, with a file of labels, as ImageNet's in val.

    Args:
        path: the directory.
        val_labels: the file, see `label_files`.
        class_names: the classes, in the order of the labels.

    Raises:
        UsageError: there are no images, or the file does not fit them.
    """

    def __init__(self, path: str | os.PathLike, val_labels: str, class_names: Sequence[str]):
        self._directory = pathlib.Path(expand(path))
        self.name = self.origin = str(self._directory)
        self.left_out = collections.Counter()
        self.class_names = tuple(class_names)
        self._read_flat(pathlib.Path(expand(val_labels)))


def holds_directories(path: str | os.PathLike) -> bool:
    """Returns whether a directory holds others, such as those of classes or splits."""
    return any(True for _ in _directories(pathlib.Path(expand(path))))


def _find_splits(root: pathlib.Path, given: dict[str, str]) -> dict[str, pathlib.Path] | None:
    """Returns the directory of every split, at least 'train'; None if there are no splits.

    Args:
        given: the directory that the user named for each split, or ''.

    Raises:
        UsageError: a named split does not exist, or the splits found are incomplete.
    """
    if given['train'] == '.':
        for split in ('validation', 'test'):
            if given[split]:
                raise UsageError(
                    f'data.{split}_split={given[split]!r}: {root} holds classes, says '
                    "data.train_split='.', and no splits"
                )
        return None
    directories = list(_directories(root))
    found = {}
    for split, name in given.items():
        if name:
            found[split] = root / name
            if not found[split].is_dir():
                known = [d.name for d in directories]
                hint = nearest(name, known) if known else ''
                raise UsageError(f'data.{split}_split={name!r}: no such directory in {root}{hint}')
            continue
        # Whatever is named for another split; but train, or the error would be that it is missing.
        named = [root / name for name in given.values() if name] if split != 'train' else []
        like = [d for d in directories if d.name.lower() in SPLIT_NAMES[split] and d not in named]
        if len(like) > 1:
            raise UsageError(
                f'{root}: holds {_listed(like)}; say which it is by data.{split}_split='
                f'{like[0].name}'
            )
        if like:
            found[split] = like[0]
    if 'train' not in found:
        _check_classes(root, directories, found, given)
        return None
    if 'validation' not in found and 'test' not in found:
        alone = not any(given.values()) and len(directories) > 1
        if alone and not _holds_only_directories(found['train']):
            return None  # a class of that name among others, such as of vehicles
    elif 'test' not in found:
        found['test'] = found.pop('validation')
    elif found.get('validation') == found['test']:
        del found['validation']
    real = {split: directory.resolve() for split, directory in found.items()}
    for split in found:
        for other in found:
            if split != other and real[split].is_relative_to(real[other]):
                raise UsageError(
                    f'{found[split]} is or lies in {found[other]}: {other} and {split} would share '
                    f'images; name another directory by data.{split}_split'
                )
    return found


def _split_without_classes(root: pathlib.Path, layout: dict[str, pathlib.Path]) -> str:
    """Returns the split whose directory has no directories of classes.

    Raises:
        UsageError: there is no such split to validate or test on, or there are two.
    """
    found = [s for s in ('validation', 'test') if s in layout and not [*_directories(layout[s])]]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f'{root}: neither {layout["validation"].name}/ nor {layout["test"].name}/ holds '
            'directories of classes, but data.val_labels is for one of them; leave the other out '
            f"by data.test_split='{layout['validation'].name}'"
        )
    raise UsageError(
        f'data.val_labels: {root} holds no split whose images have no directories of classes; '
        'leave it out'
    )


def _check_classes(
    root: pathlib.Path,
    directories: Sequence[pathlib.Path],
    found: dict[str, pathlib.Path],
    given: dict[str, str],
) -> None:
    """Raises a UsageError unless `directories`, none of them called train, can be the classes."""
    splits = [found[split] for split in found]
    name_it = "name what to train on by data.train_split (data.train_split='.': these are classes)"
    if any(given.values()) or (splits and len(splits) == len(directories)):
        raise UsageError(
            f'{root}: holds {_listed(splits)} but none of {", ".join(SPLIT_NAMES["train"])}; '
            f'{name_it}'
        )
    if nested := [d for d in splits if _holds_only_directories(d)]:
        raise UsageError(
            f'{root}: {_listed(nested)} looks like a split beside {len(directories) - 1} classes; '
            f'{name_it}'
        )
    if len(directories) > 1 and all(map(_holds_only_directories, directories)):
        inner = [[d.name for d in _directories(directory)] for directory in directories]
        if len(inner[0]) == 1 and all(names == inner[0] for names in inner):
            return  # as in Tiny ImageNet: CLASS/images/IMAGE
        raise UsageError(
            f'{root}: {_listed(directories)} hold no images but directories, '
            f'{", ".join(sorted({name for names in inner for name in names})[:4])}; data.path must '
            f'be the directory whose subdirectories are the classes; if these are splits, {name_it}'
        )


def _one_class(root: pathlib.Path, train: pathlib.Path) -> str:
    """Returns the error for a single class, with the level where the path should be."""
    (only,) = _class_directories(train)
    found = f'{train}: one class only, {only.name!r}'
    if len(inner := list(_directories(only))) > 1:
        found += f', which holds {_listed(inner)}'
        if train == root:
            return f'{found}: data.path is one level too high; give {only}'
        return f'{found}: the split is one level too high; give {only.relative_to(root)}'
    if train == root:
        return f'{found}: there is nothing to tell apart; data.path may be one level too deep, ' + (
            f'{root.absolute().parent} above it'
        )
    return f'{found}: there is nothing to tell apart; give a directory with two classes or more'


def _listed(directories: Sequence[pathlib.Path]) -> str:
    """Returns the names of the first directories, for an error."""
    names = [f'{directory.name}/' for directory in directories]
    return ', '.join(names[:4]) + (f', ... ({len(names)} in all)' if len(names) > 4 else '')


def _class_directories(
    root: pathlib.Path, left_out: collections.Counter | None = None
) -> list[pathlib.Path]:
    """Returns the subdirectories of `root` by name; counts the images that lie beside them."""
    found = list(_directories(root))
    loose = [entry for entry in _entries(root) if _suffix(entry) in SUFFIXES and not _is_dir(entry)]
    if not found and loose:
        raise UsageError(
            f'{root}: images lie directly in it, but each class needs a directory of its own; '
            'is the path one level too deep? (data.val_labels is for a val without them)'
        )
    if not found:
        raise UsageError(f'{root}: no class directories in it; give one directory per class')
    if left_out is not None and loose:
        left_out['beside the classes'] += len(loose)
    return found


def _directories(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the subdirectories of `root` by name, without hidden ones and links to its parents."""
    real = root.resolve()
    for entry in _entries(root):
        path = pathlib.Path(entry.path)
        if _is_dir(entry):
            if not (entry.is_symlink() and real.is_relative_to(path.resolve())):
                yield path
        elif entry.is_symlink() and not path.suffix and not path.exists():
            raise UsageError(f'{path}: a link to {os.readlink(path)}, which is not there')


def _images(directory: pathlib.Path, left_out: collections.Counter) -> dict[str, pathlib.Path]:
    """Returns the images of one class at any depth, keyed by real path: each file once.

    A file that is in the class and also linked there keeps its own name.

    Args:
        left_out: counts the ignored files by their suffix.
    """
    found: dict[str, pathlib.Path] = {}
    arrays: dict[str, pathlib.Path] = {}
    ignored: collections.Counter[str] = collections.Counter()
    links: list[os.DirEntry] = []
    # (directory, its real path, the real paths of the directories above it)
    queue: collections.deque[tuple[str, str, tuple[str, ...]]] = collections.deque()
    queue.append((str(directory), os.path.realpath(directory), ()))
    visited = set()
    while queue:
        path, real, above = queue.popleft()
        if real in visited:
            continue
        visited.add(real)
        inner = []
        for entry in _entries(path):
            if _is_dir(entry):
                if not entry.is_symlink():
                    inner.append((entry.path, os.path.join(real, entry.name), (*above, real)))
                    continue
                target = os.path.realpath(entry.path)
                if any(_is_within(each, target) for each in (*above, real)):
                    ignored['link to a parent directory'] += 1
                else:
                    queue.append((entry.path, target, (*above, real)))  # when all else is done
            elif kind := _kind_left_out(entry):
                ignored[kind] += 1
                if kind == _ARRAY:
                    arrays.setdefault(os.path.realpath(entry.path), pathlib.Path(entry.path))
            elif entry.is_symlink():
                links.append(entry)
            else:
                found[os.path.join(real, entry.name)] = pathlib.Path(entry.path)
        queue.extendleft(reversed(inner))
    for entry in links:
        found.setdefault(os.path.realpath(entry.path), pathlib.Path(entry.path))
    if not found and arrays:  # Beside images they may be anything, such as their features.
        found = arrays
        del ignored[_ARRAY]
    left_out.update(ignored)
    if not found:
        raise UsageError(f'{directory}: no images in this class directory; fill it or remove it')
    return found


def _kind_left_out(entry: os.DirEntry) -> str:
    """Returns '' for an image file, else the kind to count it as."""
    is_file = os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()
    suffix = _suffix(entry)
    if not is_file and os.path.exists(entry.path):
        return 'not a file'
    if not is_file and suffix not in SUFFIXES:
        return 'link to nowhere'
    if not suffix:
        return '' if is_image(entry.path) else 'no suffix'
    return '' if suffix in SUFFIXES else suffix  # also a link to nowhere: reading it names it


def find_images(directory: str | os.PathLike) -> list[pathlib.Path]:
    """Returns the images in a directory at any depth, as in a class of `ImageFolder`, sorted."""
    try:
        return sorted(_images(pathlib.Path(directory), collections.Counter()).values())
    except UsageError:
        return []


def _holds_only_directories(directory: pathlib.Path) -> bool:
    entries = _entries(directory)
    return any(map(_is_dir, entries)) and all(_is_dir(e) or _kind_left_out(e) for e in entries)


def _entries(directory: str | pathlib.Path) -> list[os.DirEntry]:
    """Returns the entries of a directory by name, without hidden ones."""
    try:
        with os.scandir(directory) as entries:
            seen = [e for e in entries if not e.name.startswith('.') and e.name not in _HIDDEN]
    except OSError as error:
        raise UsageError(f'{directory}: cannot be read: {error.strerror}') from error
    return sorted(seen, key=lambda entry: entry.name)


def _is_dir(entry: os.DirEntry) -> bool:
    # os.path.isdir, unlike DirEntry.is_dir, does not raise for a circular link.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_within(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip(os.sep) + os.sep)


def _suffix(entry: os.DirEntry) -> str:
    return os.path.splitext(entry.name)[1].lower()


def hold_out(
    examples: Sequence[T],
    split: str,
    test_fraction: float | None,
    *,
    seed: tuple[int, int],
    name: str,
) -> list[T]:
    """Returns the train or test part of one class's examples, in order; neither part is empty.

    Args:
        examples: the examples of the class.
        split: 'train' or 'test'.
        test_fraction: share to hold out; None: 0.2.
        seed: draws them.
        name: name of the class in the error about a single example.
    """
    if len(examples) < 2:
        raise UsageError(f'{name}: one image cannot be split in train and test')
    fraction = 0.2 if test_fraction is None else test_fraction
    held_out = min(max(1, round(fraction * len(examples))), len(examples) - 1)
    drawn = np.argsort(np.random.Philox(key=list(seed)).random_raw(len(examples)))
    chosen = drawn[:held_out] if split == 'test' else drawn[held_out:]
    return [examples[i] for i in sorted(chosen)]
