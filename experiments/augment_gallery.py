"""Shows augmented images.

    python -m experiments.augment_gallery --out=gallery.png
    python -m experiments.augment_gallery --out=strong.png --magnitude=20

First two images, then each operation of RandAugment, then the published recipe step by step, draws
of the whole recipe, AutoAugment and random erasing. The images are the first two of a directory, by
default the photographs of scikit-learn.
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
from experiments.run import curves
from nfnets_jax import augment
from nfnets_jax.augment.operations import OPERATIONS, WARPS, apply_operations
from nfnets_jax.augment.randaugment import published_operation
from nfnets_jax.data.folder import find_images
from nfnets_jax.data.preprocessing import ImageError, make_transform
from nfnets_jax.errors import UsageError, first_line

SIZE = 224  # side of an image in pixels

_COLUMNS = 6
_RECIPE = {'flip': True, 'mixup': 0.2, 'cutmix': 1.0, 'randaugment_layers': 4}
_OTHERS: dict[str, dict] = {'autoaugment': {'autoaugment': True}, 'erasing': {'erasing': 1.0}}


def operations(original: np.ndarray, magnitude: float) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (title, uint8 image [H, W, 3]) of each operation, warps in both directions."""
    chosen = [published_operation(name, magnitude, translate=100, cutout=40) for name in OPERATIONS]
    cases = [
        (choice, sign)
        for choice, operation in enumerate(chosen)
        for sign in ((1, -1) if operation.name in WARPS else (1,))
    ]
    choice, sign = np.transpose(cases)
    middle = np.tile(np.array(original.shape[:2]) // 3, (len(cases), 1))
    originals = np.tile(original, (len(cases), 1, 1, 1))
    images = apply_operations(
        jnp.asarray(originals), chosen, choice, sign.astype(np.float32), jnp.asarray(middle)
    )
    for (choice, sign), image in zip(cases, np.asarray(images), strict=True):
        yield f'{chosen[choice].name} {sign * chosen[choice].argument:g}', image


def recipes(originals: np.ndarray, magnitude: float) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (title, uint8 image [H, W, 3]) of the published recipe and other augmentations.

    The shares of the two images in the target are part of the title.
    """
    recipe = _RECIPE | {'randaugment_magnitude': float(magnitude)}
    keys = [*_RECIPE]
    for number, key in enumerate(keys):  # each step on top of the earlier ones
        yield from augmented(originals, {k: recipe[k] for k in keys[: number + 1]}, f'+ {key}')
    yield from augmented(originals, recipe, 'recipe', range(1, 9))
    for key, config in _OTHERS.items():
        yield from augmented(originals, config, key, range(3))


def augmented(
    originals: np.ndarray, config: dict, title: str, seeds: Iterable[int] = (0,)
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (title, image) of two augmented images for each seed: MixUp and CutMix."""
    apply = jax.jit(augment.make_augment(config, 2))
    batch, labels = np.tile(originals, (2, 1, 1, 1)), jnp.arange(4) % 2
    for seed in seeds:
        keys = augment.example_keys(seed, 0, jnp.arange(4))
        images, targets = apply(keys, batch, labels)
        images = np.asarray(images) * augment.IMAGENET_STD + augment.IMAGENET_MEAN
        for row in (0, 3):
            shares = ' : '.join(f'{share:.2f}' for share in targets[row])
            yield f'{title}  ({shares})', np.rint(images[row]).clip(0, 255).astype(np.uint8)


def draw(tiles: list[tuple], path: pathlib.Path) -> None:
    """Writes titled images to an image file, atomically."""
    rows = -(-len(tiles) // _COLUMNS)
    # Whole pixels, after the division: 6 * 2.4 inches are 14.399...
    size = (240 * _COLUMNS / 100, 260 * rows / 100)
    figure = Figure(figsize=size, dpi=100, layout='constrained')
    grid = figure.subplots(rows, _COLUMNS).ravel()
    for axes in grid:
        axes.axis('off')
    for axes, (title, image) in zip(grid, tiles, strict=False):
        axes.imshow(image)
        axes.set_title(title, fontsize=9)
    curves.write_figure(path, figure)


def load_originals(directory: str | None) -> np.ndarray:
    """Returns the first two images of a directory, or scikit-learn's: uint8 [2, SIZE, SIZE, 3]."""
    transform = make_transform('crop_resize', SIZE)

    def prepare(image: bytes | np.ndarray) -> np.ndarray:
        return transform(image, None).clip(0, 255).astype(np.uint8)

    if not directory:
        return np.stack([prepare(image) for image in load_sample_images().images])
    files = find_images(directory)[:2]
    if len(files) < 2:
        raise UsageError(f'--pictures={directory}: holds fewer than two images')
    images = []
    for path in files:
        try:
            images.append(prepare(path.read_bytes()))
        except (OSError, ImageError) as error:
            raise UsageError(f'{path}: {first_line(error)}') from error
    return np.stack(images)


def main() -> None:
    path = pathlib.Path(_OUT.value)
    cli.check_out(path, curves.FIGURE_SUFFIXES)
    originals, magnitude = load_originals(_PICTURES.value), _MAGNITUDE.value
    tiles = [('image 1', originals[0]), ('image 2', originals[1])]
    tiles += [*operations(originals[0], magnitude), *recipes(originals, magnitude)]
    draw(tiles, path)
    print(f'{len(tiles)} images in {path}')


if __name__ == '__main__':
    _OUT = cli.define_path('out', 'gallery.png', 'Image file to write.')
    _PICTURES = cli.define_path('pictures', None, 'Directory of at least two images.')
    _MAGNITUDE = flags.DEFINE_float('magnitude', 10.0, 'Magnitude of RandAugment.', lower_bound=0)
    cli.run(main)
