"""What does fine-tuning an NFNet gain with few images?

    python -m experiments.study --config=configs/studies/finetune.py:digits --workdir=S
    python -m experiments.study --config=configs/studies/finetune.py:caltech101_small --workdir=S \\
        --config.pretrain.data.path=cifar10.npz --config.base.data.path=caltech101_32.npz
    python -m experiments.study --config=configs/studies/finetune.py:caltech101 --workdir=S \\
        --config.base.data.path=DIR --config.base.init.weights=F0_haiku.npz

Sizes: digits, which first trains a small NFNet on the digits 0 to 4 and then fine-tunes it on ten
images each of 5 to 9; caltech101_small, which trains it on CIFAR-10 and fine-tunes it on
Caltech-101 at 32 pixels; caltech101, NFNet-F0 from the published weights (docs/pretrained.md).
"""

from ml_collections import ConfigDict

from configs.finetune import head_only
from configs.studies.settings import OURS, arm, chart, claim, new_study
from experiments.study.config import PRETRAINED

_NARROW = {
    'name': 'NFNet-F0',
    'widths': (16, 32, 64, 64),
    'depths': (1, 1, 1, 1),
    'group_size': 8,
    'drop_rate': 0.0,
    'stochdepth_rate': 0.0,
}
_NETWORKS = {
    'digits': 'NFNet of 4 blocks, trained on the 8x8 digits 0 to 4; then on 5 to 9, '
    'ten images each to train on and ten to validate',
    'caltech101_small': 'NFNet of 4 blocks of 32 to 128 channels, trained on CIFAR-10 for ten '
    'epochs',
    'caltech101': 'NFNet-F0 at 192 pixels with SAM',
}

_RATES = {
    'digits': (0.4, 1.6, 6.4, 25.6),
    'caltech101_small': (0.1, 0.4, 1.6, 6.4),
    'caltech101': (0.1, 0.4, 1.6),
}

VARIANTS = tuple(_NETWORKS)


def get_config(size: str = 'digits'):
    study = new_study('finetune', size, VARIANTS, _NETWORKS)
    study.title = 'An NFNet, fine-tuned'
    study.question = (
        'How much better is an NFNet that starts from trained weights than one that starts from '
        'nothing, and does it need more than a new head?'
    )
    study.base.init.new_head = True
    if size == 'digits':
        study.base.model = _NARROW | {'stem': 'small'}
        study.base.data.image_size = 8
        study.pretrain = ConfigDict(study.base.to_dict())
        study.pretrain.data.classes = tuple(range(5))
        study.pretrain.duration = '20 epochs'
        study.base.data.classes = tuple(range(5, 10))
        study.base.data.per_class = 20
        study.base.data.validation_fraction = 0.5
        study.base.batch_size = 48
        study.base.duration = '40 epochs'
        study.base.init.weights = PRETRAINED
        study.chance = 0.2
        study.setting = _NETWORKS[size]  # It also describes the data, which differ here.
    elif size == 'caltech101_small':
        wide = {'widths': (32, 64, 128, 128), 'stem_width': 32}
        study.base.model = _NARROW | wide
        study.pretrain = ConfigDict(study.base.to_dict())
        study.pretrain.duration = '10 epochs'
        study.base.init.weights = PRETRAINED
    else:
        study.base.model = {'name': 'NFNet-F0', 'drop_rate': 0.25, 'stochdepth_rate': 0.1}
        study.base.data.image_size, study.base.data.test_image_size = 192, 256
        study.base.duration = '20 epochs'
        study.base.sam.rho = 0.05
        study.base.sam.ascent_fraction = 0.25
        study.base.optimizer.weight_decay = 1e-5
    study.grid.learning_rate = _RATES[size]
    scratch = {'init': {'weights': '', 'new_head': False}}
    study.arms = (
        arm('scratch', 'from random weights', scratch),
        arm('finetune', 'fine-tuned'),
        arm('head', 'only the new head trained', {'optimizer': {'groups': head_only()}}),
    )
    study.claims = (
        claim(
            'Fine-tuning is better than starting from nothing.',
            OURS,
            better={'arm': 'finetune'},
            worse={'arm': 'scratch'},
        ),
        claim(
            'Training all of it is better than training the head alone.',
            OURS,
            better={'arm': 'finetune'},
            worse={'arm': 'head'},
        ),
    )
    study.charts = (
        chart('curves', 'Validation top-1 in training', x='step', y='validation/top1'),
        chart('bars', 'Test top-1', x='arm'),
        chart('line', 'Test top-1 over the learning rate', x='learning_rate', log_x=True),
        chart('table', 'Test top-1 in figures', x='learning_rate'),
    )
    return study
