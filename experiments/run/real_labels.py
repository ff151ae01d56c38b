"""ReaL: reassessed labels of ImageNet's validation images (Beyer et al., arXiv 2006.07159).

real.json of github.com/google-research/reassessed-imagenet holds a list for each of the 50,000
images, in the order of their file names: the labels that are right, perhaps none. An image without
any does not count.
"""

import json
import re
from collections.abc import Sequence

import numpy as np

from experiments.run.predictions import Predictions
from nfnets_jax import files
from nfnets_jax.data.sources import Source
from nfnets_jax.errors import UsageError

_CLASSES = 1000
_IMAGE = re.compile(r'ILSVRC2012_val_(\d{8})')
_WORDNET = re.compile(r'n\d{8}')


def read(path: str) -> list[list[int]]:
    """Returns the labels of every validation image, by its number from 0.

    Raises:
      UsageError: the file is not such a list.
    """
    try:
        with open(files.expand(path), encoding='utf-8') as file:
            labels = json.load(file)
    except (OSError, ValueError) as error:
        raise UsageError(f'--real={path}: cannot be read: {error}') from error
    if not isinstance(labels, list) or not all(
        isinstance(each, list) and all(type(x) is int and 0 <= x < _CLASSES for x in each)
        for each in labels
    ):
        raise UsageError(f'--real={path}: must be a list of lists of labels, from 0 to 999')
    return labels


def image_numbers(source: Source, count: int) -> np.ndarray:
    """Returns the number of each image among ImageNet's validation images, from 0.

    Args:
      source: images that are called ILSVRC2012_val_00000001 and so on, of ImageNet's classes.
      count: the number of images with labels.

    Raises:
      UsageError: it is not such a source.
    """
    names = list(source.class_names)
    in_order = all(map(_WORDNET.fullmatch, names)) and names == sorted(names)
    if len(names) != _CLASSES or not (in_order or names == list(map(str, range(_CLASSES)))):
        raise UsageError(
            f'--real: the labels are for the {_CLASSES} classes of ImageNet in the order of their '
            f'WordNet IDs, or their numbers in it, but {source.name} has {len(names):,} classes, '
            f'the first {names[0]!r}'
        )
    found = [_IMAGE.search(source.where(index)) for index in range(len(source))]
    numbers = np.array([int(match[1]) - 1 if match else -1 for match in found])
    if (wrong := np.flatnonzero((numbers < 0) | (numbers >= count))).size:
        raise UsageError(
            f'--real: {source.where(int(wrong[0]))} is not called like an image of the file, '
            f'ILSVRC2012_val_00000001 to {count:08d}'
        )
    return numbers


def top1(predictions: Predictions, numbers: np.ndarray, labels: Sequence[Sequence[int]]) -> float:
    """Returns the share of the images with labels whose most probable class is one of them.

    Args:
      predictions: on the images of a source.
      numbers: from `image_numbers` of that source.
      labels: from `read`.
    """
    of_images = [labels[number] for number in numbers[predictions.indices]]
    hits = [
        best in right
        for best, right in zip(predictions.predicted.tolist(), of_images, strict=True)
        if right
    ]
    return float(np.mean(hits)) if hits else float('nan')
