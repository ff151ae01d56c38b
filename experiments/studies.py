"""What a study is: a question, the arms that are compared, and the trials that follow from them.

A file under configs/studies/ starts from `default_study()`. Its trials are the points of a grid:
every arm, at every value of every axis, the learning rate and the seed among them.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments import measurements, workdir
from experiments.config import default_config
from experiments.train_step import program_key
from nfnets_jax.errors import UsageError, nearest

PRETRAINED = '{study}/pretrained'  # {study} is the study's directory

CHARTS = ('curves', 'line', 'heatmap', 'bars', 'parallel', 'table')

# Nodes whose fields depend on a name: with a new name come all of its own fields.
_NAMED = ('model', 'data')

_ARM = ('name', 'label', 'config', 'grid')
_NAME = re.compile(r'[A-Za-z0-9][\w.+-]*')


class Trial(NamedTuple):
    """One point of a study's grid."""

    id: str  # and the name of its directory
    axes: dict[str, Any]  # the arm, and the value on each axis that the arm has
    config: ConfigDict
    program: str  # equal for trials that share a compiled program


def default_study() -> ConfigDict:
    """Returns every field of a study with its default."""
    return ConfigDict(
        {
            'name': '',
            'title': '',
            'question': '',
            'setting': '',  # data, network and recipe, in words
            'size': '',  # digits | cifar10 | imagenet | ...
            'cost': '',  # what it took where, in words, as measured
            'base': default_config(),  # what all trials start from
            # A config to be trained once before the trials, if it is not empty; they find its
            # weights with config.init.weights = PRETRAINED.
            'pretrain': {},
            # Name of an axis -> the key of the config that it sets.
            'axes': {'learning_rate': 'optimizer.learning_rate', 'seed': 'seed'},
            'grid': {'seed': (0, 1, 2)},  # axis -> its values, in every arm
            # {'name', 'label': words, 'config': what differs from the base, 'grid': axis -> its
            # values in this arm, instead of the study's}. An arm may lack an axis.
            'arms': (),
            # What a trial does, in order: names of experiments.measurements.
            'measure': ('train',),
            'metric': 'test/top1',  # what arms are judged by
            'higher_is_better': True,
            'chance': 0.1,  # the metric of a network that knows nothing, and of a diverged trial
            # Axes whose best value is chosen for each arm, by the mean over the seeds.
            'tuned': ('learning_rate',),
            # {'text', 'source', 'compare': {'better': {axis: value}, 'worse': {axis: value},
            # 'margin', 'direction': 'greater' | 'less'}}: what was claimed before.
            'claims': (),
            # {'kind': one of CHARTS, 'x': axis or 'step', 'y': metric, 'series': axis, 'log_x',
            # 'title'} and if wanted 'where': {axis: value}, 'log_y', 'x_label'.
            'charts': (),
        }
    )


def make_trials(study: ConfigDict) -> list[Trial]:
    """Returns all trials of a study, those that share a compiled program one after another.

    Raises:
      UsageError: naming the field of the study that is wrong. The trials' configs are not checked.
    """
    _check(study)
    trials: dict[str, list[Trial]] = {}
    for arm in study.arms:
        config = ConfigDict(study.base.to_dict())
        _merge(config, arm.get('config', {}), f'arms: {arm["name"]}: ')
        grid = {**study.grid.to_dict(), **arm.get('grid', {})}
        axes = [axis for axis in study.axes if axis in grid]
        for values in itertools.product(*(grid[axis] for axis in axes)):
            point = {'arm': arm['name'], **dict(zip(axes, values, strict=True))}
            trial = _make_trial(study, point, config)
            trials.setdefault(trial.program, []).append(trial)
    return [trial for group in trials.values() for trial in group]


def difference(trial: Trial, study: ConfigDict) -> dict[str, Any]:
    """Returns what a trial's config has other than the study's base: {dotted key: value}."""
    base = workdir.flatten(workdir.as_json(study.base))
    here = workdir.flatten(workdir.as_json(trial.config))
    return {key: value for key, value in here.items() if key not in base or base[key] != value}


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
    names = [axes['arm']]
    for axis, value in axes.items():
        if axis != 'arm':
            _set(config, study.axes[axis], value, f'axes.{axis}')
            names.append(f'{axis}={value}')
    program = hashlib.sha256(program_key(config).encode()).hexdigest()[:16]
    return Trial('-'.join(names), dict(axes), config, program)


def _merge(config: ConfigDict, changes: Mapping, prefix: str) -> None:
    """Puts nested changes into a config."""
    for key, value in changes.items():
        if key not in config and not prefix.endswith(tuple(f'{node}.' for node in _NAMED)):
            raise UsageError(f'config.{prefix}unknown key {key!r}{nearest(key, config)}')
        replaced = key in _NAMED and 'name' in value
        if isinstance(value, Mapping | ConfigDict) and key in config and not replaced:
            _merge(config[key], value, f'{prefix}{key}.')
        else:
            with config.ignore_type():
                config[key] = value.to_dict() if isinstance(value, ConfigDict) else value


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
    known = default_study()
    for key in study:
        if key not in known:
            raise UsageError(f'unknown key config.{key} of a study{nearest(key, known)}')
    for key in known:
        if key not in study:
            raise UsageError(f'config.{key} is missing: see experiments/studies.py')
    if not study.arms:
        raise UsageError('config.arms is empty: a study needs an arm')
    for name in study.measure:
        if name not in measurements.MEASUREMENTS:
            raise UsageError(
                f'config.measure: unknown {name!r}{nearest(name, measurements.MEASUREMENTS)}'
            )
    for i, arm in enumerate(study.arms):
        for key in arm:
            if key not in _ARM:
                raise UsageError(f'unknown key config.arms[{i}].{key}{nearest(key, _ARM)}')
        _check_name(arm.get('name', ''), f'arms[{i}].name')
        _check_grid(arm.get('grid', {}), f'arms[{i}].grid', study)
    _check_grid(study.grid, 'grid', study)
    values = axis_values(study)
    for i, claim in enumerate(study.claims):
        for side in ('better', 'worse'):
            _check_point(claim['compare'][side], values, f'claims[{i}].compare.{side}')
    for i, chart in enumerate(study.charts):
        if chart['kind'] not in CHARTS:
            raise UsageError(
                f'config.charts[{i}].kind={chart["kind"]!r}{nearest(chart["kind"], CHARTS)}'
            )
        _check_point(chart.get('where', {}), values, f'charts[{i}].where')
    for axis in study.tuned:
        if axis not in study.axes:
            raise UsageError(f'config.tuned: no axis {axis!r}{nearest(axis, study.axes)}')


def _check_grid(grid: Mapping, key: str, study: ConfigDict) -> None:
    for axis, values in grid.items():
        if axis not in study.axes:
            raise UsageError(f'config.{key}.{axis}: no such axis{nearest(axis, study.axes)}')
        if not isinstance(values, tuple | list) or not values:
            raise UsageError(f'config.{key}.{axis}={values!r}: give a tuple of values')
        for value in values:
            _check_name(str(value), f'{key}.{axis}')
        if len(set(values)) < len(values):
            raise UsageError(f'config.{key}.{axis}={values!r}: a value twice')


def _check_point(point: Mapping, values: Mapping[str, list], key: str) -> None:
    for axis, value in point.items():
        if axis not in values:
            raise UsageError(f'config.{key}: no axis {axis!r}{nearest(axis, values)}')
        if value not in values[axis]:
            raise UsageError(f'config.{key}.{axis}={value!r}{nearest(value, values[axis])}')


def _check_name(name: str, key: str) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f'config.{key}: {name!r} becomes part of a directory: letters, digits, _ . + only'
        )


def to_json(study: ConfigDict) -> dict[str, Any]:
    """Returns what study.json says of the study itself; trials and circumstances come on top."""
    words = ('name', 'title', 'question', 'setting', 'size', 'cost')
    fields = (*words, 'metric', 'higher_is_better', 'chance', 'tuned', 'claims', 'charts')
    labels = {arm['name']: arm.get('label', arm['name']) for arm in study.arms}
    told = {field: study[field] for field in fields} | {'axes': axis_values(study), 'arms': labels}
    return json.loads(json.dumps(told, default=dict))
