"""Normalizer-Free ResNets on ImageNet: nf_resnet.py:50, 101, 152, 200, 288 or 600.

    python -m experiments.train --config=configs/imagenet/nf_resnet.py:50 --workdir=runs/nf50

The setting of the clipping study in arXiv 2102.06171: 90 epochs of 4096 examples a step, learning
rate 1.6, adaptive gradient clipping at 0.01. Smaller batches want a larger threshold: the study
tries 0.01 to 0.16 with each of 256 to 4096. Our choice: weight decay 5e-5, label smoothing, the
moving average of the parameters, and crops and flips as the only augmentation.

    network             50   101   152   200    288    600
    GFLOP / picture   24.5  46.8  69.1  90.0  129.4  265.6
    TPU v4 hours        10    18    27    34     52    106

Costs are COMPUTED, of all 128 chips together: see docs/scaling.md. No run of
this file has been made yet. To try it anywhere: --config.smoke=true, three steps of a tiny likeness
on made pictures.
"""

from configs.imagenet.recipe import choose, imagenet


def get_config(variant: str = '50'):
    config = imagenet(choose('NF-ResNet', variant))
    config.batch_size = 4096
    config.duration = '90 epochs'
    config.optimizer.weight_decay = 5e-5
    config.optimizer.clip.clipping = 0.01
    return config
