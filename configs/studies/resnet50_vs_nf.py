"""Is an NF-ResNet-50 better than a ResNet-50 at batch 32?

    python -m experiments.study --config=configs/studies/resnet50_vs_nf.py:digits --workdir=S

Sizes: digits and cifar10_small (a narrow network of one bottleneck block a stage), cifar10,
caltech101 (the report's, at 224 pixels: --config.base.data.path=DIR with train/ and test/). The
report has one learning rate of Adam, 2e-4, one seed, no weight decay, and a batch norm left in the
stem of its NF-ResNet. Here the rate is tuned for each arm, there are three seeds, the NF-ResNet is
trained without and with that batch norm, and a second pair of arms uses SGD with weight decay, the
NF-ResNet with AGC.
"""

from configs.studies.settings import (
    NO_CLIPPING,
    OURS,
    REPORT_C,
    arm,
    batch_norm,
    chart,
    claim,
    new_study,
)

_NARROW = {'depths': (1, 1, 1, 1), 'width': 0.25}
_SMALL_STEM = {'stem': 'small'}
_OPTIONS: dict[str, dict] = {
    'digits': _NARROW | _SMALL_STEM,
    'cifar10_small': _NARROW,
    'cifar10': _SMALL_STEM,
    'caltech101': {},
}
_NARROW_WORDS = 'networks of one bottleneck block a stage, 16 to 128 channels'
_NETWORKS = {
    'digits': _NARROW_WORDS,
    'cifar10_small': f'{_NARROW_WORDS}, with a stem that quarters the side',
    'cifar10': '50 layers with a stem for small images',
    'caltech101': 'the networks of 50 layers as published, at 224 pixels',
}

VARIANTS = tuple(_OPTIONS)


def get_config(size: str = 'digits'):
    study = new_study('resnet50_vs_nf', size, VARIANTS, _NETWORKS)
    study.title = 'ResNet-50 against NF-ResNet-50, batch 32'
    study.question = 'How much better is NF-ResNet-50 than ResNet-50 where batches are small?'
    study.base.model = {'name': 'NF-ResNet-50', **_OPTIONS[size]}
    study.base.batch_size = 32
    if size == 'digits':
        study.base.duration = '5 epochs'
    adam = {'optimizer': {'name': 'adam', 'scale_lr_by_batch': False, 'weight_decay': 0.0}}
    adam['optimizer'] |= NO_CLIPPING['optimizer']
    rates = (2e-4, 1e-3, 5e-3, 2.5e-2)
    bn = {'model': batch_norm(study)}
    stem_bn = {'model': {'stem_bn': True, 'cross_replica_axis': 'devices'}}
    study.arms = (
        arm('bn_adam', 'ResNet-50, Adam', bn | adam, learning_rate=rates),
        arm('nf_adam', 'NF-ResNet-50, Adam', adam, learning_rate=rates),
        arm(
            'nf_stem_bn_adam',
            'NF-ResNet-50, stem BN, Adam',
            stem_bn | adam,
            learning_rate=rates,
        ),
        arm('bn', 'ResNet-50, SGD', bn | NO_CLIPPING),
        arm('nf_agc', 'NF-ResNet-50, SGD with AGC'),
    )
    small = size in ('digits', 'cifar10_small')
    study.grid.learning_rate = (0.1, 0.4, 1.6, 6.4) if small else (0.1, 0.4, 1.6)
    study.base.optimizer.clip.clipping = 0.16
    study.claims = (
        claim(
            'NF-ResNet-50 is about 15 points better (here: by more than 10).',
            'report C, Adam 2e-4',
            better={'arm': 'nf_adam', 'learning_rate': 2e-4},
            worse={'arm': 'bn_adam', 'learning_rate': 2e-4},
            margin=0.1,
            scope=REPORT_C,
        ),
        claim(
            'So it is with a batch norm left in its stem, as the report has it.',
            'report C, Adam 2e-4',
            better={'arm': 'nf_stem_bn_adam', 'learning_rate': 2e-4},
            worse={'arm': 'bn_adam', 'learning_rate': 2e-4},
            margin=0.1,
            scope=REPORT_C,
        ),
        claim(
            'NF-ResNet-50 is better with Adam, each at its best learning rate.',
            OURS,
            better={'arm': 'nf_adam'},
            worse={'arm': 'bn_adam'},
        ),
        claim(
            'The batch norm left in the stem makes NF-ResNet-50 better.',
            OURS,
            better={'arm': 'nf_stem_bn_adam'},
            worse={'arm': 'nf_adam'},
        ),
        claim(
            'NF-ResNet-50 with AGC is better than ResNet-50, both by SGD.',
            OURS,
            better={'arm': 'nf_agc'},
            worse={'arm': 'bn'},
        ),
    )
    study.charts = (
        chart('curves', 'Validation top-1 in training', x='step', y='validation/top1'),
        chart('curves', 'Training loss', x='step', y='train/loss', log_y=True),
        chart('bars', 'Test top-1', x='arm'),
        chart('table', 'Test top-1 in figures', x='learning_rate'),
    )
    return study
