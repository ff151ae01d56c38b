"""What are the benefits of batch norm?

    python -m experiments.study --config=configs/studies/bn_benefits.py:digits --workdir=S

Sizes: digits, cifar10_small, cifar10. The small CNN of the report's experiment A and a ResNet, as
in its experiment B, with and without batch norm, trained by Adam at learning rates up to 1e-1. At
cifar10 the small CNN alone: `resnet_without_norm` has the ResNet-20. The report trained it with
plateau decay: --config.base.optimizer.schedule.name=plateau.
"""

from configs.studies.settings import (
    OURS,
    REPORT_A,
    REPORT_B,
    RESNET_WORDS,
    arm,
    batch_norm,
    chart,
    claim,
    new_study,
    no_norm,
)

VARIANTS = tuple(RESNET_WORDS)


def get_config(size: str = 'digits'):
    study = new_study('bn_benefits', size, VARIANTS, RESNET_WORDS)
    study.title = 'What batch norm buys'
    study.question = (
        'How much better is a network with batch norm, and over how wide a range of learning rates?'
    )
    cnn_words = 'the small CNN of the report (37,322 parameters)'
    if size == 'cifar10':
        study.setting = study.setting.replace(RESNET_WORDS[size], cnn_words)
    else:
        study.setting += f', or {cnn_words}'
    optimizer = study.base.optimizer
    optimizer.name, optimizer.scale_lr_by_batch, optimizer.weight_decay = 'adam', False, 0.0
    optimizer.schedule.warmup = '0%'
    study.base.optimizer.clip.name = 'none'
    study.base.batch_size = 64
    cnn: dict[str, dict | str] = {'model': {'name': 'SmallCNN', 'norm': 'none'}}
    if size == 'digits':
        cnn |= {'data': {'image_size': 16}, 'augment': {'shift': 2}}  # It needs 16 pixels.
    if size == 'cifar10_small':  # An image costs over ten times as much as with the others.
        cnn |= {'duration': '0.5 epochs', 'eval': {'every': '50%'}}
        study.setting += ', half an epoch'
    cnn_bn = cnn | {'model': {'name': 'SmallCNN', 'cross_replica_axis': 'devices'}}
    study.arms = (
        arm('cnn', 'small CNN', cnn),
        arm('cnn_bn', 'small CNN with batch norm', cnn_bn),
    )
    if size != 'cifar10':
        study.arms += (
            arm('resnet', 'ResNet without norm', {'model': no_norm(study)}),
            arm('resnet_bn', 'ResNet with batch norm', {'model': batch_norm(study)}),
        )
    study.grid.learning_rate = (1e-4, 1e-3, 1e-2, 1e-1)
    study.claims = (
        claim(
            'At learning rate 0.01 the small CNN trains with batch norm and not at all without '
            '(75.6 against 10.0 %).',
            'report A, Adam',
            better={'arm': 'cnn_bn', 'learning_rate': 1e-2},
            worse={'arm': 'cnn', 'learning_rate': 1e-2},
            margin=0.1,
            scope=REPORT_A,
        ),
        claim(
            'Each at its best learning rate, the small CNN is better with batch norm.',
            OURS,
            better={'arm': 'cnn_bn'},
            worse={'arm': 'cnn'},
        ),
    )
    if size != 'cifar10':
        study.claims += (
            claim(
                'A ResNet is better with batch norm (ResNet-20, batch 256: 83.3 against 74.8 %).',
                'report B, Adam 1e-3',
                better={'arm': 'resnet_bn', 'learning_rate': 1e-3},
                worse={'arm': 'resnet', 'learning_rate': 1e-3},
                scope=REPORT_B,
            ),
            claim(
                'Each at its best learning rate, a ResNet is better with batch norm.',
                OURS,
                better={'arm': 'resnet_bn'},
                worse={'arm': 'resnet'},
            ),
        )
    study.charts = (
        chart('line', 'Test top-1 over the learning rate', x='learning_rate', log_x=True),
        chart('curves', 'Training loss', x='step', y='train/loss', log_y=True),
        chart('curves', 'Validation top-1 in training', x='step', y='validation/top1'),
        chart('table', 'Test top-1 in figures', x='learning_rate'),
    )
    return study
