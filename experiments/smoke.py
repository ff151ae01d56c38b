"""A recipe made tiny: three steps that run anywhere, to see that its parts fit together."""

import jax
from ml_collections import ConfigDict

from experiments import config as experiment
from nfnets_jax import models

IMAGE_SIZE, CLASSES, ROWS = 32, 10, 4  # Mixing takes a multiple of four examples on each device.


def shrink(config: ConfigDict) -> ConfigDict:
    """Returns the same recipe on a narrow network of two blocks, and made pictures.

    Loss, optimizer, clipping groups, SAM, augmentation, precision and averages are the recipe's.

    Raises:
      UsageError: a field of the config that is unknown, missing or out of range.
    """
    experiment.check(config)
    config = config.copy_and_resolve_references()
    options = {name: value for name, value in config.model.items() if name not in _SIZES}
    row = models.variant_info(config.model.name)
    small = {
        # Two stages: the time goes into compiling, and the others are of the same block.
        'widths': tuple(max(16, width // 16) for width in row.widths[:2]),
        'depths': (1, 1),
        'width': 1.0,
        'group_size': 8,
    }
    taken = models.model_options(config.model.name)
    batch_size = ROWS * jax.device_count() * config.accumulate
    with config.unlocked(), config.ignore_type():
        config.model = options | {name: small[name] for name in small if name in taken}
        config.init = {'weights': '', 'new_head': False}
        config.data = {
            'name': 'noise',
            'image_size': IMAGE_SIZE,
            'classes': CLASSES,
            'examples': 4 * batch_size,
        }
        config.batch_size = config.eval.batch_size = batch_size
        config.duration = '3 steps'
        config.optimizer.schedule.warmup = '1 steps'
        config.log_every = '1 steps'
        config.eval.every = config.checkpoint.every = '3 steps'
    return config


_SIZES = ('widths', 'depths', 'width', 'group_size')
