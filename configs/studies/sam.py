"""What does sharpness-aware minimization add to AGC, and what does a cheaper ascent lose?

    python -m experiments.study --config=configs/studies/sam.py:digits --workdir=S

Sizes: digits, cifar10_small, cifar10.
"""

from configs.studies.settings import NO_CLIPPING, OURS, arm, batch_norm, chart, claim, new_study

_RATES = {'digits': (0.5, 2.0, 8.0), 'cifar10_small': (0.4, 1.6, 6.4), 'cifar10': (0.2, 0.4)}
# Of the digits the best rate is larger without batch norm, and so with AGC.
_BN_RATES = _RATES | {'digits': (0.06, 0.25, 1.0)}

VARIANTS = tuple(_RATES)


def get_config(size: str = 'digits'):
    study = new_study('sam', size, VARIANTS)
    study.title = 'Sharpness-aware minimisation, on and off'
    study.question = (
        'Does SAM make a network without batch norm generalise better, and is an ascent by a fifth '
        'of the batch, as for NFNets, as good as one by all of it?'
    )
    study.base.batch_size = 128
    if size == 'digits':
        study.base.duration = '20 epochs'
    study.grid.learning_rate = _RATES[size]
    bn = {'model': batch_norm(study), **NO_CLIPPING}
    whole, fifth = {'rho': 0.05}, {'rho': 0.05, 'ascent_fraction': 0.2}
    study.arms = (
        arm('nf_agc', 'NF-ResNet with AGC'),
        arm('nf_agc_sam', 'NF-ResNet with AGC and SAM', {'sam': whole}),
        arm('nf_agc_sam_20', 'NF-ResNet with AGC and SAM, ascent by 20 %', {'sam': fifth}),
        arm('bn', 'ResNet with batch norm', bn, learning_rate=_BN_RATES[size]),
        arm(
            'bn_sam',
            'ResNet with batch norm and SAM',
            bn | {'sam': whole},
            learning_rate=_BN_RATES[size],
        ),
    )
    study.claims = (
        claim(
            'SAM improves a Normalizer-Free network (NFNet-F5: 86.3 with, 86.0 % without).',
            'AGC paper',
            better={'arm': 'nf_agc_sam'},
            worse={'arm': 'nf_agc'},
            scope='NFNet-F5, ImageNet, 360 epochs',
        ),
        claim(
            'An ascent by 20 % of the batch is as good (here: the same to within 1 point).',
            OURS,
            better={'arm': 'nf_agc_sam_20'},
            worse={'arm': 'nf_agc_sam'},
            margin=0.01,
            direction='same',
        ),
        claim(
            'SAM improves a batch-normalised network.',
            OURS,
            better={'arm': 'bn_sam'},
            worse={'arm': 'bn'},
        ),
    )
    study.charts = (
        chart('bars', 'Test top-1', x='arm'),
        chart('curves', 'Validation loss in training', x='step', y='validation/loss'),
        chart('bars', 'Test loss at the end', x='arm', y='test/loss'),
        chart('table', 'Test top-1 in figures', x='learning_rate'),
    )
    return study
