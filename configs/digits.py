"""A small NF-ResNet on handwritten digits: the main job, and its comparisons.

python -m experiments.train --config=configs/digits.py --workdir=runs/digits
"""

from experiments.config import default_config


def get_config(variant: str = 'nf'):
    config = default_config()
    config.model = {'name': 'NF-ResNet-8', 'stochdepth_rate': 0.0}
    config.data = {'name': 'digits', 'image_size': 16}
    config.augment = {'shift': 2, 'label_smoothing': 0.1}
    config.batch_size = 128
    config.duration = '40 epochs'
    config.optimizer.learning_rate = 0.2
    config.optimizer.schedule.warmup = '2 epochs'
    config.log_every = '1 epochs'
    return config
