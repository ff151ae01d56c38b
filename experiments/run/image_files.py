"""The images that a command names, and what a network computes from each of them."""

import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from nfnets_jax import files
from nfnets_jax.data.folder import find_images
from nfnets_jax.data.preprocessing import ImageError, make_transform
from nfnets_jax.errors import UsageError
from nfnets_jax.weights import export, pretrained


def expand_directories(paths: Sequence[str]) -> list[pathlib.Path]:
    """Returns the given files, and the images in the given directories in the order of their paths.

    A directory without images is returned itself.

    Raises:
      UsageError: there are no paths, or one is empty.
    """
    if not paths or not all(paths):
        raise UsageError('name images, or directories of images')
    found: list[pathlib.Path] = []
    for path in map(pathlib.Path, map(files.expand, paths)):
        found += (find_images(path) if os.path.isdir(path) else []) or [path]
    return found


def announce(source: str, weights: pretrained.Weights, images: Sequence[pathlib.Path]) -> None:
    """Prints, before anything is compiled, what the weights are and how many images they get."""
    count = f'{len(images):,} image{"s" if len(images) > 1 else ""}'
    line = f'{source}: {pretrained.describe(weights)}; {count}; compiling'
    print(line, file=sys.stderr, flush=True)


def outputs(
    weights: pretrained.Weights,
    paths: Iterable[pathlib.Path],
    batch_size: int,
    activation: Callable[[jax.Array], jax.Array] = lambda output: output,
) -> Iterator[tuple[pathlib.Path, np.ndarray | str]]:
    """Yields for each image its row of the network's output, or why the image cannot be read.

    Args:
      weights: weights whose metadata name the model, and say how images are prepared.
      paths: files.
      batch_size: images at a time.
      activation: applied to the output [batch, size], which is float32: logits, or 'pool' where
        the network has no classifier.

    Raises:
      UsageError: the weights lack the size of images.
    """
    metadata = weights.metadata
    transform = make_transform(metadata.eval_mode, export.image_size(weights), metadata.pixels)
    network = export.make_classifier(weights)
    predict = jax.jit(lambda pixels: activation(network(pixels)))

    def read(path: pathlib.Path) -> np.ndarray | str:
        if os.path.isdir(path):
            return 'there are no images in this directory'
        try:
            return np.asarray(transform(path.read_bytes(), None), np.float32)
        except OSError as error:
            return f'cannot be read: {error.strerror}'
        except ImageError as error:
            return str(error)

    paths = list(paths)
    for first in range(0, len(paths), batch_size):
        batch = paths[first : first + batch_size]
        read_batch = [read(path) for path in batch]
        images = [image for image in read_batch if not isinstance(image, str)]
        if images:
            # Whole batches compile once: the last image fills them up.
            filled = np.stack(images + images[-1:] * (batch_size - len(images)))
            rows = iter(np.asarray(predict(filled)))
        for path, image in zip(batch, read_batch, strict=True):
            yield path, image if isinstance(image, str) else next(rows)
