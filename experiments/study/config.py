"""A study: a question, the arms that are compared, and the trials that follow from them.

A file under configs/studies/ starts from `default_study()`. Its trials are the points of a grid:
every arm, at every value of every axis, the learning rate and the seed among them.
"""

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

from ml_collections import ConfigDict

from experiments import config as experiments_config
from experiments.config import default_config
from experiments.run import workdir
from experiments.study import measurements
from experiments.study.schema import TIMES, StudyConfig, check_axis, parse_chart, parse_claim
from experiments.train_step import program_key
from nfnets_jax import errors, fields
from nfnets_jax.errors import UsageError, nearest

PRETRAINED = '{study}/pretrained'  # {study}, which `load_weights` knows, is the study's directory

# Nodes whose fields depend on a name: with a new name come all of its own fields.
_NAMED = ('model', 'data')

_NAME = re.compile(r'[A-Za-z0-9][\w.+-]*')
_VALUE = re.compile(r'[\w.+-]+')


class Trial(NamedTuple):
    """One point of a study's grid."""

    id: str  # and the name of its directory
    axes: dict[str, Any]  # the arm, and the value on each axis that the arm has
    config: ConfigDict
    program: str  # equal for trials that share a compiled program


def default_study() -> ConfigDict:
    """Returns every field of a study with its default."""
    return ConfigDict(fields.defaults(fields.options(StudyConfig)) | {'base': default_config()})


def declared(study: ConfigDict) -> dict[str, fields.Option]:
    """Returns the options of a study, those of its own base and pretraining included.

    Raises:
      UsageError: there is no such model or data source.
    """
    known = fields.options(StudyConfig)
    for node in ('base', 'pretrain'):
        if study.get(node):
            known[node] = known[node]._replace(
                inner=experiments_config.declared(study[node], f'config.{node}')
            )
    return known


def make_trials(study: ConfigDict) -> list[Trial]:
    """Returns all trials of a study, those that share a compiled program one after another.

    Raises:
      UsageError: naming the field of the study that is wrong. The trials' configs are not checked.
    """
    _check(study)
    trials: dict[str, list[Trial]] = {}
    for arm in study.arms:
        grid = arm_grid(study, arm)
        config = _arm_config(study, arm['name'])
        for values in itertools.product(*grid.values()):
            point = {'arm': arm['name'], **dict(zip(grid, values, strict=True))}
            trial = _make_trial(study, point, config)
            trials.setdefault(trial.program, []).append(trial)
    return [trial for group in trials.values() for trial in group]


def arm_grid(study: ConfigDict, arm: Mapping) -> dict[str, Sequence]:
    """Returns the axes that an arm has, in the order of the study's, with their values."""
    grid = {**study.grid.to_dict(), **arm.get('grid', {})}
    return {axis: grid[axis] for axis in study.axes if axis in grid}


def make_trial(study: ConfigDict, axes: Mapping[str, Any]) -> Trial:
    """Returns the trial at a point, which may lie outside the grid."""
    return _make_trial(study, axes, _arm_config(study, axes['arm']))


def trial_id(study: ConfigDict, axes: Mapping[str, Any]) -> str:
    """Returns the id of the trial at a point."""
    return '-'.join([axes['arm'], *(f'{axis}={axes[axis]}' for axis in study.axes if axis in axes)])


def _arm_config(study: ConfigDict, name: str) -> ConfigDict:
    i = [arm['name'] for arm in study.arms].index(name)
    config = ConfigDict(study.base.to_dict())
    _merge(config, study.arms[i].get('config', {}), f'config.arms[{i}].config')
    return config


def difference(trial: Trial, study: ConfigDict) -> dict[str, Any]:
    """Returns what a trial's config has other than the study's base: {dotted key: value}."""
    base = workdir.flatten(workdir.as_json(study.base))
    here = workdir.flatten(workdir.as_json(trial.config))
    return {key: value for key, value in here.items() if key not in base or base[key] != value}


def in_study(error: BaseException, trial: Trial, study: ConfigDict) -> str:
    """Returns the message of an error about a trial's config, its keys named as in the study.

    'config.data.path' becomes 'config.base.data.path', unless the arm or an axis sets it.
    """
    i = [arm['name'] for arm in study.arms].index(trial.axes['arm'])
    changes, grid = study.arms[i].get('config', {}), study.arms[i].get('grid', {})
    axes = {study.axes[axis]: axis for axis in trial.axes if axis != 'arm'}

    def place(key: str) -> str:
        if key in axes:
            return f'arms[{i}].grid.{axes[key]}' if axes[key] in grid else f'grid.{axes[key]}'
        return f'arms[{i}].config.{key}' if _has(changes, key) else f'base.{key}'

    return errors.rename_keys(error, lambda key: _moved(key, place))


@contextlib.contextmanager
def naming_trial(trial: Trial, study: ConfigDict) -> Iterator[None]:
    """Renames keys in errors about a trial's config to those of the study, and names the trial."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f'trial {trial.id}: {in_study(error, trial, study)}') from error


@contextlib.contextmanager
def naming_pretraining() -> Iterator[None]:
    """Renames keys in errors about the pre-training config to those of the study's config."""
    try:
        yield
    except UsageError as error:
        message = errors.rename_keys(error, lambda key: _moved(key, 'pretrain.{}'.format))
        raise UsageError(message) from error


def _moved(key: str, place: Callable[[str], str]) -> str:
    """Returns 'config.' and the place of a key of a run's config; of an entry, of its list."""
    name, index, rest = key.removeprefix('config.').partition('[')
    return f'config.{place(name)}{index}{rest}' if key.startswith('config.') else key


def _has(changes: Mapping, key: str) -> bool:
    """Whether nested changes say what a dotted key is."""
    node, _, rest = key.partition('.')
    value = changes.get(node)
    if not rest or not _is_node(value) or _is_whole(node, value):
        return node in changes
    return _has(value, rest)


def axis_values(study: ConfigDict) -> dict[str, list]:
    """Returns the arms, and all values on each axis over all arms, in order."""
    values: dict[str, list] = {'arm': [arm['name'] for arm in study.arms]}
    for axis in study.axes:
        grids = [study.grid, *(arm.get('grid', {}) for arm in study.arms)]
        seen = dict.fromkeys(value for grid in grids for value in grid.get(axis, ()))
        if seen:
            values[axis] = list(seen)
    return values


def _make_trial(study: ConfigDict, axes: Mapping[str, Any], config: ConfigDict) -> Trial:
    config = ConfigDict(config.to_dict())
    point = {axis: axes[axis] for axis in ('arm', *study.axes) if axis in axes}
    for axis, value in point.items():
        if axis != 'arm':
            _set(config, study.axes[axis], value, f'axes.{axis}')
    program = hashlib.sha256(program_key(config).encode()).hexdigest()[:16]
    return Trial(trial_id(study, point), point, config, program)


def _merge(config: ConfigDict, changes: Mapping, place: str) -> None:
    """Puts nested changes into a config."""
    for key, value in changes.items():
        if key not in config and place.rpartition('.')[2] not in _NAMED:
            raise UsageError(f'unknown key {place}.{key}{nearest(key, config)}')
        if _is_node(value) and _is_node(config.get(key)) and not _is_whole(key, value):
            _merge(config[key], value, f'{place}.{key}')
        else:
            with config.ignore_type():
                config[key] = value.to_dict() if isinstance(value, ConfigDict) else value


def _is_node(value: Any) -> TypeGuard[Mapping]:
    return isinstance(value, Mapping | ConfigDict)


def _is_whole(key: str, value: Mapping) -> bool:
    """Whether a change of a node leaves nothing of what was there."""
    return key in _NAMED and 'name' in value


def _set(config: ConfigDict, key: str, value: Any, axis: str) -> None:
    *nodes, field = key.split('.')
    for node in nodes:
        if not isinstance(config.get(node), ConfigDict):
            raise UsageError(
                f'config.{axis}={key!r}: no config has {node!r}{nearest(node, config)}'
            )
        config = config[node]
    if field not in config and nodes != ['model'] and nodes != ['data']:
        raise UsageError(f'config.{axis}={key!r}: there is no such key{nearest(field, config)}')
    with config.ignore_type():
        config[field] = value


def _check(study: ConfigDict) -> None:
    fields.check(fields.options(StudyConfig), study, 'config', whole=True)
    if not study.arms:
        raise UsageError('config.arms is empty: a study needs an arm')
    for name in study.measure:
        if name not in measurements.MEASUREMENTS:
            raise UsageError(
                f'config.measure: unknown {name!r}{nearest(name, measurements.MEASUREMENTS)}'
            )
    for i, arm in enumerate(study.arms):
        _check_name(arm['name'], f'arms[{i}].name')
        if arm['name'] in [other['name'] for other in study.arms[:i]]:
            raise UsageError(f'config.arms[{i}].name={arm["name"]!r}: another arm has this name')
        _check_grid(arm.get('grid', {}), f'arms[{i}].grid', study)
    _check_grid(study.grid, 'grid', study)
    told = to_json(study)
    for i, claim in enumerate(told['claims']):
        name = f'config.claims[{i}]'
        parsed = parse_claim(claim, told['axes'], study.metric, name)
        _check_no_time(parsed.metric, f'{name}.compare.metric')
    for i, chart in enumerate(told['charts']):
        name = f'config.charts[{i}]'
        _check_no_time(parse_chart(chart, told['axes'], name).y, f'{name}.y')
    for axis in study.tuned:
        check_axis(axis, study.axes, 'config.tuned')


def _check_grid(grid: Mapping, key: str, study: ConfigDict) -> None:
    for axis, values in grid.items():
        if axis not in study.axes:
            raise UsageError(f'config.{key}.{axis}: no such axis{nearest(axis, study.axes)}')
        if not isinstance(values, tuple | list) or not values:
            raise UsageError(f'config.{key}.{axis}={values!r}: give a tuple of values')
        for value in values:
            _check_name(str(value), f'{key}.{axis}', _VALUE)
        if len(set(values)) < len(values):
            raise UsageError(f'config.{key}.{axis}={values!r}: a value twice')


def _check_name(name: str, key: str, allowed: re.Pattern = _NAME) -> None:
    if not allowed.fullmatch(name):
        raise UsageError(
            f'config.{key}: {name!r} becomes part of a directory: letters, digits, _ . + - only'
        )


def recipe(study: ConfigDict) -> str:
    """Returns how the study's networks are trained, in words; '' where nothing is trained."""
    if 'train' not in study.measure:
        return ''
    base = study.base
    optimizer, clip, schedule = base.optimizer, base.optimizer.clip, base.optimizer.schedule
    if optimizer.name == 'sgd':
        nesterov = 'Nesterov ' if optimizer.nesterov else ''
        trained_by = f'SGD with {nesterov}momentum {optimizer.momentum:g}'
    else:
        trained_by = optimizer.name.capitalize()
    told = {
        'batch_size': f'batch size {base.batch_size}',
        'duration': base.duration,
        'optimizer.name': trained_by,
        'optimizer.schedule.name': f'{schedule.name} schedule, {schedule.warmup} warm-up',
        'optimizer.weight_decay': f'weight decay {optimizer.weight_decay:g}',
        'optimizer.clip.clipping': {
            'none': 'no clipping',
            'agc': f'AGC at {clip.clipping:g}',
        }.get(clip.name, f'clipping {clip.name} at {clip.clipping:g}'),
        'optimizer.scale_lr_by_batch': 'learning rates of SGD for 256 examples, in proportion to '
        'the batch'
        if optimizer.scale_lr_by_batch
        else 'learning rates whatever the batch',
    }
    varied = set(study.axes.values())
    words = ', '.join(text for key, text in told.items() if key not in varied)
    return f'Where arms and figures do not say otherwise: {words}.'


def _scope(study: ConfigDict, arm: str) -> str:
    """Returns the network, the data and the budget of an arm: 'NF-ResNet-8, digits, 10 epochs'."""
    config = _arm_config(study, arm)
    budget = config.duration if 'train' in study.measure else 'not trained'
    return f'{config.model.name}, {study.size or config.data.name}, {budget}'


def _check_no_time(metric: str, key: str) -> None:
    if metric in TIMES:
        raise UsageError(
            f'{key}={metric!r}: trials share the machine, so that a study cannot measure time; '
            'see benchmarks/'
        )


def to_json(study: ConfigDict) -> dict[str, Any]:
    """Returns what study.json says of the study itself; trials and circumstances come on top."""
    words = ('name', 'title', 'question', 'setting', 'size', 'cost')
    keys = (*words, 'metric', 'higher_is_better', 'chance', 'tuned', 'search', 'claims', 'charts')
    labels = {arm['name']: arm.get('label') or arm['name'] for arm in study.arms}
    told = {key: study[key] for key in keys} | {'axes': axis_values(study), 'arms': labels}
    told['grids'] = {arm['name']: arm_grid(study, arm) for arm in study.arms}
    told['scopes'] = {arm['name']: _scope(study, arm['name']) for arm in study.arms}
    told['setting'] = '. '.join(filter(None, (study.setting, recipe(study))))
    return json.loads(json.dumps(told, default=dict))
