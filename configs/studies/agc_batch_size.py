"""Which clipping factor does each batch size need?

    python -m experiments.study --config=configs/studies/agc_batch_size.py:digits --workdir=S

Sizes: digits, cifar10_small, cifar10, imagenet (the batch sizes and clipping factors of the sweep
in arXiv 2102.06171).
"""

from configs.studies.settings import REPORT_B, arm, chart, claim, new_study, no_norm

_GRIDS = {
    'digits': {
        'batch_size': (16, 128, 1024),
        'clipping': (0.01, 0.04, 0.16, 0.64),
        'learning_rate': (0.12, 0.5, 2.0, 8.0),
    },
    'cifar10_small': {
        'batch_size': (128, 512),
        'clipping': (0.01, 0.04, 0.16),
        'learning_rate': (0.1, 0.4, 1.6, 6.4),
    },
    'cifar10': {
        'batch_size': (128, 256, 1024, 4096),
        'clipping': (0.01, 0.02, 0.04, 0.08, 0.16),
        'learning_rate': (0.1, 0.4, 1.6),
    },
    'imagenet': {
        'batch_size': (256, 512, 1024, 2048, 4096),
        'clipping': (0.01, 0.02, 0.04, 0.08, 0.16),
        'learning_rate': (0.1,),
    },
}

VARIANTS = tuple(_GRIDS)


def get_config(size: str = 'digits'):
    study = new_study('agc_batch_size', size, VARIANTS)
    study.title = 'Adaptive gradient clipping: batch size and clipping factor'
    study.question = (
        'Which clipping factor does each batch size want, and does a large batch want a small one?'
    )
    study.axes.batch_size = 'batch_size'
    study.axes.clipping = 'optimizer.clip.clipping'
    study.grid = {**_GRIDS[size], 'seed': (0, 1, 2)}
    study.arms = (arm('nf_agc', 'NF-ResNet with AGC'),)
    if size == 'cifar10':
        study.arms += (arm('resnet_agc', 'ResNet without norm, AGC', {'model': no_norm(study)}),)

    small, large = study.grid.batch_size[0], study.grid.batch_size[-1]
    tight, loose = study.grid.clipping[0], study.grid.clipping[-1]
    nf = {'arm': 'nf_agc'}
    study.claims = (
        claim(
            'The largest batch wants a small clipping factor.',
            'AGC paper; report D',
            better=nf | {'batch_size': large, 'clipping': tight},
            worse=nf | {'batch_size': large, 'clipping': loose},
        ),
        claim(
            'A small batch wants a large one (0.16 and more at 128 and 256).',
            'report D',
            better=nf | {'batch_size': small, 'clipping': loose},
            worse=nf | {'batch_size': small, 'clipping': tight},
            scope=REPORT_B,
        ),
    )
    study.charts = (
        chart(
            'heatmap',
            'Test top-1 by batch size and clipping factor',
            x='batch_size',
            series='clipping',
            log_x=True,
        ),
        chart(
            'line',
            'Test top-1 over the clipping factor',
            x='clipping',
            series='batch_size',
            log_x=True,
        ),
        chart(
            'line',
            'Share of the units that are clipped, at the end',
            x='clipping',
            y='train/clipped_fraction',
            series='batch_size',
            log_x=True,
        ),
        chart('parallel', 'All trials', x='batch_size', series='batch_size'),
        chart('table', 'Test top-1 in figures', x='clipping', series='batch_size'),
    )
    return study
