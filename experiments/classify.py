"""Says what is on pictures.

    python -m experiments.classify --weights=W.safetensors --top=5 PICTURE_OR_DIRECTORY...

Of directories all pictures are taken, at any depth. Pictures are prepared as those were that the
weights were evaluated on. One that cannot be read is named, the rest is still classified, and the
exit status is 2.
"""

import json
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

from experiments.launch import cli
from nfnets_jax import files
from nfnets_jax.data.folder import find_images
from nfnets_jax.data.preprocessing import ImageError, make_transform
from nfnets_jax.errors import UsageError
from nfnets_jax.weights import export, pretrained


class Guess(NamedTuple):
    label: int  # the class's place in the logits
    name: str  # what it is called; its number where the weights do not say
    probability: float


def find_pictures(paths: Iterable[str]) -> Iterator[pathlib.Path]:
    """Yields files as they are given, and the pictures in directories in the order of their paths.

    A directory without pictures is yielded itself.
    """
    for path in map(pathlib.Path, map(files.expand, paths)):
        if not path.is_dir():
            yield path
            continue
        # A directory without images cannot be read as one, and is named so.
        yield from find_images(path) or [path]


def classify(
    weights: pretrained.Weights, paths: Iterable[pathlib.Path], top: int = 5, batch_size: int = 16
) -> Iterator[tuple[pathlib.Path, list[Guess] | str]]:
    """Yields for each picture its `top` classes, the likeliest first, or why it cannot be read."""
    metadata = weights.metadata
    transform = make_transform(metadata.eval_mode, export.image_size(weights))
    logits = export.make_classifier(weights)
    predict = jax.jit(lambda pixels: jax.nn.softmax(logits(pixels)))
    names = metadata.class_names or tuple(map(str, range(metadata.num_classes or 0)))

    def read(path: pathlib.Path) -> np.ndarray | str:
        if path.is_dir():
            return 'there are no pictures in this directory'
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
        pictures = [picture for picture in read_batch if not isinstance(picture, str)]
        if pictures:
            # Always whole batches, for one compilation: the last picture fills them up.
            filled = np.stack(pictures + pictures[-1:] * (batch_size - len(pictures)))
            probabilities = iter(np.asarray(predict(filled)))
        for path, picture in zip(batch, read_batch, strict=True):
            if isinstance(picture, str):
                yield path, picture
                continue
            found = next(probabilities)
            ranked = np.argsort(-found, kind='stable')[:top]
            yield path, [Guess(int(i), names[i], float(found[i])) for i in ranked]


def describe(path: pathlib.Path, guesses: list[Guess]) -> str:
    """Returns a line with the picture's name and one for each class."""
    lines = [f'  {guess.probability:7.2%}  {guess.name}' for guess in guesses]
    return '\n'.join([f'{path}', *lines])


def main(paths: list[str]) -> None:
    args = flags.FLAGS
    if not paths:
        raise UsageError('name pictures, or directories of pictures')
    weights = pretrained.load_pretrained(args.weights)
    if weights.metadata.model is None:
        raise UsageError(f'{args.weights}: these are the parameters of no known model')
    pictures = list(find_pictures(paths))
    told = f'{args.weights}: {pretrained.describe(weights)}; {len(pictures):,} images; compiling'
    print(told, file=sys.stderr, flush=True)
    unreadable = 0
    for path, result in classify(weights, pictures, args.top, args.batch_size):
        if isinstance(result, str):
            unreadable += 1
            print(f'{path}: {result}', file=sys.stderr)
        elif args.json:
            guesses = [guess._asdict() for guess in result]
            print(json.dumps({'picture': str(path), 'classes': guesses}), flush=True)
        else:
            print(describe(path, result), flush=True)
    if unreadable:
        raise UsageError(f'{unreadable} of {len(pictures)} pictures could not be read')


if __name__ == '__main__':
    cli.define_path('weights', None, 'A file of weights, or the directory of a run.', required=True)
    flags.DEFINE_integer('top', 5, 'How many classes to name.', lower_bound=1)
    flags.DEFINE_bool('json', False, 'Print one JSON object a line for each picture.')
    flags.DEFINE_integer('batch_size', 16, 'Pictures at a time.', lower_bound=1)
    cli.run(main, positional=True)
