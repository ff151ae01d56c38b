"""Sources of images: random access to examples behind one small interface.

A source is any object with

* `len(source)`: the number of examples;
* `source[i]`: {'image': array or bytes, 'label': int}, for 0 <= i < len(source); where images may
  have several labels, uint8 [K], 1 for each that it has; the image is an array [H, W] or [H, W, C]
  of numbers, uint8 unless their range is given, or the bytes of an encoded image (JPEG, PNG, ...),
  which a transform of `nfnets_jax.data.preprocessing` decodes;
* `source.where(i)`: the file or index of example i, for errors;
* `source.class_names`: tuple of str, label -> name;
* `source.labels`: int32 [N] or uint8 [N, K], the labels of every example; None if they are known
  only by reading all examples, as `read_labels` does;
* `source.name`: str;
* `source.origin`: str, the directory, file or package that the examples come from;
* `source.left_out`: dict, kind of file -> how many were ignored beside the examples;
* `source.checksum()`: str, see `identify`.

Reading is thread-safe and has no order: shuffling, sharding and batching belong to the pipeline.
"""

import functools
import hashlib
import importlib.util
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np

from nfnets_jax import fields, files
from nfnets_jax.data.folder import ImageFolder, hold_out
from nfnets_jax.data.preprocessing import ImageError, resize, to_pixels
from nfnets_jax.data.splits import ALL, SPLIT_NAMES, SPLITS, MissingSplit, check_split
from nfnets_jax.data.table import ImageTable
from nfnets_jax.data.tfds import TfdsSource
from nfnets_jax.errors import UsageError, nearest
from nfnets_jax.fields import Field
from nfnets_jax.pixel_format import PixelFormat


class Source(Protocol):
    """The interface of a source; its members are described at the top of this module."""

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def labels(self) -> np.ndarray | None: ...

    @property
    def name(self) -> str: ...

    @property
    def origin(self) -> str: ...

    @property
    def left_out(self) -> Mapping[str, int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...

    def where(self, index: int, /) -> str: ...

    def checksum(self) -> str: ...


def read_labels(source: Source) -> np.ndarray:
    """Returns `source.labels`; reads every example of a source that does not hold them."""
    if source.labels is not None:
        return source.labels
    labels = np.zeros(len(source), np.int32)
    for index in range(len(source)):
        try:
            labels[index] = source[index]['label']
        except ImageError as error:
            raise ImageError(f'{source.where(index)}: {error}') from error
    return labels


class Identity(NamedTuple):
    """Tells one set of examples from another, cheaply.

    Attributes:
        class_names: label -> name.
        num_examples: number of examples.
        checksum: 64 hexadecimal digits.
    """

    class_names: tuple[str, ...]
    num_examples: int
    checksum: str


def identify(source: Source) -> Identity:
    """Returns the identity of a source, to be compared with that of another day.

    The checksum is SHA-256 over

    * folder: the name of every file relative to the directory of its split, with its class, in the
      order of the examples;
    * table: the same, with the paths as the table has them;
    * arrays, digits, synthetic images: dtype, shape and bytes of the images, and the labels;
    * tfds: the data set with its version, and the chosen examples of each record file.

    It changes if an example or class is added, removed, renamed or moved to another split, or if
    the order changes. It does not change if the directory is moved as a whole, nor if a file's
    content changes under the same name: files are not read.
    """
    return Identity(source.class_names, len(source), source.checksum())


class ArraySource:
    """Images and labels in memory.

    Args:
        images: [N, H, W, C] or [N, H, W]; uint8, or other numbers whose range is given later.
        labels: integers [N], each in [0, len(class_names)), or [N, 1]. Where images may have
            several labels, or none: [N, K] of 0 and 1, a column for each class.
        class_names: names of the classes; by default '0', '1', ... up to the largest label.
        name: the source's name in messages.
        origin: the file or package that they come from.
    """

    left_out: Mapping[str, int] = MappingProxyType({})

    def __init__(
        self, images, labels, class_names=None, name: str = 'arrays', origin: str = 'memory'
    ):
        images, labels = np.asarray(images), _squeeze(np.asarray(labels))
        if images.dtype.kind not in 'uif' or images.ndim not in (3, 4):
            raise UsageError(
                f'{name}: images must be numbers [N, H, W, C] or [N, H, W], '
                f'not {images.dtype} {list(images.shape)}'
            )
        several = labels.ndim == 2 and labels.dtype.kind in 'biuf'
        if labels.shape[:1] != images.shape[:1] or not (several or _is_integer_each(labels)):
            raise UsageError(
                f'{name}: labels must be {len(images)} integers, one for each image, or '
                f'[{len(images)}, classes] of 0 and 1, not {labels.dtype} {list(labels.shape)}'
            )
        if several and (wrong := labels[(labels != 0) & (labels != 1)]).size:
            raise UsageError(f'{name}: labels [N, classes] must be 0 or 1, not {wrong[0]}')
        if class_names is None:
            class_names = map(str, range(_num_classes(labels)))
        self.images, self.labels = images, labels.astype(np.uint8 if several else np.int32)
        self.name, self.origin = name, origin
        self.class_names = tuple(class_names)
        if several and labels.shape[1] != len(self.class_names):
            raise UsageError(
                f'{name}: labels have {labels.shape[1]} columns, but there are '
                f'{len(self.class_names)} classes'
            )
        if (
            not several
            and labels.size
            and not 0 <= labels.min() <= labels.max() < len(self.class_names)
        ):
            raise UsageError(
                f'{name}: labels run from {labels.min()} to {labels.max()}, '
                f'but there are {len(self.class_names)} classes'
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        label = self.labels[index]
        return {'image': self.images[index], 'label': label if label.ndim else int(label)}

    def where(self, index: int) -> str:
        return f'{self.name}[{index}]'

    def checksum(self) -> str:
        digest = hashlib.sha256(f'{self.images.dtype.str} {self.images.shape}'.encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(self.labels.astype('<i4').tobytes())
        return digest.hexdigest()


class PixelSource:
    """A source of arrays whose images have the pixels that a network takes, see `to_pixels`."""

    def __init__(self, source: Source, pixels: PixelFormat):
        self._source, self._pixels = source, pixels
        self.class_names, self.labels = source.class_names, source.labels
        self.name, self.origin, self.left_out = source.name, source.origin, source.left_out
        self.where, self.checksum = source.where, source.checksum

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._source[index]
        return example | {'image': to_pixels(example['image'], self._pixels)}


class Subset:
    """Some examples of a source, as a source.

    Args:
        source: the source that holds them.
        indices: int [N], their indices there, in order.
        name: the subset's name in messages.
    """

    def __init__(self, source: Source, indices: np.ndarray, name: str):
        self._source, self._indices = source, indices
        self.class_names, self.left_out = source.class_names, source.left_out
        self.name, self.origin = name, source.origin
        self.labels = None if source.labels is None else source.labels[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict:
        return self._source[int(self._indices[index])]

    def where(self, index: int) -> str:
        return self._source.where(int(self._indices[index]))

    def checksum(self) -> str:
        digest = hashlib.sha256(self._source.checksum().encode())
        digest.update(self._indices.astype('<i8').tobytes())
        return digest.hexdigest()


def hold_out_validation(source: Source, fraction: float) -> tuple[Subset, Subset]:
    """Returns the examples of a training source to train and to validate on.

    Of each class the same share is drawn, the same in every run; where images may have several
    labels, of all examples.

    Args:
        source: the training source.
        fraction: share to validate on, between 0 and 1.

    Raises:
        UsageError: a class has one example only.
    """
    labels = read_labels(source)
    classes = np.zeros(len(labels), int) if labels.ndim == 2 else labels
    parts: dict[str, list[int]] = {'train': [], 'test': []}
    for label in np.unique(classes):
        examples = np.flatnonzero(classes == label).tolist()
        for split, part in parts.items():
            part += hold_out(
                examples,
                split,
                fraction,
                seed=(int(label), 1),
                name=f'data.validation_fraction={fraction}: {source.class_names[label]}',
            )
    names = {'train': source.name, 'test': f'{source.name} (validation)'}
    train, validation = (Subset(source, np.sort(parts[s]), names[s]) for s in parts)
    return train, validation


def _squeeze(labels: np.ndarray) -> np.ndarray:
    """Returns labels [N, 1], as MedMNIST stores them, as [N]; others unchanged."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _is_integer_each(labels: np.ndarray) -> bool:
    return labels.ndim == 1 and labels.dtype.kind in 'iu'


def _num_classes(labels: np.ndarray) -> int:
    """Returns the number of classes that labels [N] or [N, K] speak of."""
    if labels.ndim == 2:
        return labels.shape[1]
    return int(labels.max()) + 1 if labels.size else 0  # as a Python int, which cannot overflow


@functools.cache
def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns scikit-learn's digits: images, float64 [1797, 8, 8] in 0..16, and labels.

    The file is read directly, because importing scikit-learn takes a second.
    """
    package = importlib.util.find_spec('sklearn')
    path = os.path.join(os.path.dirname(package.origin or '') if package else '', _DIGITS_FILE)
    if not os.path.exists(path):
        from sklearn import datasets  # Raises the usual error where it is not installed.

        digits = datasets.load_digits()
        return digits.images, digits.target
    table = np.loadtxt(path, delimiter=',')
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(int)


_DIGITS_FILE = os.path.join('datasets', 'data', 'digits.csv.gz')  # in scikit-learn


class Digits(ArraySource):
    """The 1797 handwritten digits that scikit-learn carries (UCI, 8x8 pixels, values 0..16).

    Scaled to 0..255, enlarged to `image_size` (bicubic) and repeated to three channels. The split,
    'train' or 'test', is fixed: of every class, in the order of the file, each fifth image is a
    test image, which makes 1442 for training and 355 for testing.
    """

    @fields.checked('data')
    def __init__(
        self,
        split: str,
        image_size: Annotated[int, Field('Side in pixels; the digits are 8x8.', low=8)] = 16,
        classes: Annotated[
            Sequence[int],
            Field(
                'Digits to take; labels number them in this order.',
                low=0,
                high=9,
                rule=lambda digits: len(digits) == len(set(digits)) >= 2,
                wants='two or more digits from 0 to 9, without repeats',
            ),
        ] = tuple(range(10)),
        per_class: Annotated[
            int | None, Field('Training images of a digit; None: all.', low=1)
        ] = None,
    ):
        classes = list(classes)
        digits, labels = load_digits()
        is_test = np.zeros(len(labels), bool)
        for label in range(10):
            is_test[np.flatnonzero(labels == label)[4::5]] = True
        chosen = {'train': ~is_test, 'test': is_test}
        check_split('digits', split)
        fewest = min(np.sum(chosen['train'] & (labels == digit)) for digit in classes)
        if per_class is not None and per_class > fewest:
            raise UsageError(
                f'data.per_class={per_class}: one of these digits has {fewest} training images; '
                'give no more, or None for all'
            )
        first = per_class if split == 'train' else None
        index = np.sort(
            np.concatenate([np.flatnonzero(chosen[split] & (labels == d))[:first] for d in classes])
        )
        grey = digits[index].astype(np.float32) * (255 / 16)
        large = np.stack([resize(image[..., None], (image_size, image_size)) for image in grey])
        super().__init__(
            np.repeat(np.rint(large).clip(0, 255).astype(np.uint8), 3, axis=-1),
            [classes.index(label) for label in labels[index]],
            class_names=map(str, classes),
            name=f'digits/{split}',
            origin='scikit-learn',
        )


class ArrayFile(ArraySource):
    """The arrays of an .npz file: train_images, train_labels, test_images and test_labels.

    The file may also hold validation_images, validation_labels and class_names. `SPLIT_NAMES`
    lists other names of the splits. If there is val but no test, 'test' is val, and there is no
    'validation'.

    Images and labels are as in `ArraySource`. `left_out` names the other arrays.

    Raises:
        MissingSplit: 'validation' if there is none.
        UsageError: not such a file.
    """

    @fields.checked('data')
    def __init__(
        self, split: str, path: Annotated[str | os.PathLike, Field('The .npz file with the data.')]
    ):
        check_split('arrays', split, SPLITS)
        try:
            with np.load(files.expand(path), allow_pickle=False) as file:
                found = _find_arrays(file.files)
                if split == 'validation' and split not in found:
                    raise MissingSplit(f'{path}: no split besides those to train and test on')
                images, labels = (file[name] for name in found[split])
                every = {s: _squeeze(file[pair[1]]) for s, pair in found.items()}
                if len({each.ndim for each in every.values()}) > 1:
                    raise ValueError('one split has several labels for an image, another has one')
                names = file.get('class_names')
                if names is None:
                    names = range(max(_num_classes(every[s]) for s in ('train', 'test')))
                known = {'class_names', *(name for pair in found.values() for name in pair)}
                others = {name: 1 for name in file.files if name not in known}
        except MissingSplit:
            raise
        except (*files.DAMAGED_ARCHIVE, OSError, ValueError, KeyError, TypeError) as error:
            reason = ' '.join(str(error.args[-1] if error.args else error).split())
            raise UsageError(
                f'data.path={str(path)!r}: not an .npz file with train_images, train_labels, '
                f'test_images and test_labels: {reason}'
            ) from error
        super().__init__(
            images, labels, map(str, names), name=f'{path} ({split})', origin=str(path)
        )
        self.left_out = others


def _find_arrays(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Returns the names of the image and label arrays of every split, at least 'train' and 'test'.

    Raises:
        KeyError: arrays are missing, or one split has two names.
    """
    held = f'it holds {", ".join(names) or "nothing"}'
    found = {}
    for split, like in SPLIT_NAMES.items():
        pair = [
            [name for name in names if name.lower() in {f'{each}_{kind}' for each in like}]
            for kind in ('images', 'labels')
        ]
        if max(map(len, pair)) > 1:
            raise KeyError(f'more than one split is called like {split}: {held}')
        if any(pair):
            if not all(pair):
                raise KeyError(f'{like[0]}_{"labels" if pair[0] else "images"} are missing: {held}')
            found[split] = (pair[0][0], pair[1][0])
    if 'test' not in found and 'validation' in found:
        found['test'] = found.pop('validation')
    for split in ('train', 'test'):
        if split not in found:
            raise KeyError(f'{split}_images and {split}_labels are missing: {held}')
    return found


class Synthetic(ArraySource):
    """Synthetic images: each class has one coarse pattern of colors, each image its own noise.

    Easy to learn, the same on every machine, and without files: for trying a recipe out. The two
    splits, 'train' and 'test', differ in the noise.
    """

    @fields.checked('data')
    def __init__(
        self,
        split: str,
        image_size: Annotated[int, Field('Side in pixels.', low=1)] = 32,
        classes: Annotated[int, Field('Classes, which examples have in turn.', low=2)] = 10,
        examples: Annotated[int, Field('Images in each split.', low=1)] = 1024,
        channels: Annotated[int, Field('Channels.', low=1)] = 3,
    ):
        check_split('noise', split)
        if examples < classes:
            raise UsageError(f'data.examples={examples}: fewer than the {classes} classes')
        patterns = np.random.default_rng(0).uniform(64, 192, (classes, 4, 4, channels))
        cells = np.arange(image_size) * 4 // image_size
        labels = np.arange(examples) % classes
        noise = np.random.default_rng({'train': 1, 'test': 2}[split]).normal(
            0, 32, (examples, image_size, image_size, channels)
        )
        images = patterns[:, cells][:, :, cells][labels] + noise
        super().__init__(
            images.clip(0, 255).astype(np.uint8),
            labels,
            class_names=map(str, range(classes)),
            name=f'noise/{split}',
            origin='made here',
        )


SOURCES: dict[str, Callable[..., Source]] = {
    'digits': Digits,
    'noise': Synthetic,
    'arrays': ArrayFile,
    'folder': ImageFolder,
    'table': ImageTable,
    'tfds': TfdsSource,
}


def source_options(name: str) -> dict[str, fields.Option]:
    """Returns the options of a source, by name.

    Raises:
        UsageError: unknown source.
    """
    return fields.options(_source_class(name))


def source_of(path: str | os.PathLike) -> str:
    """Returns the name of the source that reads a directory or a file, by its suffix."""
    by_suffix = dict.fromkeys(('.csv', '.tsv', '.parquet'), 'table') | {'.npz': 'arrays'}
    return by_suffix.get(pathlib.PurePath(path).suffix.lower(), 'folder')


def open_source(name: str, split: str, **options: Any) -> Source:
    """Opens a source by name.

    Args:
        name: a key of `SOURCES`.
        split: 'train', 'validation' or 'test'.
        **options: arguments of that source, e.g. image_size for digits, path for a folder,
            dataset for tfds.

    Raises:
        MissingSplit: the source does not have this split; all have 'train' and 'test'.
        UsageError: unknown name or option, a value of the wrong type, missing data, or examples of
            a single class.
    """
    source = _source_class(name)(split, **options)
    used = source.class_names
    if source.labels is not None and source.labels.ndim == 2:
        if not np.ptp(source.labels, axis=0).any():
            raise UsageError(
                f'{source.name}: of no class are there images that have it and images that do not'
            )
    elif split == 'train' and isinstance(source, ArraySource):
        used = tuple(source.class_names[label] for label in np.unique(source.labels))
    if len(used) < 2 and split != ALL:
        raise UsageError(
            f'{source.name}: one class only, {", ".join(map(repr, used))}: there is nothing to '
            'tell apart'
        )
    return source


class RenumberedSource:
    """The examples of a source, with the labels that the classes of other data have.

    Classes are matched by their names. Where none has the name of one of `class_names`, and all
    names are numbers from 0 to less than the number of these, as the directories of ImageNetV2,
    they are the labels (`are_numbers`).

    Args:
        source: its labels are those of its own classes, `own_class_names`.
        class_names: the classes, in the order that labels are to have.

    Raises:
        UsageError: a class of the source is none of `class_names`.
    """

    def __init__(self, source: Source, class_names: Sequence[str]):
        numbers = {name: number for number, name in enumerate(class_names)}
        own = source.class_names
        self.are_numbers = not any(name in numbers for name in own) and all(
            name.isdecimal() and int(name) < len(numbers) for name in own
        )
        for name in own if not self.are_numbers else ():
            if name not in numbers:
                hint = nearest(name, class_names)
                raise UsageError(
                    f'{source.name}: {name!r} is none of the {len(numbers):,} classes'
                    f'{hint if len(hint) < 200 else ""}'  # which may be a list of thousands
                )
        self._source, self.class_names, self.own_class_names = source, tuple(class_names), own
        self._numbers = np.array(
            [int(name) if self.are_numbers else numbers[name] for name in own], np.int32
        )
        self.name, self.origin, self.left_out = source.name, source.origin, source.left_out
        self.where, self.checksum = source.where, source.checksum
        self.labels = source.labels
        if self.labels is not None and self.labels.ndim == 1:
            self.labels = self._numbers[self.labels]
        elif self.labels is not None:
            self.labels = np.zeros((len(source), len(class_names)), np.uint8)
            self.labels[:, self._numbers] = source.labels

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._source[index]
        if self.labels is not None:
            label = self.labels[index]
        elif 0 <= example['label'] < len(self._numbers):
            label = self._numbers[example['label']]
        else:
            raise ImageError(f'its label, {example["label"]}, is not one of its classes')
        return example | {'label': label if label.ndim else int(label)}


def _source_class(name: str) -> Callable[..., Source]:
    if name not in SOURCES:
        raise UsageError(f'data.name={name!r} is unknown{nearest(name, SOURCES)}')
    return SOURCES[name]
