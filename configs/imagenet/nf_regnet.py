"""NF-RegNets on ImageNet: nf_regnet.py:B0 to B8.

    python -m experiments.train --config=configs/imagenet/nf_regnet.py:B0 --workdir=runs/B0

arXiv 2101.08692 and its authors' code: 1024 examples a step (learning rate 0.4) for 360 epochs,
MixUp and CutMix, stochastic depth 0.1 and the network's own dropout, weight decay 5e-5 for B0 and
1e-5 more with every level; no clipping. Our choice: label smoothing, the moving average of the
parameters, and the strengths of MixUp and CutMix, which are the NFNets'.

    network           B0    B1    B2    B3    B4    B5    B6     B7     B8
    GFLOP / picture  2.0   3.4   5.1   9.7  18.6  44.9  85.0  163.6  304.8

Operations of training are COMPUTED; their convolutions in groups of 8 channels keep no accelerator
busy, so that hours do not follow from them. No run of this file has been made yet. To try it
anywhere: --config.smoke=true, three steps of a tiny likeness on made pictures.
"""

from configs.imagenet.recipe import choose, imagenet


def get_config(variant: str = 'B0'):
    row = choose('NF-RegNet', variant)
    level = int(row.variant.removeprefix('B'))
    config = imagenet(row)
    config.batch_size = 1024
    config.duration = '360 epochs'
    config.optimizer.weight_decay = 5e-5 + level * 1e-5
    config.optimizer.clip.name = 'none'
    config.augment.mixup = 0.2
    config.augment.cutmix = 1.0
    return config
