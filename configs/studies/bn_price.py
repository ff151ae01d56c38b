"""What does batch norm cost?

    python -m experiments.study --config=configs/studies/bn_price.py:digits --workdir=S

Sizes: digits, cifar10_small, cifar10. Besides training, every trial measures how much the logits of
an image depend on the rest of its batch, the difference between training and evaluation mode
(`batch_dependence` in experiments/study/measurements.py), and the memory of a training step
(`step_memory`).
"""

from typing import Any

from configs.studies.settings import (
    NO_CLIPPING,
    OURS,
    REPORT_B,
    arm,
    batch_norm,
    chart,
    claim,
    new_study,
)

_GRIDS = {
    'digits': {'batch_size': (8, 64, 512), 'learning_rate': (0.06, 0.25, 1.0, 4.0, 16.0)},
    'cifar10_small': {'batch_size': (8, 64, 512), 'learning_rate': (0.025, 0.1, 0.4, 1.6, 6.4)},
    'cifar10': {'batch_size': (8, 32, 256, 1024), 'learning_rate': (0.1, 0.4, 1.6)},
}

VARIANTS = tuple(_GRIDS)


def get_config(size: str = 'digits'):
    study = new_study('bn_price', size, VARIANTS)
    study.title = 'What batch norm costs'
    study.question = (
        'How does accuracy with batch norm depend on the batch size, how far do the examples of a '
        'batch depend on one another, and how far is training mode from evaluation?'
    )
    study.axes.batch_size = 'batch_size'
    study.grid = {**_GRIDS[size], 'seed': (0, 1, 2)}
    study.measure = ('train', 'batch_dependence', 'step_memory')
    study.base.optimizer.clip.clipping = 0.16  # large enough not to limit small batches
    study.arms = (
        arm('bn', 'ResNet with batch norm', {'model': batch_norm(study), **NO_CLIPPING}),
        arm('nf_agc', 'NF-ResNet with AGC'),
    )
    small, *_, large = study.grid.batch_size
    study.claims = (
        claim(
            'With batch norm a small batch costs accuracy.',
            OURS,
            better={'arm': 'bn', 'batch_size': study.grid.batch_size[1]},
            worse={'arm': 'bn', 'batch_size': small},
        ),
        claim(
            'At the smallest batch the network without batch norm is better.',
            OURS,
            better={'arm': 'nf_agc', 'batch_size': small},
            worse={'arm': 'bn', 'batch_size': small},
        ),
        claim(
            'A large batch costs accuracy too (83.3 at 256, 80.1 % at 1024).',
            'report B, Adam 1e-3',
            better={'arm': 'bn', 'batch_size': study.grid.batch_size[-2]},
            worse={'arm': 'bn', 'batch_size': large},
            scope=REPORT_B,
        ),
        claim(
            'With batch norm the logits of an image depend on the rest of its batch.',
            OURS,
            better={'arm': 'bn', 'batch_size': small},
            worse={'arm': 'nf_agc', 'batch_size': small},
            metric='dependence/logit_change',
            margin=0.01,
        ),
        claim(
            'With batch norm a small batch makes evaluation worse than training mode.',
            OURS,
            better={'arm': 'bn', 'batch_size': small},
            worse={'arm': 'nf_agc', 'batch_size': small},
            metric='discrepancy/loss',
        ),
        claim(
            'With batch norm a training step of the largest batch takes more memory.',
            OURS,
            better={'arm': 'bn', 'batch_size': large},
            worse={'arm': 'nf_agc', 'batch_size': large},
            metric='memory/step_mib',
        ),
    )
    over_batch: dict[str, Any] = {'x': 'batch_size', 'log_x': True}
    study.charts = (
        chart('line', 'Test top-1 over the batch size', **over_batch),
        chart(
            'line',
            'How far a logit changes with the rest of the batch, by its spread over images',
            y='dependence/logit_change',
            **over_batch,
        ),
        chart(
            'line',
            'Evaluation loss less training-mode loss, same images',
            y='discrepancy/loss',
            **over_batch,
        ),
        chart(
            'line',
            'Memory of a training step, MiB',
            y='memory/step_mib',
            log_y=True,
            **over_batch,
        ),
        chart('table', 'Test top-1 in figures', x='batch_size'),
    )
    return study
