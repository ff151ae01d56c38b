"""The fields of an experiment, and what they may be.

A file under configs/ starts from `default_config()` and changes what its result needs. A part of
the library declares its own fields (augment, optimizer, and the options of models and sources).
"""

import contextlib
import copy
import dataclasses
import functools
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from ml_collections import ConfigDict

from experiments.run import data
from nfnets_jax import fields, optimizers
from nfnets_jax.augment.recipe import Recipe
from nfnets_jax.errors import UsageError, fold, nearest
from nfnets_jax.fields import Field
from nfnets_jax.models import registry
from nfnets_jax.schedules import DURATION

Precision = Literal['float32', 'bfloat16']


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    name: Annotated[str, Field('A network; `python -m experiments.models` lists them.')] = (
        'NF-ResNet-50'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    weights: Annotated[str, Field("What load_pretrained starts from; '': random weights.")] = ''
    new_head: Annotated[
        bool,
        Field('Start the classifier anew, as always where the number of classes differs.'),
    ] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamConfig:
    rho: Annotated[float, Field('Radius of the ascent; 0: no SAM.', low=0)] = 0.0
    ascent_fraction: Annotated[float, Field('Part of the batch to ascend by.', above=0, high=1)] = (
        1.0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every: Annotated[int | str, Field('Evaluate so often, and at the end.', wants=DURATION)] = (
        '5 epochs'
    )
    batch_size: Annotated[int, Field('Examples at once, over all devices.', low=1)] = 256
    precision: Annotated[
        Precision | Literal['training'], Field('Dtype of the evaluation; training: as training.')
    ] = 'training'
    report: Annotated[
        bool, Field('Write a report at the end: by class, confusions, calibration, mistakes.')
    ] = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: Annotated[int | str, Field('Save so often, and at the end.', wants=DURATION)] = (
        '5 epochs'
    )
    keep: Annotated[int, Field('Newest checkpoints to keep, besides the best.', low=1)] = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class WandbConfig:
    project: Annotated[str, Field("Project of Weights & Biases; '': off.")] = ''
    entity: Annotated[str, Field("Its owner; '': you.")] = ''
    name: Annotated[str, Field("Name of the run; '': chosen there.")] = ''
    mode: Annotated[Literal['online', 'offline', 'disabled'], Field('Where it is written.')] = (
        'online'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Every field of a config, and its default: the NF-ResNet recipe at ImageNet size."""

    seed: Annotated[int, Field('Seed of all randomness.', low=0, below=2**31)] = 0
    model: Annotated[ModelConfig, Field('The network and its options.', partial=True)]
    init: Annotated[InitConfig, Field('Weights before training.')]
    precision: Annotated[Precision, Field('Dtype of the computation in training.')] = 'float32'
    gradient_dtype: Annotated[Precision, Field('Dtype gradients are averaged in.')] = 'float32'
    data: Annotated[data.DataConfig, Field('Source of the images and its options.', partial=True)]
    augment: Annotated[Recipe, Field('Augmentation on the device.', partial=True)]
    batch_size: Annotated[int, Field('Examples per step, over all devices together.', low=1)] = 256
    accumulate: Annotated[int, Field('Gradient-accumulation steps of each device.', low=1)] = 1
    duration: Annotated[int | str, Field('Length of the training.', wants=DURATION)] = '90 epochs'
    optimizer: Annotated[optimizers.OptimizerConfig, Field('Optimizer.')]
    ema: Annotated[
        float,
        Field("Largest decay of the parameters' moving average; 0: no average.", low=0, below=1),
    ] = 0.99999
    class_weights: Annotated[
        Literal['none', 'balanced'],
        Field('Weights of the classes in the training loss; balanced: inverse to their images.'),
    ] = 'none'
    sam: Annotated[SamConfig, Field('Sharpness-aware minimization.')]
    skip_nonfinite: Annotated[
        int,
        Field(
            'Steps in a row to skip whose loss or gradient is not finite, before giving up.',
            low=0,
            below=2**31,
        ),
    ] = 0
    log_every: Annotated[int | str, Field('Write metrics so often.', wants=DURATION)] = '50 steps'
    log_by_layer: Annotated[
        bool,
        Field(
            'With the metrics, write the clipped fraction and the ratio of gradient norm to weight '
            'norm of each layer (a stem, block or head).'
        ),
    ] = False
    eval: Annotated[EvalConfig, Field('Evaluation.')]
    checkpoint: Annotated[CheckpointConfig, Field('Checkpoints.')]
    profile: Annotated[int | str, Field('How long to profile, from step 3 on.', wants=DURATION)] = (
        '0 steps'
    )
    smoke: Annotated[bool, Field('Three steps of a small model on noise: does it run.')] = False
    wandb: Annotated[WandbConfig, Field('Weights & Biases.')]


def default_config() -> ConfigDict:
    """Returns every field with its default."""
    return ConfigDict(fields.defaults(fields.options(Config)))


def declared(config: Mapping[str, Any], name: str = 'config') -> dict[str, fields.Option]:
    """Returns the options of a config, those of its own model and data source included.

    Args:
      config: in which model.name and data.name count.
      name: of the config, for messages.

    Raises:
      UsageError: there is no such model or source.
    """
    known = fields.options(Config)
    for node, options_of in (('model', registry.declared_options), ('data', data.options)):
        inner, value = dict(known[node].inner or {}), config.get(node)
        inner['name'] = inner['name']._replace(default=fields.REQUIRED)
        if value is not None and hasattr(value, 'keys'):
            chosen = {key: value[key] for key in value if key == 'name'}
            fields.check({'name': inner['name']}, chosen, f'{name}.{node}')
            with naming(node, name):
                inner |= options_of(value['name'])
        known[node] = known[node]._replace(inner=inner)
    return known


def check(config: ConfigDict) -> None:
    """Raises a UsageError naming the first field that is unknown, missing or out of range."""
    fields.check(declared(config), config, 'config', whole=True, hint=_hint)


@contextlib.contextmanager
def naming(node: str, name: str = 'config') -> Iterator[None]:
    """Puts the node of a config before a UsageError of the library, which knows of no config.

    The library names its arguments: 'data.path=...' or 'width=...'.
    """
    try:
        yield
    except UsageError as error:
        message = str(error)
        if not message.startswith((f'{node}.', f'{node}: ')):
            joint = '.' if re.match(r'\w+=', message) else ': '
            message = f'{node}{joint}{message}'
        key = re.split(r'[^\w.]|\.(?!\w)', message)[0]
        inner = (key for key in error.keys if key.startswith(f'{name}.'))
        raise UsageError(f'{name}.{message}', f'{name}.{key}', *inner) from error


def adapted(key: str, value: Any, why: str) -> None:
    """Records that a config file chose a value by what it found; see `take_adaptations`.

    Args:
      key: dotted key of a field.
      value: what was chosen.
      why: follows the value in the line.
    """
    _adapted[key] = value, why


def take_adaptations(config: ConfigDict) -> list[str]:
    """Returns a line for each value that was adapted and not overridden since; each only once."""
    told = [
        f'config.{key}={value} {why}'
        for key, (value, why) in _adapted.items()
        if functools.reduce(operator.getitem, key.split('.'), config) == value
    ]
    _adapted.clear()
    return told


_adapted: dict[str, tuple[Any, str]] = {}


def unknown_key(key: str, known: Iterable[str]) -> UsageError:
    """Returns the error of a key that no config has: the nearest one, or why there is none."""
    return UsageError(f'unknown key config.{key}{_hint(key, known)}', f'config.{key}')


def _hint(key: str, known: Iterable[str]) -> str:
    word = fold(key.rpartition('.')[2])
    reason = next((f': {why}' for words, why in _NOT_FIELDS.items() if word in words), None)
    return reason or nearest(key, known)


# Fields of other trainers that ours has no use for, folded.
_NOT_FIELDS = {
    ('workers', 'numworkers', 'threads', 'numthreads', 'loaderworkers'): (
        'images are read by one thread for each core'
    ),
    ('gpus', 'numgpus', 'device', 'devices', 'ngpus'): 'all devices of the machine are used',
    ('outputdir', 'outdir', 'logdir', 'savedir', 'output', 'workdir'): 'give --workdir=DIRECTORY',
    ('resume', 'resumefrom'): 'the same command with the same --workdir resumes',
}


def eval_precision(config: ConfigDict) -> str:
    """Returns the dtype that evaluation computes in."""
    precision = config.eval.precision
    return config.precision if precision == 'training' else precision


# Dotted keys that the configs of earlier versions lack, with what those versions did.
ADDED_FIELDS = {
    'augment.mix_pairs': 'batch',
    'augment.rotation': 0,
    'class_weights': 'none',
    'data.sampling': 'shuffled',
    'data.validation_fraction': 0.0,
    'eval.precision': 'training',
    'log_by_layer': False,
    'eval.report': False,
    'optimizer.schedule.end_value': 0.0,
    'optimizer.schedule.every': '1 epoch',
    'optimizer.schedule.patience': 10,
}


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config of a run of any earlier version as this version would have written it.

    Only nodes that are there are completed.
    """
    upgraded = copy.deepcopy(dict(config))
    for key, value in ADDED_FIELDS.items():
        *path, name = key.split('.')
        node: Any = upgraded
        for part in path:
            node = node.get(part) if isinstance(node, Mapping) else None
        if isinstance(node, dict):
            node.setdefault(name, value)
    return upgraded
