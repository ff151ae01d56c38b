"""The classes of ImageNet (ILSVRC 2012)."""

import functools
import importlib.util
import pathlib


@functools.cache
def class_names() -> tuple[str, ...]:
    """Returns the WordNet IDs of the 1000 classes in the order of the labels, 'n01440764' first.

    They are in a file of TensorFlow Datasets, which is not imported. Returns () without it.
    """
    found = importlib.util.find_spec('tensorflow_datasets')
    for place in found.submodule_search_locations or () if found else ():
        file = pathlib.Path(place, 'datasets', 'imagenet2012', 'labels.txt')
        if file.exists():
            return tuple(file.read_text(encoding='utf-8').split())
    return ()
