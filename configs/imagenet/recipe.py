"""Shared by the published ImageNet recipes in the files beside this one.

ImageNet is read from --config.data.data_dir (~/tensorflow_datasets), see docs/data.md. Deliberate
differences from the authors' runs are in docs/differences.md.
"""

from ml_collections import ConfigDict

from experiments.config import default_config
from nfnets_jax import models
from nfnets_jax.data.tfds import DEFAULT_DATA_DIR
from nfnets_jax.errors import UsageError, nearest


def choose(family: str, variant: str) -> models.Variant:
    """Returns the row of an ImageNet network by the argument of a config file, 'F0' or '50'.

    Raises:
      UsageError: no such network, or one of timm's, which have no published recipe here.
    """
    known = _networks(family)
    if variant not in known:
        raise UsageError(f'no {family} {variant!r}{nearest(variant, known)}')
    return known[variant]


def variants(family: str) -> tuple[str, ...]:
    """Returns what `choose` knows of a family."""
    return tuple(_networks(family))


def _networks(family: str) -> dict[str, models.Variant]:
    rows = [models.variant_info(name) for name in models.list_models()]
    return {
        row.variant: row
        for row in rows
        if row.family == family and row.stem == 'imagenet' and not row.base
    }


def imagenet(row: models.Variant) -> ConfigDict:
    """Returns the base recipe of the authors' code, for the network of a row.

    90 epochs of 1024 examples a step, momentum 0.9 (Nesterov), learning rate 0.1 for every 256
    examples along a cosine to 0 after 5 epochs of warm-up, weight decay 1e-4, label smoothing 0.1,
    random crops and flips; no clipping, no moving average; float32, in evaluation too. The files
    beside this one change it for their families.
    """
    config = default_config()
    config.model = {'name': row.name, 'remat': False, 'scan': False}
    config.data = {
        'name': 'tfds',
        'dataset': 'imagenet2012',
        'data_dir': DEFAULT_DATA_DIR,
        'image_size': row.train_size,
        'test_image_size': row.test_size,
        'test_mode': row.eval_mode,
    }
    config.augment.flip = True
    config.augment.label_smoothing = 0.1
    config.batch_size = 1024
    config.duration = '90 epochs'
    config.optimizer.learning_rate = 0.1
    config.optimizer.schedule.warmup = '5 epochs'
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip.name = 'none'
    config.ema = 0.0
    config.precision = 'float32'
    config.eval.precision = 'float32'
    config.eval.batch_size = 2048
    config.eval.every = '5 epochs'
    config.checkpoint.every = '1 epochs'
    config.log_every = '100 steps'
    return config


def mix(config: ConfigDict) -> None:
    """Turns MixUp and CutMix on as published: half of the batch each, with distinct pairs.

    A step of B examples reads 2 B images. Epochs count examples, as in the authors' code: 360
    epochs are 720 passes over the images.
    """
    config.augment.mixup = 0.2
    config.augment.cutmix = 1.0
    config.augment.mix_pairs = 'distinct'
