"""NFNets on ImageNet with sharpness-aware minimization: sam.py:F0 to F7, and F0+ to F7+.

    python -m experiments.train --config=configs/imagenet/sam.py:F5 --workdir=runs/F5-sam

The recipe of configs/imagenet/nfnet.py with the gradient taken after an ascent of rho = 0.05, which
each device computes on a fifth of its own examples (arXiv 2010.01412 and 2102.06171).

    network                F5          F6
    top-1 / top-5, %   86.3 / 97.9  86.5 / 97.9      published; F5 without SAM 86.0 / 97.6

A step takes a fifth more operations; the paper reports 20 to 40 % more time. No run of this file
has been made yet. To try it anywhere: --config.smoke=true.
"""

from configs.imagenet import nfnet

VARIANTS = nfnet.VARIANTS


def get_config(variant: str = 'F5'):
    config = nfnet.get_config(variant)
    config.sam = {'rho': 0.05, 'ascent_fraction': 0.2}
    return config
