"""Batch-normalised ResNets on ImageNet, to compare with: resnet.py:50, 101, 152, 200, 288 or 600.

    python -m experiments.train --config=configs/imagenet/resnet.py:50 --workdir=runs/50

As configs/imagenet/nf_resnet.py, with batch normalisation in the place of clipping. Our choice is
what it is there, and that statistics are of each device's own examples. Costs are the NF-ResNets',
which have the same convolutions. No run of this file has been made yet. To try it anywhere:
--config.smoke=true.
"""

from configs.imagenet import nf_resnet
from configs.imagenet.recipe import choose


def get_config(variant: str = '50'):
    config = nf_resnet.get_config(variant)
    config.model.name = choose('ResNet', variant).name
    config.optimizer.clip.name = 'none'
    return config
