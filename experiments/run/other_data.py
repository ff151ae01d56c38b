"""Data that a run was not trained on, with the same classes: a folder, a table or arrays.

The run's own data need not be there: its directory says what its classes and images are.
"""

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.run.planned_data import PlannedSource
from nfnets_jax.data import sources
from nfnets_jax.data.folder import FlatImageFolder, holds_directories
from nfnets_jax.data.sources import RenumberedSource, Source
from nfnets_jax.data.splits import ALL, MissingSplit
from nfnets_jax.errors import UsageError
from nfnets_jax.weights.pretrained import Metadata

# Options that say where the images of a run are, and which of them are its splits.
_OF_THE_PLACE = (
    *('path', 'root', 'train_split', 'validation_split', 'test_split'),
    *('val_labels', 'test_fraction', 'split_seed'),
)
_KEPT = ('mean', 'std', 'value_range', 'skip_bad')  # of the config, whatever the source


def other_config(
    config: ConfigDict, path: str, metadata: Metadata, val_labels: str | None = None
) -> ConfigDict:
    """Returns the config of a run with other data, prepared as its own for evaluation.

    Options of a table, such as the names of its columns, stay where both are tables.

    Args:
      config: of the run.
      path: of the other data.
      metadata: of the run.
      val_labels: file with the labels of images that lie directly in the directory, or in its val.

    Raises:
      UsageError: there is such a file, but the data are no directory.
    """
    name, given = sources.source_of(path), config.data.to_dict()
    own = sources.source_options(name) if name == config.data.name else ()
    if val_labels and (name != 'folder' or not os.path.isdir(path)):
        raise UsageError(
            f'--val_labels={val_labels} is for images in a directory, not --data={path}'
        )
    kept = [key for key in own if key not in _OF_THE_PLACE] + list(_KEPT)
    config = copy.deepcopy(config)
    with config.ignore_type():
        config.data = {key: given[key] for key in kept if key in given} | {
            'name': name,
            'path': path,
            'image_size': metadata.train_size,
            'test_image_size': metadata.test_size,
            'test_mode': metadata.eval_mode,
            **({'val_labels': os.path.abspath(val_labels)} if val_labels else {}),
        }
    return config


def open_other(
    config: ConfigDict, metadata: Metadata, split: str | None = None, default: str = 'test'
) -> RenumberedSource:
    """Opens other data, with the labels of a run.

    Where they have no splits these are all images.

    Args:
      config: from `other_config`.
      metadata: of the run.
      split: that of the other data, which then must have splits; None: the default, if they do.
      default: a split.

    Raises:
      UsageError: the data are not there, or their classes are not those of the run.
    """
    name, path, given = config.data.name, config.data.path, config.data.to_dict()
    options = {key: given[key] for key in sources.source_options(name) if key in given}
    try:
        if options.get('val_labels') and not holds_directories(path):
            own: Source = FlatImageFolder(path, options['val_labels'], metadata.class_names)
            _check_no_split(split)
        else:
            own = _open(name, split, default, options)
        source = RenumberedSource(own, metadata.class_names)
    except UsageError as error:
        raise UsageError(f'--data={path}: {error}') from error
    several = source.labels is not None and source.labels.ndim == 2
    if several != metadata.multi_label:
        has = {True: 'several labels', False: 'one label'}
        raise UsageError(
            f'--data={path}: images have {has[several]}, those of the run '
            f'{has[metadata.multi_label]}'
        )
    return source


def _open(name: str, split: str | None, default: str, options: Mapping[str, Any]) -> Source:
    try:
        source = sources.open_source(name, ALL, **options)
    except MissingSplit:
        return sources.open_source(name, split or default, **options)
    _check_no_split(split)
    return source


def _check_no_split(split: str | None) -> None:
    if split is not None:
        raise UsageError(f'it holds no splits, but --split={split}: leave that out')


def opener(test: Source, config: ConfigDict, metadata: Metadata) -> Callable[..., Source]:
    """Returns the function (name, split, **options) -> source that gives `test` as 'test'.

    Instead of the training images there is a stand-in with the classes of the run.
    """
    train = PlannedSource(
        'the training images',
        examples=2 * config.batch_size,  # as many as a step may read
        class_names=metadata.class_names,
        image=b'',
        labels=np.zeros((1, len(metadata.class_names)), np.uint8) if metadata.multi_label else None,
    )

    def open_source(name: str, split: str, **options: Any) -> Source:
        if split == 'validation':
            raise MissingSplit('other data are evaluated on as a whole')
        return train if split == 'train' else test

    return open_source


def describe(source: RenumberedSource) -> str:
    """Returns a line about other data, from `open_other`."""
    there, classes = len(source.own_class_names), len(source.class_names)
    part = f'{there:,} of ' if there < classes else ''
    numbers = ', whose numbers are the names there' if source.are_numbers else ''
    return (
        f'other data: {len(source):,} images of {part}the {classes:,} classes{numbers}, '
        f'from {source.origin}'
    )
