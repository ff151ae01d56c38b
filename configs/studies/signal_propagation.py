"""How does the signal propagate through a network at initialization?

    python -m experiments.study --config=configs/studies/signal_propagation.py:digits --workdir=S

Sizes: digits (20 layers at 16 pixels), cifar10 (56 layers at 32 pixels), imagenet (NF-ResNet-50 at
224 pixels). Nothing is trained: noise passes through networks with initial weights.
"""

from configs.studies.settings import arm, batch_norm, chart, claim, new_study, no_norm

_SIZES = {
    'digits': ('NF-ResNet-20', 16, 32),
    'cifar10': ('NF-ResNet-56', 32, 32),
    'imagenet': ('NF-ResNet-50', 224, 8),
}

VARIANTS = tuple(_SIZES)


def get_config(size: str = 'digits'):
    study = new_study('signal_propagation', size, VARIANTS)
    name, pixels, batch_size = _SIZES[size]
    study.title = 'Signal propagation at initialisation'
    study.question = (
        'Do the variance and the mean of the channels stay what they are from block to block, '
        'with batch norm, without, and in a Normalizer-Free network?'
    )
    study.setting = f'{name} and its relatives; unit Gaussian noise of {pixels} pixels'
    study.measure = ('signal_propagation',)
    study.metric, study.higher_is_better, study.chance = 'signal/avg_var_decades', False, 0.0
    study.tuned = ()
    study.base.model = {'name': name}
    study.base.data = {'name': 'noise', 'image_size': pixels}
    study.base.batch_size = batch_size
    study.axes = {'alpha': 'model.alpha', 'seed': 'seed'}
    skipinit = {'model': {'name': name.replace('NF-', 'SkipInit-')}}
    study.arms = (
        arm('bn', 'ResNet with batch norm', {'model': batch_norm(study)}),
        arm('plain', 'ResNet without norm', {'model': no_norm(study)}),
        arm('skipinit', 'SkipInit-ResNet, its gains at 1', skipinit),
        arm('nf', 'NF-ResNet', alpha=(0.1, 0.2, 0.5, 1.0)),
        # Ablations: one part removed at a time.
        arm('nf_no_ws', 'NF-ResNet, weights not standardised', _without('standardize')),
        arm('nf_no_gamma', 'NF-ResNet, activations without gamma', _without('activation_gain')),
        arm('nf_no_beta', 'NF-ResNet, beta fixed to 1', _without('downscale')),
    )
    study.claims = (
        claim(
            'Without normalisation the variance grows from block to block.',
            'NF-ResNets paper',
            better={'arm': 'plain'},
            worse={'arm': 'bn'},
        ),
        claim(
            'In an NF-ResNet it grows less: expected is (1 + blocks in a stage x alpha^2).',
            'NF-ResNets paper',
            better={'arm': 'plain'},
            worse={'arm': 'nf', 'alpha': 0.2},
        ),
        claim(
            'Without weight standardisation the means of the channels run away.',
            'NF-ResNets paper',
            better={'arm': 'nf_no_ws'},
            worse={'arm': 'nf', 'alpha': 0.2},
            metric='signal/avg_sq_mean',
        ),
        claim(
            'Without gamma the branches lose variance.',
            'NF-ResNets paper',
            better={'arm': 'nf', 'alpha': 0.2},
            worse={'arm': 'nf_no_gamma'},
            metric='signal/res_avg_var',
        ),
        claim(
            'With beta fixed to 1 the branches are stronger, by the variance of their input.',
            'NF-ResNets paper',
            better={'arm': 'nf_no_beta'},
            worse={'arm': 'nf', 'alpha': 0.2},
            metric='signal/res_avg_var',
        ),
    )
    block = {'x': 'step', 'x_label': 'block'}
    study.charts = (
        chart('curves', 'Variance of a channel', y='signal/avg_var', log_y=True, **block),
        chart('curves', 'Squared mean of a channel', y='signal/avg_sq_mean', log_y=True, **block),
        chart('curves', 'Variance of the branch', y='signal/res_avg_var', log_y=True, **block),
        chart(
            'curves',
            'Variance of a channel, by alpha',
            y='signal/avg_var',
            series='alpha',
            where={'arm': 'nf'},
            log_y=True,
            **block,
        ),
        chart(
            'table',
            'Powers of ten between the largest variance and the least',
            x='alpha',
            y='signal/avg_var_decades',
        ),
    )
    return study


def _without(part: str) -> dict:
    return {'model': {part: False}}
