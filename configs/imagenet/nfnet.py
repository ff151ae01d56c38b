"""NFNets on ImageNet with the published recipe: nfnet.py:F0 to F7, and F0+ to F7+.

    python -m experiments.train --config=configs/imagenet/nfnet.py:F0 --workdir=runs/F0

arXiv 2102.06171: 4096 examples a step for 360 epochs, adaptive gradient clipping at 0.01 of all but
the classifier's weight, weight decay 2e-5, stochastic depth 0.25 and the network's own dropout,
MixUp and CutMix on half of the batch each with two images for every example, then four operations
of RandAugment at the network's own magnitude, and a moving average of the parameters, which gives
the accuracies below. Training computes in bfloat16, evaluation in float32.

    network           F0    F1    F2    F3    F4    F5    F6    F7
    top-1, %        83.6  84.7  85.1  85.7  85.9  86.0  86.5     -
    top-5, %        96.8  97.1  97.3  97.5  97.6  97.6  97.9     -
    TPU v4 hours      73   171   311   603  1043  1444  1928  2503

Accuracies are the paper's, at the test size; F6's is with SAM (configs/imagenet/sam.py), and those
of F7 and the wider F0+ to F7+ were not published. Hours are for all 128 chips, COMPUTED by
a formula, not measured; by the TPU's compiler an F0 takes 130. See docs/scaling.md, also for other
hardware and memory. No run of this file has been made yet.

On few devices a step needs --config.accumulate=N or --config.model.remat=True to fit into memory.
To try it anywhere: --config.smoke=true, three steps of a scaled-down model on synthetic images.
"""

from configs.imagenet.recipe import choose, imagenet, mix, variants

VARIANTS = variants('NFNet')


def get_config(variant: str = 'F0'):
    row = choose('NFNet', variant)
    config = imagenet(row)
    config.batch_size = 4096
    config.duration = '360 epochs'
    config.optimizer.weight_decay = 2e-5
    config.optimizer.clip.name = 'agc'
    config.optimizer.clip.clipping = 0.01
    config.ema = 0.99999
    config.precision = 'bfloat16'
    mix(config)
    config.augment.randaugment_layers = 4
    magnitude = float(row.randaugment)  # type: ignore[arg-type]  # every NFNet has one
    config.augment.randaugment_magnitude = magnitude
    return config
