"""What should adaptive gradient clipping clip, and by what unit?

    python -m experiments.study --config=configs/studies/agc_ablations.py:digits --workdir=S

Sizes: digits, cifar10_small, cifar10, imagenet (batch 4096 and learning rate 1.6 of arXiv
2102.06171). Every arm changes one part of the published choice, which clips all parameters but the
classifier's weight by output unit.
"""

from configs.studies.settings import NF_RESNET_50, NO_CLIPPING, arm, chart, claim, new_study
from nfnets_jax import models
from nfnets_jax.optimizers import PUBLISHED_GROUPS

_BATCHES = {'digits': 256, 'cifar10_small': 256, 'cifar10': 1024, 'imagenet': 4096}
_RATES = {
    'digits': (0.06, 0.25, 1.0, 4.0),
    'cifar10_small': (0.1, 0.4, 1.6, 6.4),
    'cifar10': (0.4, 1.6),
    'imagenet': (0.1,),
}
_CLIPPING = {'digits': (0.04,), 'cifar10_small': (0.01,), 'cifar10': (0.02,), 'imagenet': (0.01,)}

VARIANTS = tuple(_BATCHES)


def get_config(size: str = 'digits'):
    study = new_study('agc_ablations', size, VARIANTS)
    study.title = 'What adaptive gradient clipping has to clip'
    study.question = (
        'Is clipping by output unit better than layer by layer, and which layers need it or suffer '
        'from it, at a large batch and a high learning rate?'
    )
    study.base.batch_size = _BATCHES[size]
    study.axes.clipping = 'optimizer.clip.clipping'
    study.grid.clipping = _CLIPPING[size]
    study.grid.learning_rate = _RATES[size]
    stages = _block_names(models.variant_info(study.base.model.name).depths)
    everything = ({'match': '.*/w'}, {'match': '.*', 'decay': False})
    study.arms = (
        arm('published', 'all but the classifier, unit by unit'),
        arm('layerwise', 'layer by layer', {'optimizer': {'clip': {'unitwise': False}}}),
        arm(
            'with_classifier',
            'the classifier too',
            {'optimizer': {'groups': everything}},
        ),
        arm('without_first', 'not the first convolution', _exempt('initial_conv')),
        *(
            arm(f'without_stage_{number}', f'not stage {number}', _exempt(*blocks))
            for number, blocks in enumerate(stages, start=1)
        ),
        arm('none', 'nothing', NO_CLIPPING, clipping=_CLIPPING[size][:1]),
    )

    def worse(arm: str, text: str) -> dict:
        source = 'AGC paper'
        sides = {'better': {'arm': 'published'}, 'worse': {'arm': arm}}
        return claim(text, source, **sides, scope=NF_RESNET_50)

    study.claims = (
        worse('layerwise', 'Unit by unit is better than layer by layer.'),
        worse('with_classifier', 'The classifier is better left alone.'),
        claim(
            'The first convolution may go unclipped.',
            'AGC paper',
            better={'arm': 'without_first'},
            worse={'arm': 'published'},
            margin=0.01,
            direction='same',
            scope=NF_RESNET_50,
        ),
        *(
            worse(f'without_stage_{number}', f'Stage {number} has to be clipped.')
            for number in range(1, len(stages) + 1)
        ),
    )
    study.charts = (
        chart('bars', 'Test top-1', x='arm'),
        chart('curves', 'Training loss', x='step', y='train/loss', log_y=True),
        chart('line', 'Test top-1 over the learning rate', x='learning_rate', log_x=True),
        chart('table', 'Test top-1 in figures', x='learning_rate'),
    )
    return study


def _block_names(depths: tuple[int, ...]) -> list[list[str]]:
    """Returns the names of the residual blocks of each stage, as Haiku numbers them."""
    names = iter([f'nf_res_block_{i}' if i else 'nf_res_block' for i in range(sum(depths))])
    return [[next(names) for _ in range(depth)] for depth in depths]


def _exempt(*modules: str) -> dict:
    """Returns the change that exempts some modules of the network from clipping."""
    inside = f'[^/]+/~/(?:{"|".join(modules)})'
    rules = (
        {'match': f'{inside}(?:/.*)?/w', 'clip': False},
        {'match': f'{inside}/.*', 'clip': False, 'decay': False},
    )
    return {'optimizer': {'groups': (*rules, *PUBLISHED_GROUPS)}}
