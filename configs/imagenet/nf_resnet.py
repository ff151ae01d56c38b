"""Normalizer-Free ResNets on ImageNet: nf_resnet.py:50, 101, 152, 200, 288 or 600.

    python -m experiments.train --config=configs/imagenet/nf_resnet.py:50 --workdir=runs/nf50

The default recipe of the authors' code: 90 epochs of 1024 examples a step, learning rate 0.1 for
every 256, weight decay 1e-4, label smoothing 0.1, stochastic depth 0.1, crops and flips; no
dropout, clipping or moving average; float32. A comma adds another setting, as in
nf_resnet.py:50,clipping:

    dropout   With dropout 0.25. Regularized by dropout and stochastic depth, NF-ResNets match batch
              normalization at this batch size (arXiv 2101.08692). The rate is that of the recipe
              for fine-tuning NFNets; none was found for this setting.
    clipping  The clipping study of arXiv 2102.06171: 4096 examples a step (learning rate 1.6) with
              adaptive gradient clipping at 0.01. Smaller batches need a larger threshold: the study
              tries 0.01 to 0.16 with each of 256 to 4096. What the paper leaves open is as above.

    network             50   101   152   200    288    600
    GFLOP / image     24.5  46.8  69.1  90.0  129.4  265.6

Costs are COMPUTED: see docs/scaling.md. No run of this file has been made yet. To try it anywhere:
--config.smoke=true, three steps of a scaled-down model on synthetic images.
"""

from configs.imagenet.recipe import choose, imagenet, variants
from nfnets_jax.errors import UsageError, nearest

SETTINGS = ('dropout', 'clipping')
VARIANTS = tuple(
    f'{size}{setting}'
    for size in variants('NF-ResNet')
    for setting in ('', *(f',{setting}' for setting in SETTINGS))
)


def get_config(variant: str = '50'):
    size, _, setting = variant.partition(',')
    config = imagenet(choose('NF-ResNet', size))
    config.model.stochdepth_rate = 0.1
    config.model.drop_rate = 0.0
    if setting == 'dropout':
        config.model.drop_rate = 0.25
    elif setting == 'clipping':
        config.batch_size = 4096
        config.optimizer.clip.name = 'agc'
        config.optimizer.clip.clipping = 0.01
    elif variant != size:
        raise UsageError(f'no setting {setting!r}{nearest(setting, SETTINGS)}')
    return config
