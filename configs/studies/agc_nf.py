"""Does adaptive gradient clipping give a Normalizer-Free ResNet what batch norm gives a ResNet?

    python -m experiments.study --config=configs/studies/agc_nf.py:digits --workdir=S

Sizes: digits, cifar10_small, cifar10, imagenet (arXiv 2102.06171). The arm plain_adam_agc is the
report's: AGC of every tensor, also the classifier's, and then Adam, which divides each gradient by
its own size and so undoes the clipping.
"""

from configs.studies.settings import (
    NF_RESNET_50,
    NFNET_F0,
    NO_CLIPPING,
    OURS,
    REPORT_B,
    arm,
    batch_norm,
    chart,
    claim,
    new_study,
    no_norm,
)

_GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    'digits': {'batch_size': (16, 128, 1024), 'learning_rate': (0.06, 0.25, 1.0, 4.0, 16.0)},
    'cifar10_small': {'batch_size': (32, 128, 512), 'learning_rate': (0.025, 0.1, 0.4, 1.6)},
    'cifar10': {'batch_size': (128, 256, 1024, 4096), 'learning_rate': (0.1, 0.4, 1.6)},
    'imagenet': {'batch_size': (256, 1024, 4096), 'learning_rate': (0.05, 0.1, 0.2)},
}
_CLIPPING = {
    'digits': (0.04, 0.16, 0.64),
    'cifar10_small': (0.01, 0.04),
    'cifar10': (0.02, 0.16),
    'imagenet': (0.01, 0.04, 0.16),
}

# The factor of the claims: a tuned one would give the arm with AGC the larger grid.
_FACTOR = {'digits': 0.16, 'cifar10_small': 0.04, 'cifar10': 0.02, 'imagenet': 0.01}

# Variants of cifar10: 1760 updates, as many as ten epochs at 256 have, at every batch size; and two
# layers of RandAugment at magnitude 5.
_OF_CIFAR10 = ('cifar10_updates', 'cifar10_randaugment')

VARIANTS = (*_GRIDS, *_OF_CIFAR10)


def get_config(size: str = 'digits'):
    base = 'cifar10' if size in _OF_CIFAR10 else size
    study = new_study('agc_nf', base, tuple(_GRIDS))
    study.size = size
    if size == 'cifar10_updates':
        study.base.duration = '1760 steps'
    if size == 'cifar10_randaugment':
        study.base.augment.randaugment_layers = 2
        study.base.augment.randaugment_magnitude = 5.0
        study.setting += '; two layers of RandAugment at magnitude 5'
    study.title = 'Batch norm, Normalizer-Free, and Normalizer-Free with AGC'
    study.question = (
        'Does an NF-ResNet train at every batch size as a batch-normalised ResNet does, '
        'and what part has adaptive gradient clipping in that?'
    )
    study.axes.batch_size = 'batch_size'
    study.axes.clipping = 'optimizer.clip.clipping'
    study.grid = {**_GRIDS[base], 'seed': (0, 1, 2)}
    study.tuned = ('learning_rate', 'clipping')
    batches = study.grid.batch_size
    study.arms = (
        arm('bn', 'ResNet with batch norm', {'model': batch_norm(study), **NO_CLIPPING}),
        arm('nf', 'NF-ResNet', NO_CLIPPING),
        arm('nf_agc', 'NF-ResNet with AGC', clipping=_CLIPPING[base]),
    )
    if size != 'imagenet':
        adam = {'name': 'adam', 'scale_lr_by_batch': False, 'weight_decay': 0.0}
        adam['groups'] = ({'match': '.*'},)  # also the classifier's weight
        plain = {'model': no_norm(study)}
        grid = {'batch_size': batches[1:-1], 'learning_rate': (1e-3, 1e-2, 1e-1)}
        study.arms += (
            arm(
                'plain_adam',
                'ResNet without norm, Adam',
                plain | {'optimizer': adam | {'clip': {'name': 'none'}}},
                **grid,
            ),
            arm(
                'plain_adam_agc',
                'ResNet without norm, AGC and then Adam',
                plain | {'optimizer': adam},
                **grid,
                clipping=(0.01,),
            ),
        )
    large, small = batches[-1], batches[0]
    agc = {'arm': 'nf_agc', 'clipping': _FACTOR[base]}
    study.claims = (
        claim(
            'At the largest batch a network with AGC is as good as one with batch norm '
            '(NFNet-F0, batch 4096: 83.6 against 83.4 %).',
            'AGC paper',
            better=agc | {'batch_size': large},
            worse={'arm': 'bn', 'batch_size': large},
            margin=0.01,
            direction='same',
            scope=NFNET_F0,
        ),
        claim(
            'At the largest batch an NF-ResNet without AGC falls behind.',
            'AGC paper',
            better=agc | {'batch_size': large},
            worse={'arm': 'nf', 'batch_size': large},
            scope=NF_RESNET_50,
        ),
        claim(
            'At the smallest batch AGC brings little (here: it is the same to within 1 point).',
            'AGC paper',
            better=agc | {'batch_size': small},
            worse={'arm': 'nf', 'batch_size': small},
            margin=0.01,
            direction='same',
            scope=NF_RESNET_50,
        ),
    )
    if size != 'imagenet':
        study.claims += (
            claim(
                'AGC at 0.01 does not help a ResNet without batch norm (72.7 against 74.8 %).',
                'report B, Adam 1e-3 after AGC, batch 256',
                better={'arm': 'plain_adam', 'batch_size': batches[1], 'learning_rate': 1e-3},
                worse={'arm': 'plain_adam_agc', 'batch_size': batches[1], 'learning_rate': 1e-3},
                scope=REPORT_B,
            ),
            claim(
                'Each at its best learning rate, a ResNet without batch norm is better '
                'without AGC.',
                OURS,
                better={'arm': 'plain_adam', 'batch_size': batches[1]},
                worse={'arm': 'plain_adam_agc', 'batch_size': batches[1]},
            ),
        )
    study.charts = (
        chart('line', 'Test top-1 over the batch size', x='batch_size', log_x=True),
        chart(
            'curves',
            f'Validation top-1 in training, batch {large}',
            x='step',
            y='validation/top1',
            where={'batch_size': large},
        ),
        chart(
            'line',
            f'Test top-1 over the learning rate, batch {large}',
            x='learning_rate',
            log_x=True,
            where={'batch_size': large},
        ),
        chart('parallel', 'All trials', x='arm'),
        chart('table', 'Test top-1 in figures', x='batch_size'),
    )
    return study
