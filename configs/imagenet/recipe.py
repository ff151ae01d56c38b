"""What the published ImageNet recipes have in common; the files beside this one say the rest.

ImageNet is read as docs/data.md tells, from --config.data.data_dir (~/tensorflow_datasets).
"""

from ml_collections import ConfigDict

from experiments.config import default_config
from nfnets_jax import models
from nfnets_jax.data.tfds_source import DEFAULT_DATA_DIR
from nfnets_jax.errors import UsageError, nearest


def choose(family: str, variant: str) -> models.Variant:
    """Returns the row of an ImageNet network by the argument of a config file, 'F0' or '50'."""
    rows = [models.variant_info(name) for name in models.list_models()]
    known = {row.variant: row for row in rows if row.family == family and row.stem == 'imagenet'}
    if variant not in known:
        raise UsageError(f'no {family} {variant!r}{nearest(variant, known)}')
    return known[variant]


def imagenet(row: models.Variant) -> ConfigDict:
    """Returns the recipe that all have in common, for the network of a row.

    Momentum 0.9 (Nesterov), learning rate 0.1 for every 256 examples, along a cosine after 5 epochs
    of warm-up; label smoothing 0.1; random crops and flips; the computation in bfloat16. That the
    recipe of the NFNets holds for the other families too, label smoothing, warm-up and the default
    moving average of the parameters above all, is our choice: their papers were not found to
    state it.
    """
    config = default_config()
    config.model = {'name': row.name, 'remat': False, 'scan': False}
    config.precision = 'bfloat16'
    config.data = {
        'name': 'tfds',
        'dataset': 'imagenet2012',
        'data_dir': DEFAULT_DATA_DIR,
        'image_size': row.train_size,
        'test_image_size': row.test_size,
        'test_mode': 'resize_crop_32',
    }
    config.augment.flip = True
    config.augment.label_smoothing = 0.1
    config.optimizer.schedule.warmup = '5 epochs'
    config.eval.batch_size = 2048
    config.eval.every = '5 epochs'
    config.checkpoint.every = '1 epochs'
    config.log_every = '100 steps'
    return config
