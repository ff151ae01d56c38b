"""Fixup ResNets on ImageNet, a baseline: fixup_resnet.py:50, 101, 152, 200, 288 or 600.

    python -m experiments.train --config=configs/imagenet/fixup_resnet.py:50 --workdir=runs/fixup

The unnormalized baseline of arXiv 1901.09321 with the NFNet authors' default recipe, that of
configs/imagenet/resnet.py with stochastic depth 0.1, the default of their class. No run of this
file has been made yet. To try it anywhere: --config.smoke=true.
"""

from configs.imagenet.recipe import choose, imagenet, variants

VARIANTS = variants('Fixup-ResNet')


def get_config(variant: str = '50'):
    config = imagenet(choose('Fixup-ResNet', variant))
    config.model.stochdepth_rate = 0.1
    return config
