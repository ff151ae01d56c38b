"""Augmentation on the device: pure functions of (keys, images), one key for every example.

Keys come from (seed, step, position in the global batch), so what happens to an image depends
neither on the number of devices nor on what happens to the others.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax

from nfnets_jax import fields
from nfnets_jax.augment import randaugment
from nfnets_jax.augment.definitions import Operation
from nfnets_jax.augment.operations import apply_operations
from nfnets_jax.errors import UsageError
from nfnets_jax.fields import Field

IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The options of the augmentation, in the order of `make_augment`."""

    flip: Annotated[bool, Field('Mirror every second image left-right.')] = False
    shift: Annotated[int, Field('Crop up to this many pixels off, in both directions.', low=0)] = 0
    shift_fill: Annotated[
        Literal['constant', 'edge', 'reflect'],
        Field('What lies outside of a shifted image; constant is black.'),
    ] = 'constant'
    rotation: Annotated[
        int, Field('Rotate by up to this many degrees, whole ones, to both sides.', low=0, high=180)
    ] = 0
    mixup: Annotated[
        float,
        Field(
            'Alpha of MixUp: pairs of images and labels are mixed by weights of Beta(alpha, '
            'alpha); 0: off; published: 0.2. With CutMix, too, half of the batch each.',
            low=0,
        ),
    ] = 0.0
    cutmix: Annotated[float, Field('Alpha of CutMix, as of MixUp; published: 1.', low=0)] = 0.0
    mix_pairs: Annotated[
        Literal['batch', 'distinct'],
        Field(
            'batch: mix each image with its neighbor in the batch, so that it is used twice. '
            'distinct (as published): mix a batch of B examples from 2 B images, each used once.'
        ),
    ] = 'batch'
    mix_first: Annotated[bool, Field('Mix before RandAugment (as published), or after.')] = True
    randaugment_layers: Annotated[int, Field('Operations on an image; published: 4.', low=0)] = 0
    randaugment_magnitude: Annotated[
        float, Field('Published: F0 5, F1 and F2 10, larger ones 15.', low=0)
    ] = 10.0
    autoaugment: Annotated[bool, Field("ImageNet's policy v0, instead of RandAugment.")] = False
    erasing: Annotated[float, Field('Probability of blanking a random box.', low=0, high=1)] = 0.0
    label_smoothing: Annotated[float, Field('Share spread over all classes.', low=0, below=1)] = 0.0

    @classmethod
    def parse(cls, config: Mapping) -> 'Recipe':
        """Returns the recipe of a config with some of the options, or raises a UsageError."""
        fields.check(fields.options(cls), config, 'augment')
        recipe = cls(**config)
        if recipe.autoaugment and recipe.randaugment_layers:
            raise UsageError('augment.autoaugment=True: set augment.randaugment_layers=0 with it')
        return recipe


DEFAULTS: dict[str, Any] = fields.defaults(fields.options(Recipe))


def example_keys(seed: int | jax.Array, step: int | jax.Array, positions: jax.Array) -> jax.Array:
    """Returns one random key for each example.

    Args:
        seed: of the run.
        step: the training step, an integer scalar; may be traced.
        positions: int32 [N], places in the global batch.

    Returns:
        typed keys [N].
    """
    step_key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(jax.random.fold_in, (None, 0))(step_key, positions)


def random_flip(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each of `images` [N, H, W, C] left-right with probability 1/2."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def random_shift_crop(
    keys: jax.Array, images: jax.Array, shift: int, fill: str = 'constant'
) -> jax.Array:
    """Pads each of `images` [N, H, W, C] by `shift` pixels and crops it back at a random place.

    Args:
        fill: what lies outside: 'constant' (0), 'edge' or 'reflect', as in `jnp.pad`.
    """
    padded = jnp.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode=fill)

    def crop(key, image):
        top, left = jax.random.randint(key, (2,), 0, 2 * shift + 1)
        return jax.lax.dynamic_slice(image, (top, left, 0), images.shape[1:])

    return jax.vmap(crop)(keys, padded)


def random_rotation(keys: jax.Array, images: jax.Array, degrees: int) -> jax.Array:
    """Rotates each of `images`, uint8 [N, H, W, C], by a whole number of degrees.

    Each of -degrees ... degrees is as likely. Pixels are the nearest ones, those of Pillow but for
    what `operations` says; outside of the image it is gray.
    """
    drawn = jax.vmap(lambda key: jax.random.randint(key, (), -degrees, degrees + 1))(keys)
    rotations = [Operation('Rotate', float(angle)) for angle in range(1, degrees + 1)]
    sign = jnp.sign(drawn).astype(jnp.float32)
    unused = jnp.zeros((len(images), 2), jnp.int32)  # the center of a Cutout
    return apply_operations(images, rotations, abs(drawn) - 1, sign, unused)


def mix_neighbours(
    keys: jax.Array, images: jax.Array, targets: jax.Array, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Mixes each image with its neighbor, and their targets in the same proportion.

    The neighbor of example i is i ^ 1 (0 and 1, 2 and 3, ...), which lies on the same device; each
    of the two draws its own weight. MixUp (arXiv 1710.09412) averages the images; CutMix
    (1905.04899) pastes a box of the neighbor, of a share drawn like MixUp's weight, centered
    anywhere and cut off at the border. With both, every second pair is for CutMix.

    Args:
        keys: [N], one for each example.
        images: [N, H, W, C]; N is even, and a multiple of 4 for both kinds.
        targets: float32 [N, classes].
        mixup, cutmix: the alpha of each kind's Beta(alpha, alpha); 0: not of this kind.

    Returns:
        images, float32, and targets.

    Raises:
        UsageError: another N.
    """
    count = _check_count(images, mixup, cutmix)
    pasted = jnp.arange(count) // 2 % 2 == 1
    own, weight = _own_shares(keys, images.shape[1:3], mixup, cutmix, pasted)

    def with_neighbor(x, weight):
        neighbor = x.reshape(count // 2, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)
        return weight * x + (1 - weight) * neighbor

    images = with_neighbor(images.astype(jnp.float32), own[..., None])
    return images, with_neighbor(targets, weight[:, None])


def mix_distinct(
    keys: jax.Array, images: jax.Array, targets: jax.Array, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Makes N examples of 2N images: example i is mixed from images 2i and 2i + 1.

    As published: no image is used twice. The mixing is that of `mix_neighbours`; with both kinds,
    every second example is for CutMix.

    Args:
        keys: [2N], one for each image; those of images 2i decide.
        images: [2N, H, W, C]; N is even for both kinds.
        targets: float32 [2N, classes].
        mixup, cutmix: as in `mix_neighbours`.

    Returns:
        images, float32 [N, H, W, C], and targets [N, classes].

    Raises:
        UsageError: another number of images.
    """
    count = _check_count(images, mixup, cutmix) // 2
    pasted = jnp.arange(count) % 2 == 1
    own, weight = _own_shares(keys[::2], images.shape[1:3], mixup, cutmix, pasted)

    def blend(x, weight):
        pairs = x.reshape(count, 2, *x.shape[1:])
        return weight * pairs[:, 0] + (1 - weight) * pairs[:, 1]

    return blend(images.astype(jnp.float32), own[..., None]), blend(targets, weight[:, None])


def images_per_example(config: Mapping) -> int:
    """Returns how many images of the data one training example is made of: 1 or 2.

    Args:
        config: some of the keys of `DEFAULTS`.

    Raises:
        UsageError: an unknown key or a value out of range.
    """
    recipe = Recipe.parse(config)
    return 2 if (recipe.mixup or recipe.cutmix) and recipe.mix_pairs == 'distinct' else 1


def _check_count(images: jax.Array, mixup: float, cutmix: float) -> int:
    """Returns the number of images, or raises a UsageError if it does not split into pairs."""
    count, multiple = len(images), 4 if mixup and cutmix else 2
    if count % multiple:
        raise UsageError(
            f'augment.mixup and augment.cutmix need a multiple of {multiple} images on each '
            f'device, not {count}'
        )
    return count


def _own_shares(
    keys: jax.Array, size: tuple[int, ...], mixup: float, cutmix: float, pasted: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draws what each example keeps of its own image where another is mixed into it.

    Args:
        keys: [N].
        size: height and width.
        mixup, cutmix: as in `mix_neighbours`.
        pasted: bool [N], which examples are for CutMix if there are both kinds.

    Returns:
        The share of every pixel, float32 [N, height, width], and their mean [N].
    """
    height, width = size

    def average(key):
        weight = _symmetric_beta(key, mixup)
        return jnp.full((height, width), weight), weight

    def paste(key):
        share_key, *place_keys = jax.random.split(key, 3)
        side = jnp.sqrt(1 - _symmetric_beta(share_key, cutmix))
        covers = []
        for place_key, size in zip(place_keys, (height, width), strict=True):
            half = (side * size).astype(int) // 2
            center = jax.random.randint(place_key, (), 0, size)
            covers.append((center - half <= jnp.arange(size)) & (jnp.arange(size) < center + half))
        own = 1 - jnp.outer(covers[0], covers[1]).astype(jnp.float32)
        return own, own.mean()

    own, weight = jax.vmap(average if mixup else paste)(keys)
    if mixup and cutmix:
        boxes, weights = jax.vmap(paste)(keys)
        own = jnp.where(pasted[:, None, None], boxes, own)
        weight = jnp.where(pasted, weights, weight)
    return own, weight


def _symmetric_beta(key: jax.Array, alpha: float) -> jax.Array:
    if alpha == 1:  # uniform, and at no cost
        return jax.random.uniform(key)
    return jax.random.beta(key, alpha, alpha)


def random_erasing(keys: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Blanks a random box of some images with zeros, the mean of normalized images.

    As published (arXiv 1708.04896, variant RE-M): 2 to 40 % of the area, height / width uniform in
    0.3 to 3.3, anywhere inside the image. Of ten attempts the first box that fits is taken.

    Args:
        keys: [N], one for each image.
        images: [N, H, W, C].
        probability: that an image is erased.
    """
    height, width = images.shape[1:3]

    def erase(key, image):
        keys = jax.random.split(key, 5)
        share = jax.random.uniform(keys[1], (10,), minval=0.02, maxval=0.4)
        aspect = jax.random.uniform(keys[2], (10,), minval=0.3, maxval=1 / 0.3)
        rows = jnp.sqrt(share * height * width * aspect).astype(int)
        columns = jnp.sqrt(share * height * width / aspect).astype(int)
        fits = (rows <= height) & (columns <= width)
        first = jnp.argmax(fits)
        rows, columns = rows[first], columns[first]
        y = jnp.arange(height)[:, None] - jax.random.randint(keys[3], (), 0, height - rows + 1)
        x = jnp.arange(width) - jax.random.randint(keys[4], (), 0, width - columns + 1)
        inside = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
        inside &= fits[first] & jax.random.bernoulli(keys[0], probability)
        return jnp.where(inside[..., None], 0, image)

    return jax.vmap(erase)(keys, images)


def of_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Returns means or standard deviations of RGB for other channels: their average, or repeated.

    Args:
        values: of three channels, or of as many as wanted.
        channels: 1 gets the average, N the values in turn, as the weights of `fit_stem`.
    """
    if len(values) == channels:
        return tuple(values)
    if channels == 1:
        return (sum(values) / len(values),)
    return tuple(values[i % len(values)] for i in range(channels))


def normalize(
    images: jax.Array, mean=IMAGENET_MEAN, std=IMAGENET_STD, dtype=jnp.float32
) -> jax.Array:
    """Returns (images - mean) / std by channel, computed in float32, as `dtype`.

    Args:
        images: [N, H, W, C], uint8 or float, 0..255.
        mean, std: C values on the same scale.
    """
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return ((images.astype(jnp.float32) - mean) / std).astype(dtype)


def soft_labels(labels: jax.Array, num_classes: int, smoothing: float = 0.0) -> jax.Array:
    """Returns soft targets, float32 [N, num_classes].

    Args:
        labels: integers [N], which become one-hot, `smoothing` of each spread over all classes; or
            [N, num_classes] of 0 and 1, which become t (1 - smoothing) + smoothing / 2.
        num_classes: of the labels.
        smoothing: from 0 to below 1.
    """
    if labels.ndim == 2:  # Each class is a question of its own, with two answers.
        return labels.astype(jnp.float32) * (1 - smoothing) + smoothing / 2
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


def make_augment(
    config: Mapping,
    num_classes: int,
    *,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    dtype=jnp.float32,
) -> Callable:
    """Returns the training augmentation that `config` describes.

    Args:
        config: some of the keys of `DEFAULTS`; the others keep their defaults.
        num_classes: of the labels.
        mean, std, dtype: as in `normalize`; their length is the number of channels.

    Returns:
        augment(keys, images, labels) -> (images, targets), for keys [M] of `example_keys`, uint8
        images [M, H, W, C] and M labels as of `soft_labels`: normalized images [N, H, W, C] of
        `dtype`, float32 targets [N, num_classes], where M = N * `images_per_example(config)`. It
        may be jitted; N may be one device's share of the batch.

    Raises:
        UsageError: an unknown key or a value out of range, or operations on colors of images that
            have none.
    """
    recipe = Recipe.parse(config)
    for key in ('randaugment_layers', 'autoaugment'):
        if (value := getattr(recipe, key)) and len(mean) not in (1, 3):
            raise UsageError(
                f'augment.{key}={value}: is for images of 1 or 3 channels, not of {len(mean)}; '
                'leave it out'
            )
    mixing = recipe.mixup, recipe.cutmix
    per_example = images_per_example(config)

    def distort(keys, images):
        if not (recipe.randaugment_layers or recipe.autoaugment):
            return images
        whole = jnp.rint(images).astype(jnp.uint8)
        if recipe.autoaugment:
            return randaugment.autoaugment(keys, whole)
        return randaugment.randaugment(
            keys, whole, recipe.randaugment_layers, recipe.randaugment_magnitude
        )

    def augment(keys, images, labels):
        targets = soft_labels(labels, num_classes, recipe.label_smoothing)
        if recipe.flip:
            images = random_flip(_own(keys, 0), images)
        if recipe.shift:
            images = random_shift_crop(_own(keys, 1), images, recipe.shift, recipe.shift_fill)
        if recipe.rotation:
            images = random_rotation(_own(keys, 5), images, recipe.rotation)
        if not recipe.mix_first:
            images = distort(_own(keys, 3), images)
        if any(mixing):
            mix = mix_distinct if per_example == 2 else mix_neighbours
            images, targets = mix(_own(keys, 2), images, targets, *mixing)
            keys = keys[::per_example]
        if recipe.mix_first:
            images = distort(_own(keys, 3), images)
        images = normalize(images, mean, std, dtype)
        if recipe.erasing:
            images = random_erasing(_own(keys, 4), images, recipe.erasing)
        return images, targets

    return augment


def _own(keys: jax.Array, operation: int) -> jax.Array:
    """Returns the keys of one operation, so that no two share their random numbers."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, operation)
