"""A small Normalizer-Free ResNet on handwritten digits, with two baselines.

    python -m experiments.train --config=configs/digits.py --workdir=runs/digits

NF-ResNet-8 (8 layers, 78,045 parameters) with adaptive gradient clipping, on the 1797 digits that
scikit-learn carries, enlarged to 16x16 pixels: 1442 for training, 355 for testing. It takes half a
minute on two CPU cores, with compilation. Test top-1 of seeds 0, 1 and 2, the same for raw and
averaged parameters:

    configs/digits.py          NF-ResNet with AGC             99.72  99.15  99.44 %
    configs/digits.py:resnet   ResNet-8 with batch norm       99.72  99.44  98.87 %
    configs/digits.py:no_agc   NF-ResNet without clipping     10.14 %, not finite at steps 115, 99

One test image is 0.28 %, so the first two do not differ. The last shows the use of clipping: at
this learning rate the same network diverges without it.
"""

from experiments.config import default_config
from nfnets_jax.errors import UsageError, nearest

VARIANTS = ('nf', 'resnet', 'no_agc')


def get_config(variant: str = 'nf'):
    if variant not in VARIANTS:
        raise UsageError(f'no variant {variant!r}{nearest(variant, VARIANTS)}')
    config = default_config()
    config.model = {'name': 'NF-ResNet-8'}
    config.data.image_size = 16
    config.augment.shift = 2
    config.augment.label_smoothing = 0.1
    config.batch_size = 64
    config.duration = '40 epochs'
    config.optimizer.learning_rate = 2.0  # of a batch of 256, as everywhere: 0.5 here
    config.optimizer.schedule.warmup = '5%'
    config.optimizer.weight_decay = 5e-5
    config.optimizer.clip.clipping = 0.04
    config.log_every = '1 epochs'
    if variant == 'resnet':
        config.model = {'name': 'ResNet-8', 'cross_replica_axis': 'devices'}
        config.optimizer.learning_rate = 0.4
        config.optimizer.clip.name = 'none'
    elif variant == 'no_agc':
        config.optimizer.clip.name = 'none'
    return config
