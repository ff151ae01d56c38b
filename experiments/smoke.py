"""A recipe made tiny: three steps that run anywhere, to see that its parts fit together."""

import re
from collections.abc import Iterable, Mapping, Sequence

import haiku as hk
from ml_collections import ConfigDict

from experiments import config as schema
from experiments import experiment
from experiments.run import parallel
from nfnets_jax import models, optimizers
from nfnets_jax.weights import pretrained

IMAGE_SIZE, CLASSES, ROWS = 32, 10, 4  # Mixing takes a multiple of four examples on each device.


def shrink(config: ConfigDict) -> ConfigDict:
    """Returns the same recipe on a narrow network of two blocks, and made pictures.

    Loss, optimizer, SAM, augmentation, precision and averages are the recipe's, and so are those
    rules for groups of parameters that the small network has any for. Batch, data, weights to start
    from and all durations are not, and Weights & Biases is left out.

    Raises:
      UsageError: a field of the config that is unknown, missing or out of range.
    """
    schema.check(config)
    optimizers.check(config.optimizer, 'config.optimizer')
    config = config.copy_and_resolve_references()
    options = {name: value for name, value in config.model.items() if name not in _SIZES}
    with experiment.naming('model'):
        row = models.variant_info(config.model.name)
        optimizers.assign_groups(
            config.optimizer.groups, _parameters(config.model), key='config.optimizer.groups'
        )
    small = {
        # Two stages: the time goes into compiling, and the others are of the same block.
        'widths': tuple(max(16, width // 16) for width in row.widths[:2]),
        'depths': (1, 1),
        'width': 1.0,
        'group_size': 8,
    }
    taken = models.model_options(config.model.name)
    batch_size = ROWS * parallel.device_count() * config.accumulate
    with config.unlocked(), config.ignore_type():
        config.model = options | {name: small[name] for name in small if name in taken}
        config.init = {'weights': '', 'new_head': False}
        config.data = {
            'name': 'noise',
            'image_size': IMAGE_SIZE,
            'classes': CLASSES,
            'examples': 4 * batch_size,
        }
        config.batch_size = config.eval.batch_size = batch_size
        config.duration = '3 steps'
        config.optimizer.schedule.warmup = '1 steps'
        config.optimizer.schedule.boundaries = ('2 steps',)
        config.optimizer.groups = _deciding(
            config.optimizer.groups, pretrained.flatten(_parameters(config.model))
        )
        config.log_every = '1 steps'
        config.eval.every = config.checkpoint.every = '3 steps'
        config.wandb.project = ''
    return config


def describe(config: ConfigDict) -> str:
    """Returns the line that tells what a shrunk config is."""
    return (
        f'smoke: {config.model.name} as two narrow blocks, {config.duration} of '
        f'{config.batch_size} made pictures each; size, data, batch and durations of the config '
        'do not count'
    )


def _parameters(model: ConfigDict) -> hk.Params:
    options = model.to_dict()
    metadata = pretrained.Metadata(model=options.pop('name'), options=options, num_classes=CLASSES)
    return pretrained.variable_shapes(metadata)[0]


def _deciding(rules: Sequence[Mapping], names: Iterable[str]) -> tuple[Mapping, ...]:
    """Returns the rules that decide for any of these parameters: the first that match one."""
    kept, left = [], set(names)
    for rule in rules:
        matched = {name for name in left if re.fullmatch(rule['match'], name)}
        if matched:
            kept.append(rule)
        left -= matched
    return tuple(kept)


_SIZES = ('widths', 'depths', 'width', 'group_size')
