"""Classifies images, prepared as in the evaluation of the weights.

    python -m experiments.classify --weights=W.safetensors --top=5 IMAGE_OR_DIRECTORY...
    python -m experiments.classify --workdir=runs/mine --json IMAGE_OR_DIRECTORY...

Directories are searched for images at any depth. An unreadable image is named, the others are still
classified, and the exit status is 2.
"""

import json
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

from experiments.launch import cli, weights_flags
from experiments.run import image_files
from nfnets_jax.errors import UsageError
from nfnets_jax.weights import pretrained


class Guess(NamedTuple):
    label: int  # index of the class in the logits
    name: str  # name of the class; its number if the weights name none
    probability: float


def classify(
    weights: pretrained.Weights,
    paths: Iterable[pathlib.Path],
    top: int = 5,
    batch_size: int = 16,
    threshold: float | None = None,
) -> Iterator[tuple[pathlib.Path, list[Guess] | str]]:
    """Yields for each image its classes, most likely first, or why it cannot be read.

    These are the `top` ones, or all that have at least the probability `threshold`. Where an image
    may have several classes, each has a probability of its own.
    """
    metadata = weights.metadata
    names = metadata.class_labels
    activation = jax.nn.sigmoid if metadata.multi_label else jax.nn.softmax
    for path, found in image_files.outputs(weights, paths, batch_size, activation):
        if isinstance(found, str):
            yield path, found
            continue
        shown = top if threshold is None else np.count_nonzero(found >= threshold)
        ranked = np.argsort(-found, kind='stable')[:shown]
        yield path, [Guess(int(i), names[i], float(found[i])) for i in ranked]


def describe_guesses(path: pathlib.Path, guesses: list[Guess]) -> str:
    """Returns a line with the name of the image and one line for each class."""
    lines = [f'  {guess.probability:7.2%}  {guess.name}' for guess in guesses]
    return '\n'.join([f'{path}', *lines])


def main(paths: list[str]) -> None:
    args = flags.FLAGS
    images = image_files.expand_directories(paths)
    source, weights = weights_flags.load()
    if not weights.metadata.num_classes:
        raise UsageError(f'{source} have no classifier: see experiments.embed')
    image_files.announce(source, weights, images)
    unreadable = 0
    options = args.top, args.batch_size, args.threshold
    for path, result in classify(weights, images, *options):
        if isinstance(result, str):
            unreadable += 1
            print(f'{path}: {result}', file=sys.stderr)
        elif args.json:
            guesses = [guess._asdict() for guess in result]
            print(json.dumps({'picture': str(path), 'classes': guesses}), flush=True)
        else:
            print(describe_guesses(path, result), flush=True)
    if unreadable:
        raise UsageError(f'{unreadable} of {len(images)} images could not be read')


if __name__ == '__main__':
    weights_flags.define()
    flags.DEFINE_integer('top', 5, 'How many classes to print.', lower_bound=1)
    flags.DEFINE_float(
        'threshold',
        None,
        'Print the classes that are at least so probable, instead of --top.',
        lower_bound=0,
        upper_bound=1,
    )
    flags.DEFINE_bool('json', False, 'Print one JSON object a line for each image.')
    flags.DEFINE_integer('batch_size', 16, 'Images at a time.', lower_bound=1)
    cli.run(main, positional=True, groups=weights_flags.GROUP)
