"""How sensitive is clipping by norm to its threshold, and how sensitive is AGC?

    python -m experiments.study --config=configs/studies/clip_by_norm.py:digits --workdir=S

Sizes: digits, cifar10_small, cifar10. A ResNet without normalization, as in the report, with SGD,
whose steps are proportional to the gradient, and with the report's Adam, which divides the gradient
by its own size and so undoes any scaling of the whole gradient.
"""

from configs.studies.settings import (
    NO_CLIPPING,
    OURS,
    REPORT_B,
    RESNET_WORDS,
    arm,
    chart,
    claim,
    new_study,
    no_norm,
)

_BATCHES = {'digits': 64, 'cifar10_small': 128, 'cifar10': 256}

VARIANTS = tuple(_BATCHES)


def get_config(size: str = 'digits'):
    study = new_study('clip_by_norm', size, VARIANTS, networks=RESNET_WORDS)
    study.title = 'Clipping by norm and its threshold'
    study.question = (
        'Does clipping the norm of the gradient let a network without batch norm learn at higher '
        'rates, and how much hangs on the threshold?'
    )
    study.axes.clipping = 'optimizer.clip.clipping'
    study.base.model = no_norm(study)
    study.setting += ', without normalisation'
    study.base.batch_size = _BATCHES[size]
    study.grid.learning_rate = (0.1, 0.4, 1.6, 6.4)
    study.tuned = ('learning_rate', 'clipping')
    by_norm, not_at_all = {'clip': {'name': 'global_norm'}}, {'clip': {'name': 'none'}}
    adam = {'name': 'adam', 'scale_lr_by_batch': False, 'weight_decay': 0.0}
    adam_rates = (1e-4, 1e-3, 1e-2, 1e-1)
    study.arms = (
        arm('none', 'SGD', NO_CLIPPING),
        arm(
            'norm', 'SGD, clipped by norm', {'optimizer': by_norm}, clipping=(0.01, 0.1, 1.0, 10.0)
        ),
        arm('agc', 'SGD, AGC', clipping=(0.01, 0.04, 0.16, 0.64)),
        arm('adam', 'Adam', {'optimizer': adam | not_at_all}, learning_rate=adam_rates),
        arm(
            'adam_norm',
            'Adam, clipped by norm',
            {'optimizer': adam | by_norm},
            learning_rate=adam_rates,
            clipping=(0.01, 1.0),
        ),
    )
    study.claims = (
        claim(
            'Clipping by norm helps a ResNet without batch norm (80.9 at 0.01 against 74.8 %).',
            'report B, Adam 1e-3, batch 256',
            better={'arm': 'adam_norm', 'learning_rate': 1e-3, 'clipping': 0.01},
            worse={'arm': 'adam', 'learning_rate': 1e-3},
            margin=0.01,
            scope=REPORT_B,
        ),
        claim(
            'Adam trains the network better with clipping by norm at learning rate 0.01.',
            OURS,
            better={'arm': 'adam_norm', 'learning_rate': 1e-2, 'clipping': 1.0},
            worse={'arm': 'adam', 'learning_rate': 1e-2},
        ),
        claim(
            'By SGD, clipping by norm helps at the highest learning rate.',
            OURS,
            better={'arm': 'norm', 'learning_rate': 1.6, 'clipping': 1.0},
            worse={'arm': 'none', 'learning_rate': 1.6},
        ),
        claim(
            'Much hangs on the threshold: at 0.01 SGD is worse than at 1.',
            OURS,
            better={'arm': 'norm', 'clipping': 1.0},
            worse={'arm': 'norm', 'clipping': 0.01},
        ),
        claim(
            'Clipping by norm is better than AGC (80.9 against 72.7 %, both at 0.01 and by Adam; '
            'here by SGD, each at its best threshold).',
            'report B, batch 256',
            better={'arm': 'norm'},
            worse={'arm': 'agc'},
            scope=REPORT_B,
        ),
    )
    study.charts = (
        chart('line', 'Test top-1 over the threshold', x='clipping', log_x=True),
        chart('line', 'Test top-1 over the learning rate', x='learning_rate', log_x=True),
        chart(
            'heatmap',
            'Test top-1 of clipping by norm',
            x='learning_rate',
            series='clipping',
            where={'arm': 'norm'},
            log_x=True,
        ),
        chart(
            'heatmap',
            'Test top-1 of AGC',
            x='learning_rate',
            series='clipping',
            where={'arm': 'agc'},
            log_x=True,
        ),
        chart('parallel', 'All trials', x='arm'),
        chart('table', 'Test top-1 in figures', x='clipping'),
    )
    return study
