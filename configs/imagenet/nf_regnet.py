"""NF-RegNets on ImageNet: nf_regnet.py:B0 to B8.

    python -m experiments.train --config=configs/imagenet/nf_regnet.py:B0 --workdir=runs/B0

The recipe of the authors' code (arXiv 2101.08692): 360 epochs of 1024 examples a step, learning
rate 0.4 along a cosine to 0.001, weight decay 5e-5 for B0 and 1e-5 more with every level, MixUp and
CutMix on half of the batch each, label smoothing 0.1, stochastic depth 0.1 and the network's own
dropout, moving average 0.99999; no clipping; float32. The code ends at B5: the weight decay of B6
to B8 is extrapolated.

    network           B0    B1    B2    B3    B4    B5    B6     B7     B8
    GFLOP / image    2.0   3.4   5.1   9.7  18.6  44.9  85.0  163.6  304.8

Operations of training are COMPUTED. Convolutions in groups of 8 channels do not keep an accelerator
busy, so hours do not follow from them. No run of this file has been made yet. To try it anywhere:
--config.smoke=true, three steps of a scaled-down model on synthetic images.
"""

from configs.imagenet.recipe import choose, imagenet, mix, variants

VARIANTS = variants('NF-RegNet')


def get_config(variant: str = 'B0'):
    row = choose('NF-RegNet', variant)
    level = int(row.variant.removeprefix('B'))
    config = imagenet(row)
    config.duration = '360 epochs'
    config.optimizer.learning_rate = 0.4
    config.optimizer.scale_lr_by_batch = False
    config.optimizer.schedule.end_value = 0.001
    config.optimizer.weight_decay = 5e-5 + level * 1e-5
    config.ema = 0.99999
    mix(config)
    return config
