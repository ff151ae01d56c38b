"""What replaces batch norm in a ResNet: nothing, AGC at 0.01, or clipping by norm at 0.01?

    python -m experiments.study --config=configs/studies/resnet_without_norm.py:digits --workdir=S

Sizes: digits, cifar10_small, cifar10. The report's experiment B, ResNet-20 by Adam at 1e-3 with
batches of 256 and 1024, and the same networks by SGD with the learning rate tuned.
"""

from configs.studies.settings import (
    NO_CLIPPING,
    OURS,
    REPORT_B,
    RESNET_WORDS,
    arm,
    batch_norm,
    chart,
    claim,
    new_study,
    no_norm,
)

_BATCHES = {'digits': (64, 256), 'cifar10_small': (128, 512), 'cifar10': (256, 1024)}

VARIANTS = tuple(_BATCHES)


def get_config(size: str = 'digits'):
    study = new_study('resnet_without_norm', size, VARIANTS, RESNET_WORDS)
    study.title = 'A ResNet without batch norm'
    study.question = 'How near do AGC and clipping by norm bring a ResNet to one with batch norm?'
    study.axes.batch_size = 'batch_size'
    study.grid.batch_size = _BATCHES[size]
    # AGC of a ResNet without norm is at chance up to 1.6.
    study.grid.learning_rate = (0.1, 0.4, 1.6, 6.4)
    plain, bn = {'model': no_norm(study)}, {'model': batch_norm(study)}
    everything = {'groups': ({'match': '.*/w'}, {'match': '.*', 'decay': False})}
    kinds: tuple[tuple[str, str, dict, dict], ...] = (
        ('bn', 'batch norm', bn, NO_CLIPPING['optimizer']),
        ('none', 'no norm', plain, NO_CLIPPING['optimizer']),
        ('agc', 'AGC', plain, everything | {'clip': {'name': 'agc', 'clipping': 0.01}}),
        ('norm', 'clipping by norm', plain, {'clip': {'name': 'global_norm', 'clipping': 0.01}}),
    )
    adam = {'name': 'adam', 'scale_lr_by_batch': False, 'weight_decay': 0.0}
    study.arms = (
        *(
            arm(
                f'adam_{name}',
                f'Adam, {label}',
                of | {'optimizer': adam | clip},
                learning_rate=(1e-3,),
            )
            for name, label, of, clip in kinds
        ),
        *(arm(name, f'SGD, {label}', of | {'optimizer': clip}) for name, label, of, clip in kinds),
    )
    small, large = _BATCHES[size]

    def pair(text: str, better: str, worse: str, batch: int, source: str = OURS) -> dict:
        return claim(
            text,
            source,
            better={'arm': better, 'batch_size': batch},
            worse={'arm': worse, 'batch_size': batch},
            scope='' if source == OURS else REPORT_B,
        )

    report = 'report B, Adam 1e-3'
    study.claims = (
        pair('Batch norm helps (83.3 against 74.8 %).', 'adam_bn', 'adam_none', small, report),
        pair(
            'Clipping by norm helps (80.9 against 74.8 %).', 'adam_norm', 'adam_none', small, report
        ),
        pair('AGC does not help (72.7 against 74.8 %).', 'adam_none', 'adam_agc', small, report),
        pair('By SGD with the rate tuned batch norm helps.', 'bn', 'none', small),
        pair('By SGD clipping by norm helps.', 'norm', 'none', small),
        pair('By SGD AGC helps.', 'agc', 'none', small),
        pair('By SGD AGC helps at the larger batch.', 'agc', 'none', large),
    )
    study.charts = (
        chart('bars', f'Test top-1, batch {small}', x='arm', where={'batch_size': small}),
        chart('line', 'Test top-1 over the learning rate', x='learning_rate', log_x=True),
        chart('table', 'Test top-1 in figures', x='batch_size'),
    )
    return study
