"""Do dropout and stochastic depth give a Normalizer-Free ResNet the regularization of batch norm?

    python -m experiments.study --config=configs/studies/regularization.py:digits --workdir=S

Sizes: digits, cifar10_small, cifar10. Every arm has the same rates, so that only the regularization
differs.
"""

from configs.studies.settings import NO_CLIPPING, OURS, arm, batch_norm, chart, claim, new_study

_BATCHES = {'digits': 64, 'cifar10_small': 128, 'cifar10': 256}
_RATES = {
    'digits': (0.25, 1.0, 4.0),
    'cifar10_small': (0.1, 0.4, 1.6, 6.4),
    'cifar10': (0.1, 0.4, 1.6),
}

VARIANTS = tuple(_RATES)


def get_config(size: str = 'digits'):
    study = new_study('regularization', size, VARIANTS)
    study.title = 'The regularization of batch norm, and what replaces it'
    study.question = (
        'Is a network with batch norm better on test images because it is regularized, and do '
        'dropout and stochastic depth make up for that without batch norm?'
    )
    study.base.batch_size = _BATCHES[size]
    study.grid.learning_rate = _RATES[size]
    study.arms = (
        arm('bn', 'ResNet with batch norm', {'model': batch_norm(study), **NO_CLIPPING}),
        arm('nf_agc', 'NF-ResNet with AGC'),
        arm('dropout', 'NF-ResNet with AGC, dropout 0.2', {'model': {'drop_rate': 0.2}}),
        arm('depth', 'NF-ResNet with AGC, depth 0.1', {'model': {'stochdepth_rate': 0.1}}),
    )

    def better(arm: str, than: str, text: str, **more) -> dict:
        return claim(text, OURS, better={'arm': arm}, worse={'arm': than}, **more)

    study.claims = (
        better('bn', 'nf_agc', 'Batch norm is better on test images.'),
        better('dropout', 'nf_agc', 'Dropout helps without batch norm.'),
        better('depth', 'nf_agc', 'Stochastic depth helps without batch norm.'),
        better(
            'bn',
            'nf_agc',
            'Batch norm leaves a greater training loss, each at its best rate.',
            metric='train/loss',
        ),
    )
    study.charts = (
        chart('bars', 'Test top-1', x='arm'),
        chart('bars', 'Training loss at the end', x='arm', y='train/loss'),
        chart('line', 'Test top-1 over the learning rate', x='learning_rate', log_x=True),
        chart('table', 'Test top-1 in figures', x='learning_rate'),
    )
    return study
