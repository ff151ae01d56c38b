"""RandAugment and AutoAugment on the device.

Operations, magnitudes and policy are those of the papers (AutoAugment, arXiv 1805.09501;
RandAugment, 1909.13719), as used to train the NFNets.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from nfnets_jax.augment.operations import OPERATIONS, Operation, apply_operations

# Published limits in pixels, and the smallest image size they were published for. They shrink in
# proportion for smaller images (at 32 pixels, Cutout would leave nothing).
_RANDAUGMENT_REACH = {'translate': 100, 'cutout': 40}
_AUTOAUGMENT_REACH = {'translate': 250, 'cutout': 100}
_FULL_REACH_SIZE = 192

# AutoAugment's policy for ImageNet: pairs of (operation, probability, level).
_POLICY_V0 = (
    (('Equalize', 0.8, 1), ('ShearY', 0.8, 4)),
    (('Color', 0.4, 9), ('Equalize', 0.6, 3)),
    (('Color', 0.4, 1), ('Rotate', 0.6, 8)),
    (('Solarize', 0.8, 3), ('Equalize', 0.4, 7)),
    (('Solarize', 0.4, 2), ('Solarize', 0.6, 2)),
    (('Color', 0.2, 0), ('Equalize', 0.8, 8)),
    (('Equalize', 0.4, 8), ('SolarizeAdd', 0.8, 3)),
    (('ShearX', 0.2, 9), ('Rotate', 0.6, 8)),
    (('Color', 0.6, 1), ('Equalize', 1.0, 2)),
    (('Invert', 0.4, 9), ('Rotate', 0.6, 0)),
    (('Equalize', 1.0, 9), ('ShearY', 0.6, 3)),
    (('Color', 0.4, 7), ('Equalize', 0.6, 0)),
    (('Posterize', 0.4, 6), ('AutoContrast', 0.4, 7)),
    (('Solarize', 0.6, 8), ('Color', 0.6, 9)),
    (('Solarize', 0.2, 4), ('Rotate', 0.8, 9)),
    (('Rotate', 1.0, 7), ('TranslateY', 0.8, 9)),
    (('ShearX', 0.0, 0), ('Solarize', 0.8, 4)),
    (('ShearY', 0.8, 0), ('Color', 0.6, 4)),
    (('Color', 1.0, 0), ('Rotate', 0.6, 2)),
    (('Equalize', 0.8, 4), ('Equalize', 0.0, 8)),
    (('Equalize', 1.0, 4), ('AutoContrast', 0.6, 2)),
    (('ShearY', 0.4, 7), ('SolarizeAdd', 0.6, 7)),
    (('Posterize', 0.8, 2), ('Solarize', 0.6, 10)),
    (('Solarize', 0.6, 8), ('Equalize', 0.6, 1)),
    (('Color', 0.8, 6), ('Rotate', 0.4, 5)),
)


def published_operation(name: str, level: float, *, translate: float, cutout: float) -> Operation:
    """Returns an operation at a magnitude on the scale of AutoAugment, RandAugment and the NFNets.

    Args:
        name: one of `OPERATIONS`.
        level: magnitude, at least 0; level 10 rotates by 30 degrees.
        translate, cutout: pixels that those operations reach at level 10.
    """
    strength = level / 10
    at_ten = {'Rotate': 30, 'ShearX': 0.3, 'ShearY': 0.3}
    at_ten |= {'TranslateX': translate, 'TranslateY': translate}
    whole_at_ten = {'Solarize': 256, 'SolarizeAdd': 110, 'Cutout': cutout}
    if name in at_ten:
        return Operation(name, strength * at_ten[name])
    if name in whole_at_ten:
        return Operation(name, int(strength * whole_at_ten[name]))
    if name == 'Posterize':  # 1 and 8 bits are also the limits of TensorFlow's shift
        return Operation(name, min(max(int(strength * 4), 1), 8))
    if name in ('Brightness', 'Color', 'Contrast', 'Sharpness'):
        return Operation(name, strength * 1.8 + 0.1)
    return Operation(name)


def randaugment(keys: jax.Array, images: jax.Array, layers: int, magnitude: float) -> jax.Array:
    """Applies `layers` operations to each image, each drawn from all sixteen.

    Args:
        keys: [N], one for each image.
        images: uint8 [N, H, W, C] of 1 or 3 channels.
        layers: number of operations, applied in sequence.
        magnitude: level of all operations; see `published_operation`.

    Returns:
        uint8 [N, H, W, C].
    """
    reach = _reach(_RANDAUGMENT_REACH, images)
    operations = [published_operation(name, magnitude, **reach) for name in OPERATIONS]
    keys = _fold(keys[:, None], jnp.arange(layers))
    return _apply(keys, images, operations, _draw(keys, len(operations)))


def autoaugment(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Applies AutoAugment's ImageNet policy v0: a random one of 25 pairs to each image.

    Args:
        keys: [N], one for each image.
        images: uint8 [N, H, W, C] of 1 or 3 channels.

    Returns:
        uint8 [N, H, W, C].
    """
    reach = _reach(_AUTOAUGMENT_REACH, images)
    flat = [entry for pair in _POLICY_V0 for entry in pair]
    operations = [published_operation(name, level, **reach) for name, _, level in flat]
    probabilities = jnp.asarray([probability for _, probability, _ in flat])
    choice = 2 * _draw(keys, len(_POLICY_V0))[:, None] + jnp.arange(2)
    keys = _fold(keys[:, None], jnp.arange(1, 3))
    # Compare instead of indexing: a TPU gathers elements one by one.
    chosen = choice[..., None] == jnp.arange(len(flat))
    happens = _each(jax.random.bernoulli, keys, jnp.where(chosen, probabilities, 0).sum(-1))
    return _apply(keys, images, operations, jnp.where(happens, choice, -1))


def _apply(keys: jax.Array, images: jax.Array, operations, choice: jax.Array) -> jax.Array:
    """Applies the chosen operations in order, with random signs of warps and centers of Cutout.

    Args:
        keys: [N, L], for the draws of L operations on each image.
        images, operations, choice: as in `apply_operations`.
    """
    negative = _each(jax.random.bernoulli, _fold(keys, 0))
    sign = 1 - 2 * negative.astype(jnp.float32)
    height, width = images.shape[1:3]
    center = jnp.stack([_draw(_fold(keys, 1), height), _draw(_fold(keys, 2), width)], axis=-1)
    return apply_operations(images, operations, choice, sign, center)


def _draw(keys: jax.Array, count: int) -> jax.Array:
    """Returns an integer in [0, count) for each key, int32 of the same shape."""
    return _each(lambda key: jax.random.randint(key, (), 0, count), keys)


def _fold(keys: jax.Array, number) -> jax.Array:
    return _each(jax.random.fold_in, keys, number)


def _each(function, *arrays) -> jax.Array:
    """Applies a function to every element of the broadcast arrays."""
    same_shape = jnp.broadcast_arrays(*arrays)
    return jax.vmap(function)(*(x.ravel() for x in same_shape)).reshape(same_shape[0].shape)


def _reach(published: Mapping[str, float], images: jax.Array) -> dict[str, float]:
    scale = min(1.0, min(images.shape[1:3]) / _FULL_REACH_SIZE)
    return {name: pixels * scale for name, pixels in published.items()}
