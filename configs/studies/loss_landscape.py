"""Is the loss smoother with batch norm?

    python -m experiments.study --config=configs/studies/loss_landscape.py:digits --workdir=S

Sizes: digits, cifar10_small (the small CNN of the report, half an epoch). Every arm has the same
learning rate. The loss and its gradient are measured along the gradient at initialization and at
checkpoints, and the final loss along random directions (`loss_landscape` in
experiments/study/measurements.py).
"""

from configs.studies.settings import (
    NO_CLIPPING,
    OURS,
    arm,
    batch_norm,
    chart,
    claim,
    new_study,
    no_norm,
)

_RATES = {'digits': 0.25, 'cifar10_small': 0.1}

VARIANTS = tuple(_RATES)

# Claimed in arXiv 1805.11604 and by the report: what is greater without batch norm.
_SMOOTHER = {
    'loss_range': 'Along its gradient the loss varies less with batch norm.',
    'gradient_change': 'Along the gradient, the gradient changes less with batch norm.',
    'beta': 'The effective smoothness is better (less) with batch norm.',
}


def get_config(size: str = 'digits'):
    study = new_study('loss_landscape', size, VARIANTS)
    study.title = 'The loss around the parameters'
    study.question = (
        'Is the loss smoother with batch norm, along its gradient in training and along random '
        'directions at the end, and what of that has a Normalizer-Free network with AGC?'
    )
    study.measure = ('train', 'loss_landscape')
    study.metric, study.higher_is_better = 'landscape/loss_range', False
    study.chance, study.tuned = None, ()
    study.grid.learning_rate = (_RATES[size],)
    base = study.base
    base.batch_size, base.checkpoint.every, base.checkpoint.keep = 64, '10%', 10
    network, with_bn, without = 'ResNet', batch_norm(study), no_norm(study)
    if size == 'cifar10_small':
        network, with_bn = 'small CNN', {'name': 'SmallCNN', 'cross_replica_axis': 'devices'}
        without = {'name': 'SmallCNN', 'norm': 'none'}
        study.setting += '; for batch norm the small CNN of the report; half an epoch'
        base.duration, base.eval.every, base.checkpoint.every = '0.5 epochs', '100%', '25%'
    else:
        study.setting += ', with batch norm or without'
    study.arms = (
        arm('bn', f'{network} with batch norm', {'model': with_bn, **NO_CLIPPING}),
        arm('plain', f'{network} without norm', {'model': without, **NO_CLIPPING}),
        arm('nf_agc', 'NF-ResNet with AGC'),
    )

    def smoother(arm: str, metric: str, text: str, source: str) -> dict:
        sides = {'better': {'arm': 'plain'}, 'worse': {'arm': arm}}
        return claim(text, source, **sides, metric=f'landscape/{metric}')

    study.claims = (
        *(smoother('bn', *told, 'arXiv 1805.11604; report') for told in _SMOOTHER.items()),
        smoother(
            'bn', 'random_rise', 'Along random directions it rises less with batch norm.', OURS
        ),
    )
    if size == 'digits':  # At the other size the networks differ in more.
        text = 'The effective smoothness of a Normalizer-Free network with AGC is better, too.'
        study.claims += (smoother('nf_agc', 'beta', text, OURS),)
    far = 'distance, % of the norm of each filter'
    study.charts = (
        _curves('Range of the loss along the gradient', 'loss_range'),
        _curves('Lowest loss along the gradient', 'loss_min'),
        _curves('Highest loss along the gradient', 'loss_max'),
        _curves('Change of the gradient', 'gradient_change'),
        _curves('Effective smoothness', 'beta'),
        _curves('Loss along random directions', 'random_loss', x_label=far),
        chart('bars', 'Test top-1', x='arm'),
    )
    return study


def _curves(title: str, metric: str, **more) -> dict:
    return chart('curves', title, x='step', y=f'landscape/{metric}', log_y=True, **more)
