"""Augmentation on the device: pure functions of (keys, images), one key for every example.

Keys come from (seed, step, position in the global batch), so what happens to a picture depends
neither on the number of devices nor on what happened to the others.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nfnets_jax.augment import randaugment
from nfnets_jax.errors import UsageError, nearest

IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)

DEFAULTS: dict[str, Any] = {
    'flip': False,  # mirror left-right, every second picture
    'shift': 0,  # crop at up to this many pixels off, in both directions
    'shift_fill': 'constant',  # what lies outside: 'constant' (black), 'edge' or 'reflect'
    # Mix images and their labels in pairs: MixUp and CutMix by weights of Beta(alpha, alpha), off
    # at 0 (published: 0.2 and 1). With both, one half of the batch each.
    'mixup': 0.0,
    'cutmix': 0.0,
    # batch: each image with its neighbour in the batch, so that it is used twice. distinct (as
    # published): a batch of B examples is mixed from 2 B images, and each is used once.
    'mix_pairs': 'batch',
    'mix_first': True,  # before RandAugment or AutoAugment (as published), or after
    'randaugment_layers': 0,  # operations on each picture; published: 4
    'randaugment_magnitude': 10.0,  # published: F0 5, F1 and F2 10, larger ones 15
    'autoaugment': False,  # ImageNet's policy v0, instead of RandAugment
    'erasing': 0.0,  # probability of blanking a random part of a picture
    'label_smoothing': 0.0,
}
_FILLS = ('constant', 'edge', 'reflect')
_PAIRS = ('batch', 'distinct')


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


def mix_neighbours(
    keys: jax.Array, images: jax.Array, targets: jax.Array, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Mixes each picture with its neighbour, and their targets in the same proportion.

    The neighbour of example i is i ^ 1 (0 and 1, 2 and 3, ...), which lies on the same device; each
    of the two draws its own weight. MixUp (arXiv 1710.09412) averages the pictures; CutMix
    (1905.04899) pastes a box of the neighbour, of a share drawn like MixUp's weight, centred
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

    def with_neighbour(x, weight):
        neighbour = x.reshape(count // 2, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)
        return weight * x + (1 - weight) * neighbour

    images = with_neighbour(images.astype(jnp.float32), own[..., None])
    return images, with_neighbour(targets, weight[:, None])


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
    options = _checked(config)
    is_mixed = options['mixup'] or options['cutmix']
    return 2 if is_mixed and options['mix_pairs'] == 'distinct' else 1


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
            centre = jax.random.randint(place_key, (), 0, size)
            covers.append((centre - half <= jnp.arange(size)) & (jnp.arange(size) < centre + half))
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
    """Blanks a random box of some pictures, with zeros: the mean, where they are normalised.

    As published (arXiv 1708.04896, variant RE-M): 2 to 40 % of the area, height / width uniform in
    0.3 to 3.3, anywhere inside the picture. Of ten attempts the first box that fits is taken.

    Args:
        keys: [N], one for each picture.
        images: [N, H, W, C].
        probability: of each picture's being touched.
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
    """Returns float32 [N, num_classes]: one-hot, `smoothing` of each spread over all classes."""
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
        mean, std, dtype: as in `normalize`.

    Returns:
        augment(keys, images, labels) -> (images, targets), for keys [M] of `example_keys`, uint8
        images [M, H, W, C] and int labels [M]: normalised images [N, H, W, C] of `dtype`, float32
        targets [N, num_classes], where M = N * `images_per_example(config)`. It may be jitted; N
        may be one device's share of the batch.

    Raises:
        UsageError: an unknown key or a value out of range.
    """
    options = _checked(config)
    mixing = options['mixup'], options['cutmix']
    per_example = images_per_example(config)

    def distort(keys, images):
        layers, magnitude = options['randaugment_layers'], options['randaugment_magnitude']
        if not (layers or options['autoaugment']):
            return images
        whole = jnp.rint(images).astype(jnp.uint8)
        if options['autoaugment']:
            return randaugment.autoaugment(keys, whole)
        return randaugment.randaugment(keys, whole, layers, magnitude)

    def augment(keys, images, labels):
        targets = soft_labels(labels, num_classes, options['label_smoothing'])
        if options['flip']:
            images = random_flip(_own(keys, 0), images)
        if options['shift']:
            images = random_shift_crop(
                _own(keys, 1), images, options['shift'], options['shift_fill']
            )
        if not options['mix_first']:
            images = distort(_own(keys, 3), images)
        if any(mixing):
            mix = mix_distinct if per_example == 2 else mix_neighbours
            images, targets = mix(_own(keys, 2), images, targets, *mixing)
            keys = keys[::per_example]
        if options['mix_first']:
            images = distort(_own(keys, 3), images)
        images = normalize(images, mean, std, dtype)
        if options['erasing']:
            images = random_erasing(_own(keys, 4), images, options['erasing'])
        return images, targets

    return augment


def _own(keys: jax.Array, operation: int) -> jax.Array:
    """Returns the keys of one operation, so that no two share their random numbers."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, operation)


def _checked(config: Mapping) -> dict:
    """Returns `DEFAULTS` overridden by `config`, or raises a UsageError."""
    for key in config:
        if key not in DEFAULTS:
            raise UsageError(f'augment.{key}: no such option{nearest(key, DEFAULTS)}')
    options = DEFAULTS | dict(config)
    for key in ('flip', 'mix_first', 'autoaugment'):
        if not isinstance(options[key], bool):
            raise UsageError(f'augment.{key}={options[key]!r}: must be True or False')
    for key, unit in (('shift', 'pixels'), ('randaugment_layers', 'operations')):
        if not _is_number(options[key], int) or options[key] < 0:
            raise UsageError(f'augment.{key}={options[key]!r}: must be {unit}, an integer >= 0')
    for key in ('mixup', 'cutmix', 'randaugment_magnitude'):
        if not _is_number(options[key]) or not 0 <= options[key] < float('inf'):
            raise UsageError(f'augment.{key}={options[key]!r}: must be a number >= 0')
    if not _is_number(options['erasing']) or not 0 <= options['erasing'] <= 1:
        raise UsageError(f'augment.erasing={options["erasing"]!r}: must be in [0, 1]')
    if not _is_number(options['label_smoothing']) or not 0 <= options['label_smoothing'] < 1:
        raise UsageError(
            f'augment.label_smoothing={options["label_smoothing"]!r}: must be in [0, 1)'
        )
    if options['shift_fill'] not in _FILLS:
        raise UsageError(
            f'augment.shift_fill={options["shift_fill"]!r}: unknown'
            f'{nearest(options["shift_fill"], _FILLS)}'
        )
    if options['mix_pairs'] not in _PAIRS:
        raise UsageError(
            f'augment.mix_pairs={options["mix_pairs"]!r}: unknown'
            f'{nearest(options["mix_pairs"], _PAIRS)}'
        )
    if options['autoaugment'] and options['randaugment_layers']:
        raise UsageError('augment.autoaugment=True: set augment.randaugment_layers=0 with it')
    return options


def _is_number(value, types=(int, float)) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)
