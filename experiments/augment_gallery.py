"""Draws what the augmentations do to pictures, for the eye to judge.

    python -m experiments.augment_gallery --out=gallery.png [--pictures=DIR] [--magnitude=10]

First the two pictures, then each operation of RandAugment, then the published recipe step by step,
draws of the whole recipe, AutoAugment and random erasing. The pictures are the first two of a
directory, by default the photographs that scikit-learn ships.
"""

import pathlib
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images

from experiments.launch import cli
from nfnets_jax import augment
from nfnets_jax.augment.operations import OPERATIONS, WARPS, apply_operations
from nfnets_jax.augment.randaugment import published_operation
from nfnets_jax.data.folder import find_images
from nfnets_jax.data.preprocessing import make_transform
from nfnets_jax.errors import UsageError

SIZE = 224  # pixels of a picture

_COLUMNS = 6
_RECIPE = {'flip': True, 'mixup': 0.2, 'cutmix': 1.0, 'randaugment_layers': 4}
_OTHERS: dict[str, dict] = {'autoaugment': {'autoaugment': True}, 'erasing': {'erasing': 1.0}}


def operations(picture: np.ndarray, magnitude: float) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (title, uint8 image [H, W, 3]) of each operation on a picture; warps either way."""
    chosen = [published_operation(name, magnitude, translate=100, cutout=40) for name in OPERATIONS]
    cases = [
        (choice, sign)
        for choice, operation in enumerate(chosen)
        for sign in ((1, -1) if operation.name in WARPS else (1,))
    ]
    choice, sign = np.transpose(cases)
    middle = np.tile(np.array(picture.shape[:2]) // 3, (len(cases), 1))
    pictures = np.tile(picture, (len(cases), 1, 1, 1))
    images = apply_operations(
        jnp.asarray(pictures), chosen, choice, sign.astype(np.float32), jnp.asarray(middle)
    )
    for (choice, sign), image in zip(cases, np.asarray(images), strict=True):
        yield f'{chosen[choice].name} {sign * chosen[choice].argument:g}', image


def recipes(pictures: np.ndarray, magnitude: float) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (title, uint8 image [H, W, 3]) of the published recipe, and of what else there is.

    The shares of the two pictures in the target are part of the title.
    """
    recipe = _RECIPE | {'randaugment_magnitude': float(magnitude)}
    keys = [*_RECIPE]
    for number, key in enumerate(keys):  # each step on top of those before
        yield from augmented(pictures, {k: recipe[k] for k in keys[: number + 1]}, f'+ {key}')
    yield from augmented(pictures, recipe, 'recipe', range(1, 9))
    for key, config in _OTHERS.items():
        yield from augmented(pictures, config, key, range(3))


def augmented(
    pictures: np.ndarray, config: dict, title: str, seeds: Iterable[int] = (0,)
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (title, image) of two augmented pictures for each seed: one MixUp's, one CutMix's."""
    apply = jax.jit(augment.make_augment(config, 2))
    batch, labels = np.tile(pictures, (2, 1, 1, 1)), jnp.arange(4) % 2
    for seed in seeds:
        keys = augment.example_keys(seed, 0, jnp.arange(4))
        images, targets = apply(keys, batch, labels)
        images = np.asarray(images) * augment.IMAGENET_STD + augment.IMAGENET_MEAN
        for row in (0, 3):
            shares = ' : '.join(f'{share:.2f}' for share in targets[row])
            yield f'{title}  ({shares})', np.rint(images[row]).clip(0, 255).astype(np.uint8)


def draw(tiles: list[tuple], path: pathlib.Path) -> None:
    """Writes titled images to a PNG file."""
    rows = -(-len(tiles) // _COLUMNS)
    figure = Figure(figsize=(2.4 * _COLUMNS, 2.6 * rows), dpi=100, layout='constrained')
    grid = figure.subplots(rows, _COLUMNS).ravel()
    for axes in grid:
        axes.axis('off')
    for axes, (title, image) in zip(grid, tiles, strict=False):
        axes.imshow(image)
        axes.set_title(title, fontsize=9)
    figure.savefig(path)


def load_pictures(directory: str | None) -> np.ndarray:
    """Returns a directory's first two pictures, or scikit-learn's: uint8 [2, SIZE, SIZE, 3]."""
    images = list(load_sample_images().images)
    if directory:
        files = find_images(directory)
        if len(files) < 2:
            raise UsageError(f'--pictures={directory}: holds no two pictures')
        images = [path.read_bytes() for path in files[:2]]
    transform = make_transform('crop_resize', SIZE)
    return np.stack([transform(image, None).clip(0, 255).astype(np.uint8) for image in images])


def _main() -> None:
    path = pathlib.Path(_OUT.value)
    pictures, magnitude = load_pictures(_PICTURES.value), _MAGNITUDE.value
    tiles = [('picture 1', pictures[0]), ('picture 2', pictures[1])]
    tiles += [*operations(pictures[0], magnitude), *recipes(pictures, magnitude)]
    try:
        draw(tiles, path)
    except (OSError, ValueError) as error:
        raise UsageError(f'--out={path}: cannot be written: {error}') from error
    print(f'{len(tiles)} pictures in {path}')


if __name__ == '__main__':
    _OUT = cli.define_path('out', 'gallery.png', 'The picture to write.')
    _PICTURES = cli.define_path('pictures', None, 'Where to find two pictures.')
    _MAGNITUDE = flags.DEFINE_float('magnitude', 10.0, 'Of RandAugment.', lower_bound=0)
    cli.run(_main)
