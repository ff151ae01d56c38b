"""TensorFlow Datasets without TensorFlow: random access to ArrayRecord files."""

import hashlib
import pathlib
from typing import Annotated

import numpy as np

from nfnets_jax import fields, files
from nfnets_jax.data.preprocessing import ImageError, decode
from nfnets_jax.data.splits import SPLITS, MissingData, MissingSplit, check_split
from nfnets_jax.errors import UsageError, nearest
from nfnets_jax.fields import Field

# How the papers split ImageNet; the first 10,000 training images are for choosing.
PAPER_SPLITS = {
    'imagenet2012': {
        'TRAIN': 'train[10000:]',
        'VALID': 'train[:10000]',
        'TRAIN_AND_VALID': 'train',
        'TEST': 'validation',
    }
}
DEFAULT_DATA_DIR = '~/tensorflow_datasets'


class TfdsSource:
    """A data set of tensorflow_datasets, prepared as ArrayRecord files.

    Where all images have one size, as in CIFAR, they are pixels, uint8 [H, W, 3]; else they are
    encoded files. Where the label is a list of classes, as of converted shards, an image may have
    several, and all examples are read once to know them.

    Splits are written as TFDS does ('train[:90%]', 'train[10000:]', 'train+test'); for imagenet2012
    also 'TRAIN', 'VALID', 'TRAIN_AND_VALID' and 'TEST'. By default the split for testing is 'test',
    or 'validation' where there is no test split or, as in ImageNet, none with labels; the split for
    validation is 'validation' where training is on 'train' and testing on 'test', else there is
    none. `split` is 'train', 'validation' or 'test'.

    Raises:
        MissingSplit: 'validation' where there is none.
        UsageError: data that are not there, not prepared or damaged, or a split without examples.
    """

    # They are stored beside the images, and read with them.
    labels: np.ndarray | None = None

    @fields.checked('data')
    def __init__(
        self,
        split: str,
        dataset: Annotated[
            str,
            Field(
                "Name, with config or version where needed: 'cifar10', 'cifar10_corrupted/fog_3', "
                "'cifar10:3.0.2'."
            ),
        ],
        data_dir: Annotated[str, Field('Directory of the prepared data sets.')] = DEFAULT_DATA_DIR,
        train_split: Annotated[str, Field("Examples to train on: 'train[:90%]'.")] = 'train',
        validation_split: Annotated[str, Field("Examples to validate on; '': the default.")] = '',
        test_split: Annotated[str, Field("Examples to test on; '': the default.")] = '',
    ):
        check_split('tfds', split, SPLITS)
        builder = open_builder(dataset, data_dir)
        self._image, self._label = _image_and_label(builder.info)
        test_split = test_split or _default_test_split(builder.info)
        if not validation_split and (train_split, test_split) == ('train', 'test'):
            validation_split = 'validation' if 'validation' in builder.info.splits else ''
        expression = {'train': train_split, 'validation': validation_split, 'test': test_split}[
            split
        ]
        if split == 'validation' and not expression:
            raise MissingSplit(f'{dataset}: no split besides those to train and test on')
        self.name, self.origin = f'{dataset}/{expression}', str(builder.data_dir)
        self.left_out: dict[str, int] = {}
        label = builder.info.features[self._label]
        self._several = hasattr(label, 'feature')
        self.class_names = tuple((label.feature if self._several else label).names)
        self._full_name = builder.info.full_name
        self._has_names = 'file_name' in builder.info.features  # ImageNet's
        self._one_size = None not in builder.info.features[self._image].shape
        try:
            self._records, self._parts = _open_records(
                builder, f'data.{split}_split', expression, self._image, data_dir
            )
            self[0], self[len(self) - 1]
            if self._several:
                self.labels = np.stack([self._label_of(self._read(i)) for i in range(len(self))])
        except ImageError as error:
            raise UsageError(
                f'data.dataset={dataset!r}: files are missing or damaged in {builder.data_dir} '
                f'({str(error)[:200]}); remove it and run {_prepare_command(builder, data_dir)}'
            ) from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        example = self._read(index)
        image: bytes | np.ndarray = bytes(example[self._image])
        if self._one_size:
            image = decode(image)
        return {'image': image, 'label': self._label_of(example)}

    def _read(self, index: int) -> dict:
        try:
            example = self._records[index]
            if not example[self._image]:
                raise ValueError('an empty record')
            return example
        except (OSError, ValueError, RuntimeError) as error:  # the reader raises any of them
            raise ImageError(f'cannot be read: {" ".join(str(error).split())}') from error

    def _label_of(self, example: dict) -> int | np.ndarray:
        if not self._several:
            return int(example[self._label])
        label = np.zeros(len(self.class_names), np.uint8)
        label[np.asarray(example[self._label], int)] = 1
        return label

    def where(self, index: int) -> str:
        place = f'{self.name}[{index}]'
        if not self._has_names:
            return place
        try:
            name = self._records[index]['file_name']
        except (OSError, ValueError, RuntimeError):  # the reader raises any of them
            return place
        return f'{place} {name.decode() if isinstance(name, bytes) else name}'

    def checksum(self) -> str:
        return hashlib.sha256(repr((self._full_name, self._parts)).encode()).hexdigest()


def open_builder(dataset: str, data_dir: str):
    """Returns TFDS's builder of a data set, prepared or not.

    A data set whose code is not part of TFDS is found only if it is prepared.

    Raises:
        UsageError: unknown name.
    """
    import tensorflow_datasets as tfds  # here: a slow import that only such data need

    root = files.expand(data_dir)
    try:
        builder = tfds.builder(dataset, data_dir=root)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        known = tfds.list_builders(with_community_datasets=False)
        name = dataset.split('/')[0].split(':')[0]
        reason = ' '.join(str(error).split()) if name in known else f'unknown{nearest(name, known)}'
        raise UsageError(f'data.dataset={dataset!r}: {reason[:300]}') from error
    # Prepared data are read as they describe themselves; only then are all file formats known.
    return tfds.builder_from_directory(builder.data_dir) if builder.info.splits else builder


def is_known(name: str) -> bool:
    """Returns whether TFDS has code for a data set of this name, and so reads only its versions."""
    import tensorflow_datasets as tfds

    return name in tfds.list_builders(with_community_datasets=False)


def _image_and_label(info) -> tuple[str, str]:
    """Returns the names of the image and the class among a data set's features."""
    import tensorflow_datasets as tfds

    features = dict(info.features.items())
    kinds = (tfds.features.Image, tfds.features.ClassLabel)
    found = [[k for k, f in features.items() if isinstance(f, kind)] for kind in kinds]
    if not found[1]:  # Lists of classes, of which an image may have several.
        lists = {k: getattr(f, 'feature', None) for k, f in features.items()}
        found[1] = [k for k, f in lists.items() if isinstance(f, tfds.features.ClassLabel)]
    if info.supervised_keys and all(k in found[i] for i, k in enumerate(info.supervised_keys[:2])):
        return info.supervised_keys[:2]
    if any(len(names) != 1 for names in found):
        raise UsageError(
            f'data.dataset={info.name!r}: not one image and one class in each example, '
            f'but {", ".join(features)}'
        )
    return found[0][0], found[1][0]


def _default_test_split(info) -> str:
    if 'test' in info.splits and info.name not in PAPER_SPLITS:
        return 'test'
    return 'validation'


def _open_records(builder, key: str, expression: str, image: str, data_dir: str):
    """Opens the records of a split.

    Returns:
        The records, and a list of (file name, number of the first record, number of records).

    Raises:
        UsageError: the data set is not prepared, or has no such split.
        ImageError: files are missing or damaged.
    """
    import tensorflow_datasets as tfds

    name, info = builder.info.full_name, builder.info
    prepare = _prepare_command(builder, data_dir)
    if not info.splits:
        raise MissingData(f'data.dataset={name!r}: not found in {data_dir}; run {prepare}')
    if 'array_record' not in {f.value for f in info.available_file_formats()}:
        raise UsageError(
            f'data.dataset={name!r}: prepared as {info.file_format.value}, which cannot be read '
            f'without TensorFlow; convert it with {prepare}'
        )
    aliases = PAPER_SPLITS.get(builder.name, {})
    split = aliases.get(expression, expression)
    try:
        records = builder.as_data_source(
            split=split,
            decoders={image: tfds.decode.SkipDecoding()},
            file_format='array_record',
        )
    except (ValueError, KeyError, AssertionError) as error:
        known = [*aliases, *info.splits]
        raise UsageError(
            f'{key}={expression!r}: no examples in {name}{nearest(expression, known)}'
        ) from error
    except (OSError, RuntimeError) as error:
        raise ImageError(f'cannot be opened: {" ".join(str(error).split())}') from error
    # Only after as_data_source are these the instructions of the ArrayRecord files.
    parts = info.splits[split].file_instructions
    return records, [(pathlib.PurePath(p.filename).name, p.skip, p.take) for p in parts]


def _prepare_command(builder, data_dir: str) -> str:
    return f'python -m experiments.prepare_data --dataset={builder.name} --data_dir={data_dir}'
