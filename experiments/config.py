"""The fields of an experiment, and what they may be.

A file under configs/ starts from `default_config()` and changes what its result needs. Fields
that a part of the library owns (model, data, augment, optimizer) are checked where that part
reads them; what is left is checked here.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from nfnets_jax import augment, optimizers
from nfnets_jax.errors import UsageError, fold, nearest

PRECISIONS = ('float32', 'bfloat16')


def default_config() -> ConfigDict:
    """Returns every field with its default; the NF-ResNet recipe at ImageNet size."""
    return ConfigDict(
        {
            'seed': 0,
            # The name in `list_models()`; every other field is an option of that model.
            'model': {'name': 'NF-ResNet-50'},
            # Weights to start from, as nfnets_jax.load_pretrained reads them; '': random ones. The
            # classifier starts anew if new_head, and always where the number of classes differs.
            'init': {'weights': '', 'new_head': False},
            'precision': 'float32',  # what to compute in: float32 | bfloat16
            'gradient_dtype': 'float32',  # what gradients are averaged over the devices in
            # The name of a source; every other field but these two is an option of that source.
            # skip_bad: pictures that cannot be read to skip in each process, before it is an error.
            # on_device: keep the whole training set on the devices, if it is small.
            'data': {'name': 'digits', 'skip_bad': 0, 'on_device': False},
            'augment': dict(augment.DEFAULTS),
            'batch_size': 256,  # examples per step, over all devices of all processes
            'accumulate': 1,  # parts that each device takes its share of a batch in, one by one
            'duration': '90 epochs',  # durations: '500 steps', '30 epochs' or '10%' of this one
            'optimizer': optimizers.default_config(),
            'ema': 0.99999,  # the largest decay of the parameters' moving average; 0: no average
            # rho 0: no SAM. ascent_fraction: the part of each device's batch for the ascent.
            'sam': {'rho': 0.0, 'ascent_fraction': 1.0},
            # Steps in a row whose loss or gradient is not finite to leave out before giving up.
            'skip_nonfinite': 0,
            'log_every': '50 steps',
            # precision: what evaluation computes in: float32 | bfloat16 | training (as training).
            'eval': {'every': '5 epochs', 'batch_size': 256, 'precision': 'training'},
            # Written every so often, and at the end; the best one is kept besides the newest.
            'checkpoint': {'every': '5 epochs', 'keep': 3},
            'profile': '0 steps',  # a duration: trace so much, from the third step on
            'smoke': False,  # three steps of a tiny likeness on made data: does it run here?
            # Weights & Biases: off without a project.
            'wandb': {'project': '', 'entity': '', 'name': '', 'mode': 'online'},
        }
    )


def adapted(key: str, value: Any, why: str) -> None:
    """Records that a config file chose a value by what it found; see `take_adaptations`.

    Args:
      key: of a field at the top of the config.
      value: what was chosen.
      why: follows the value in the line.
    """
    _adapted[key] = value, why


def take_adaptations(config: ConfigDict) -> list[str]:
    """Returns a line for each value that was adapted and not overridden since; each only once."""
    told = [
        f'config.{key}={value} {why}'
        for key, (value, why) in _adapted.items()
        if config[key] == value
    ]
    _adapted.clear()
    return told


_adapted: dict[str, tuple[Any, str]] = {}


def unknown_key(key: str, known: Iterable[str], *, prefix: str = '') -> UsageError:
    """Returns the error of a key that no config has: the nearest one, or why there is none.

    Args:
      key: after `prefix`.
      known: what it may be, without `prefix`.
      prefix: of the node that holds it, 'optimizer.'.
    """
    word = fold(key.rpartition('.')[2])
    reason = next((f': {why}' for words, why in _NOT_FIELDS.items() if word in words), None)
    return UsageError(f'unknown key config.{prefix}{key}{reason or nearest(key, known)}')


# Fields of other trainers that ours has no use for, folded.
_NOT_FIELDS = {
    ('workers', 'numworkers', 'threads', 'numthreads', 'loaderworkers'): (
        'images are read by one thread for each core'
    ),
    ('gpus', 'numgpus', 'device', 'devices', 'ngpus'): 'all devices of the machine are used',
    ('outputdir', 'outdir', 'logdir', 'savedir', 'output', 'workdir'): 'give --workdir=DIRECTORY',
    ('resume', 'resumefrom'): 'the same command with the same --workdir resumes',
}


def check(config: ConfigDict) -> None:
    """Raises a UsageError naming the first field that is unknown, missing or out of range."""
    _check_fields(config, default_config())
    for node in ('model', 'data'):
        if not isinstance(config[node].get('name'), str):
            raise UsageError(f'config.{node}.name is missing, or no string')
    _check_number(config, 'seed', low=0, below=2**31)
    _check_number(config, 'batch_size', low=1)
    _check_number(config, 'eval.batch_size', low=1)
    _check_number(config, 'checkpoint.keep', low=1)
    _check_number(config, 'ema', low=0, below=1)
    _check_number(config, 'sam.rho', low=0)
    _check_number(config, 'accumulate', low=1)
    _check_number(config, 'skip_nonfinite', low=0, below=2**31)
    if not 0 < config.sam.ascent_fraction <= 1:
        raise UsageError(
            f'config.sam.ascent_fraction={config.sam.ascent_fraction}: must be in (0, 1]'
        )
    for key, value, known in (
        ('precision', config.precision, PRECISIONS),
        ('gradient_dtype', config.gradient_dtype, PRECISIONS),
        ('eval.precision', config.eval.precision, (*PRECISIONS, 'training')),
    ):
        if value not in known:
            raise UsageError(f'config.{key}={value!r} is unknown{nearest(value, known)}')


def eval_precision(config: ConfigDict) -> str:
    """Returns the dtype that evaluation computes in."""
    precision = config.eval.precision
    return config.precision if precision == 'training' else precision


# Dotted keys that the configs of earlier versions lack, with what those versions did.
ADDED_FIELDS = {
    'augment.mix_pairs': 'batch',
    'eval.precision': 'training',
    'optimizer.schedule.end_value': 0.0,
}


def upgrade(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a run of any earlier version as this version would have written them.

    Only nodes that are there are completed.
    """
    upgraded = copy.deepcopy(dict(fields))
    for key, value in ADDED_FIELDS.items():
        *path, name = key.split('.')
        node: Any = upgraded
        for part in path:
            node = node.get(part) if isinstance(node, Mapping) else None
        if isinstance(node, dict):
            node.setdefault(name, value)
    return upgraded


# Fields whose inner keys depend on a name; their owner checks them.
_OPEN = ('model', 'data', 'augment', 'optimizer')


def _check_fields(config, known, prefix: str = '') -> None:
    for key in config:
        if key not in known:
            raise unknown_key(key, known, prefix=prefix)
    for key, default in known.items():
        if key not in config:
            hint = '' if isinstance(default, ConfigDict) else f' (default: {default!r})'
            raise UsageError(f'config.{prefix}{key} is missing{hint}')
        value = config[key]
        if isinstance(default, ConfigDict):
            if not isinstance(value, ConfigDict):
                raise UsageError(f'config.{prefix}{key}={value!r}: must hold fields')
            if key not in _OPEN:
                _check_fields(value, default, f'{prefix}{key}.')
        elif not isinstance(value, _accepted(default)) or (
            isinstance(value, bool) != isinstance(default, bool)
        ):
            raise UsageError(
                f'config.{prefix}{key}={value!r}: must be like {default!r}, '
                f'not {type(value).__name__}'
            )


def _accepted(default) -> tuple[type, ...]:
    if isinstance(default, float):
        return (float, int)
    if isinstance(default, str) and default[:1].isdigit():
        return (str, int)  # a duration, which may be a number of steps
    return (type(default),)


def _check_number(config: ConfigDict, key: str, *, low: float, below: float = math.inf) -> None:
    value = config
    for part in key.split('.'):
        value = value[part]
    if not low <= value < below:  # NaN is neither.
        limit = f' and below {below}' if below < math.inf else ''
        raise UsageError(f'config.{key}={value}: must be at least {low}{limit}')
