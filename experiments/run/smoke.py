"""Scales a recipe down to three steps that run anywhere, to check that its parts fit together."""

import re
from collections.abc import Iterable, Mapping, Sequence

import haiku as hk
from ml_collections import ConfigDict

from experiments import config as schema
from experiments.run import parallel
from nfnets_jax import models, optimizers
from nfnets_jax.weights import pretrained

IMAGE_SIZE, CLASSES, ROWS = 32, 10, 4  # Mixing needs a multiple of four images on each device.


def shrink(config: ConfigDict) -> ConfigDict:
    """Returns the same recipe for a narrow network of two blocks and synthetic images.

    Loss, optimizer, SAM, augmentation, precision and averages are those of the recipe, and so are
    the groups of parameters that the small network has. Batch, data, initial weights and durations
    are not, and Weights & Biases is off.

    Raises:
      UsageError: a field of the config is unknown, missing or out of range.
    """
    schema.check(config)
    config = config.copy_and_resolve_references()
    options = {name: value for name, value in config.model.items() if name not in _SIZES}
    variant = models.variant_info(config.model.name)
    with schema.naming('model'):
        parameters = _parameters(config.model)
    optimizers.assign_groups(config.optimizer.groups, parameters, key='config.optimizer.groups')
    small = {
        # Two stages, because compiling takes the time, and other stages have the same block.
        'widths': tuple(max(16, width // 16) for width in variant.widths[:2]),
        'depths': (1, 1),
        'width': 1.0,
        'group_size': 8,
    }
    known = models.model_options(config.model.name)
    # A run may use one core of a split CPU, and would then have the images of all.
    devices = 1 if parallel.cpu_is_split() else parallel.device_count()
    batch_size = ROWS * devices * config.accumulate
    with config.unlocked(), config.ignore_type():
        config.model = options | {name: small[name] for name in small if name in known}
        config.init = {'weights': '', 'new_head': False}
        config.data = {
            'name': 'noise',
            'image_size': IMAGE_SIZE,
            'classes': CLASSES,
            'examples': 4 * batch_size,
            'channels': config.model.get('channels') or 3,
        }
        config.batch_size = config.eval.batch_size = batch_size
        config.duration = '3 steps'
        config.optimizer.schedule.warmup = '1 steps'
        config.optimizer.schedule.boundaries = ('2 steps',)
        config.optimizer.schedule.every = '1 steps'
        config.optimizer.groups = _matching(
            config.optimizer.groups, pretrained.flatten(_parameters(config.model))
        )
        config.log_every = '1 steps'
        config.eval.every = config.checkpoint.every = '3 steps'
        config.wandb.project = ''
    return config


def describe_shrunk(config: ConfigDict) -> str:
    """Returns the line that describes a shrunk config."""
    return (
        f'smoke: {config.model.name} as two narrow blocks, {config.duration} of '
        f'{config.batch_size} synthetic images each; size, data, batch and durations of the config '
        'are ignored'
    )


def _parameters(model: ConfigDict) -> hk.Params:
    options = model.to_dict()
    metadata = pretrained.Metadata(model=options.pop('name'), options=options, num_classes=CLASSES)
    return pretrained.variable_shapes(metadata)[0]


def _matching(rules: Sequence[Mapping], names: Iterable[str]) -> tuple[Mapping, ...]:
    """Returns the rules that apply to any of these parameters: the first match of each."""
    kept, left = [], set(names)
    for rule in rules:
        matched = {name for name in left if re.fullmatch(rule['match'], name)}
        if matched:
            kept.append(rule)
        left -= matched
    return tuple(kept)


_SIZES = ('widths', 'depths', 'width', 'group_size')
