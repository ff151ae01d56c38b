"""Batch-normalized ResNets on ImageNet, a baseline: resnet.py:50, 101, 152, 200, 288 or 600.

    python -m experiments.train --config=configs/imagenet/resnet.py:50 --workdir=runs/50

The recipe of the authors' code: 90 epochs of 1024 examples a step, learning rate 0.1 for every 256,
weight decay 1e-4, label smoothing 0.1, crops and flips; no dropout, stochastic depth or moving
average; pre-activation, with batch statistics of each device's own examples; float32. Costs equal
the NF-ResNets', which have the same convolutions. No run of this file has been made yet. To try it
anywhere: --config.smoke=true.
"""

from configs.imagenet.recipe import choose, imagenet, variants

VARIANTS = variants('ResNet')


def get_config(variant: str = '50'):
    return imagenet(choose('ResNet', variant))
