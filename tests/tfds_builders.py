"""Data sets for TFDS that need no download. TFDS knows a builder once its class is defined."""

import numpy as np
import tensorflow_datasets as tfds

from nfnets_jax.data.sources import open_source


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Twenty training and six test pictures of one size, each of one value: its number."""

    VERSION = tfds.core.Version('1.0.0')
    SHAPE = (8, 8, 3)
    SPLITS = {'train': (0, 20), 'test': (20, 26)}

    def _info(self):
        features = {
            'image': tfds.features.Image(shape=self.SHAPE),
            'label': tfds.features.ClassLabel(names=['ape', 'bee', 'cat']),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager
        return {name: self._generate_examples(*ends) for name, ends in self.SPLITS.items()}

    def _generate_examples(self, start, stop):
        height, width, channels = (side or 8 for side in self.SHAPE)
        for i in range(start, stop):
            image = np.full((height, width, channels), i, np.uint8)
            yield i, {'image': image, 'label': i % 3}


class ImagenetLike(TinyPictures):
    """Pictures of any size; the labelled ones to test on are called 'validation'."""

    SHAPE = (None, None, 3)
    SPLITS = {'train': (0, 20), 'validation': (20, 24)}


class NamedPictures(TinyPictures):
    """Pictures with the names that their files had, as in ImageNet."""

    SPLITS = {'train': (0, 20), 'validation': (20, 24)}

    def _info(self):
        features = {'file_name': tfds.features.Text(), **super()._info().features}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, start, stop):
        for i, example in super()._generate_examples(start, stop):
            yield i, example | {'file_name': f'ILSVRC2012_val_{i + 1:08d}.JPEG'}


class ThreeSplits(TinyPictures):
    SPLITS = {'train': (0, 10), 'validation': (10, 16), 'test': (16, 20)}


class GreyPictures(TinyPictures):
    SHAPE = (4, 4, 1)
    SPLITS = {'train': (0, 20)}


def open_prepared(dataset, data_dir, split='train', **options):
    return open_source('tfds', split, dataset=dataset, data_dir=str(data_dir), **options)
