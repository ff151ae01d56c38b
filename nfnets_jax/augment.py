"""Augmentation on the device: pure functions of (keys, images), one key for every example.

Keys come from (seed, step, position in the global batch), so what happens to a picture depends
neither on the number of devices nor on what happened to the others.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from nfnets_jax.errors import UsageError, nearest

IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)

DEFAULTS = {
    'flip': False,  # mirror left-right, every second picture
    'shift': 0,  # crop at up to this many pixels off, in both directions
    'shift_fill': 'constant',  # what lies outside: 'constant' (black), 'edge' or 'reflect'
    'label_smoothing': 0.0,
}
_FILLS = ('constant', 'edge', 'reflect')


def example_keys(seed: int, step: jax.Array, positions: jax.Array) -> jax.Array:
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


def normalise(
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
        mean, std, dtype: as in `normalise`.

    Returns:
        augment(keys, images, labels) -> (images, targets), for keys [N] of `example_keys`, uint8
        images [N, H, W, C] and int labels [N]: normalised images of `dtype`, float32 targets
        [N, num_classes]. It may be jitted; N may be one device's share of the batch.

    Raises:
        UsageError: an unknown key or a value out of range.
    """
    options = _checked(config)

    def augment(keys, images, labels):
        if options['flip']:
            images = random_flip(_own(keys, 0), images)
        if options['shift']:
            images = random_shift_crop(
                _own(keys, 1), images, options['shift'], options['shift_fill']
            )
        targets = soft_labels(labels, num_classes, options['label_smoothing'])
        return normalise(images, mean, std, dtype), targets

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
    if not isinstance(options['flip'], bool):
        raise UsageError(f'augment.flip={options["flip"]!r}: must be True or False')
    if not isinstance(options['shift'], int) or options['shift'] < 0:
        raise UsageError(f'augment.shift={options["shift"]!r}: must be pixels, an integer >= 0')
    if options['shift_fill'] not in _FILLS:
        raise UsageError(
            f'augment.shift_fill={options["shift_fill"]!r}: unknown'
            f'{nearest(options["shift_fill"], _FILLS)}'
        )
    if not 0 <= options['label_smoothing'] < 1:
        raise UsageError(f'augment.label_smoothing={options["label_smoothing"]}: must be in [0, 1)')
    return options
