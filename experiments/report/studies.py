"""What `experiments.study` left in a directory: study.json, checked, and the trials' curves."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import writers
from nfnets_jax.errors import UsageError, nearest

# Ended with a result; a trial that diverged is one.
DONE = ('complete', 'diverged')
STATES = (*DONE, 'failed', 'running', 'pending')
KINDS = ('curves', 'line', 'heatmap', 'bars', 'parallel', 'table')
DIRECTIONS = ('greater', 'less')

Value = str | float | int | bool | None
Point = Mapping[str, Value]  # axis -> value, for some of a study's axes


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a study."""

    id: str
    axes: Point
    state: str
    step: int
    metrics: Mapping[str, float]
    seconds: float | None
    error: str | None


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the report or a paper says; with two sides to compare where the study can judge it."""

    text: str
    source: str
    metric: str
    better: Point | None = None
    worse: Point | None = None
    margin: float = 0.0
    direction: str = 'greater'


@dataclasses.dataclass(frozen=True)
class ChartSpec:
    """A chart that a study asks for; `y` is a metric, `x` and `series` are axes."""

    kind: str
    x: str
    y: str
    series: str
    title: str
    where: Point
    log_x: bool = False
    log_y: bool = False
    x_label: str | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """A study's settings and all its trials, whatever became of them."""

    path: pathlib.Path
    name: str
    title: str
    question: str
    setting: str
    size: str
    axes: Mapping[str, Sequence[Value]]
    tuned: Sequence[str]  # axes of which the best value is taken where none is asked for
    arms: Mapping[str, str]  # arm -> its label
    metric: str
    higher_is_better: bool
    chance: float | None  # what a diverged trial counts as in means of `metric`
    claims: Sequence[Claim]
    charts: Sequence[ChartSpec]
    trials: Sequence[Trial]
    commands: Sequence[str]
    versions: Mapping[str, str]
    hardware: str
    seconds: float | None

    def label(self, axis: str, value: Value) -> str:
        """Returns how a value of an axis is written: 'ResNet-8', '0.4', or '-' for none."""
        if value is None:
            return '-'
        if axis == 'arm':
            return self.arms.get(str(value), str(value))
        is_number = isinstance(value, float | int) and not isinstance(value, bool)
        return f'{value:g}' if is_number else str(value)

    def curve(self, trial: Trial, metric: str) -> list[tuple[int, float]]:
        """Returns (step, value) where a trial recorded a finite value; [] if it never started."""
        directory = self.path / 'trials' / trial.id
        if not (directory / writers.METRICS_FILE).exists():
            return []
        return [
            (record['step'], record[metric])
            for record in writers.read_metrics(directory)
            if math.isfinite(record.get(metric, math.nan))
        ]


def load(directory: str | os.PathLike) -> Study:
    """Reads the study in a directory, finished or not.

    Raises:
      UsageError: study.json is missing or is not what `experiments.study` writes.
    """
    path = pathlib.Path(directory)
    file = path / 'study.json'
    try:
        fields = json.loads(file.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise UsageError(f'--workdir={directory} holds no study: there is no {file}') from None
    except OSError as error:
        raise UsageError(f'{file} cannot be read: {error.strerror}') from error
    except ValueError as error:
        raise UsageError(f'{file} is not JSON: {error}') from error
    try:
        return _parse(path, _Fields(fields, ''))
    except UsageError as error:
        raise UsageError(f'{file}: {error}') from None


class _Fields:
    """A JSON object of which fields are taken with their type; the errors name the field."""

    def __init__(self, value: Any, name: str):
        if not isinstance(value, dict):
            raise UsageError(f'{name or "it"} must be an object, not {value!r:.60}')
        self._value, self._name = value, name

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        name = f'{self._name}.{key}' if self._name else key
        if key not in self._value and default is ...:
            raise UsageError(f'{name} is missing')
        value = self._value.get(key, default)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        # A bool is an int to Python, but no number to whoever writes JSON.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = ' or '.join('null' if k is type(None) else k.__name__ for k in kinds)
            raise UsageError(f'{name}={value!r:.60} must be {wanted}')
        return value

    def one_of(self, key: str, choices: Sequence[str], default: Any = ...) -> str:
        value = self.take(key, str, default)
        if value not in choices:
            name = f'{self._name}.{key}' if self._name else key
            raise UsageError(f'{name}={value!r} is unknown{nearest(value, choices)}')
        return value

    def objects(self, key: str, default: Any = ...) -> list['_Fields']:
        name = f'{self._name}.{key}' if self._name else key
        values = self.take(key, list, default)
        return [_Fields(value, f'{name}[{i}]') for i, value in enumerate(values)]


_NUMBER = (float, int)
_NONE = type(None)


def _parse(path: pathlib.Path, fields: _Fields) -> Study:
    axes = fields.take('axes', dict)
    for axis, values in axes.items():
        if not isinstance(values, list) or not all(isinstance(v, Value) for v in values):
            raise UsageError(f'axes.{axis}={values!r:.60} must be a list of texts and numbers')
    tuned = fields.take('tuned', list, [a for a in ('learning_rate',) if a in axes])
    for axis in tuned:
        _check_axis(axis, axes, 'tuned')
    metric = fields.take('metric', str)
    return Study(
        path=path,
        name=fields.take('name', str),
        title=fields.take('title', str),
        question=fields.take('question', str),
        setting=fields.take('setting', str),
        size=fields.take('size', str),
        axes=axes,
        tuned=tuned,
        arms=fields.take('arms', dict, {}),
        metric=metric,
        higher_is_better=fields.take('higher_is_better', bool),
        chance=fields.take('chance', (*_NUMBER, _NONE), None),
        claims=[_claim(f, axes, metric) for f in fields.objects('claims', [])],
        charts=[_chart(f, axes) for f in fields.objects('charts', [])],
        trials=[_trial(f, axes) for f in fields.objects('trials')],
        commands=fields.take('commands', list, []) or [fields.take('command', str)],
        versions=fields.take('versions', dict, {}),
        hardware=fields.take('hardware', str, ''),
        seconds=fields.take('seconds', (*_NUMBER, _NONE), None),
    )


def _trial(fields: _Fields, axes: Mapping[str, Any]) -> Trial:
    id, point = fields.take('id', str), fields.take('axes', dict)
    if pathlib.PurePath(id).name != id or id == '..':
        raise UsageError(f'the trial id {id!r} must be the name of a directory in trials/')
    _check_point(point, axes, f'trial {id}')
    metrics = fields.take('metrics', (dict, _NONE), None) or {}
    return Trial(
        id=id,
        axes=point,
        state=fields.one_of('state', STATES),
        step=fields.take('step', (int, _NONE), None) or 0,
        metrics={k: v for k, v in metrics.items() if isinstance(v, _NUMBER) and math.isfinite(v)},
        seconds=fields.take('seconds', (*_NUMBER, _NONE), None),
        error=fields.take('error', (str, _NONE), None),
    )


def _claim(fields: _Fields, axes: Mapping[str, Any], metric: str) -> Claim:
    text, source = fields.take('text', str), fields.take('source', str)
    compare = fields.take('compare', (dict, _NONE), None)
    if compare is None:
        return Claim(text, source, metric)
    compare = _Fields(compare, f'the comparison of {text!r:.60}')
    sides = {}
    for side in ('better', 'worse'):
        sides[side] = compare.take(side, dict)
        _check_point(sides[side], axes, f'the comparison of {text!r:.60}')
    return Claim(
        text,
        source,
        compare.take('metric', str, metric),
        **sides,
        margin=compare.take('margin', _NUMBER, 0.0),
        direction=compare.one_of('direction', DIRECTIONS, 'greater'),
    )


def _chart(fields: _Fields, axes: Mapping[str, Any]) -> ChartSpec:
    title, kind = fields.take('title', str), fields.one_of('kind', KINDS)
    spec = ChartSpec(
        kind=kind,
        x=fields.take('x', str),
        y=fields.take('y', str),
        series=fields.take('series', str),
        title=title,
        where=fields.take('where', dict, {}),
        log_x=fields.take('log_x', bool, False),
        log_y=fields.take('log_y', bool, False),
        x_label=fields.take('x_label', (str, _NONE), None),
    )
    place = f'the chart {title!r:.60}'
    _check_axis(spec.series, axes, place)
    if kind != 'curves':
        _check_axis(spec.x, axes, place)
    _check_point(spec.where, axes, place)
    return spec


def _check_axis(axis: str, axes: Mapping[str, Any], place: str) -> None:
    if axis not in axes:
        raise UsageError(f'{place} has the unknown axis {axis!r}{nearest(axis, axes)}')


def _check_point(point: Point, axes: Mapping[str, Any], place: str) -> None:
    for axis, value in point.items():
        _check_axis(axis, axes, place)
        if value not in axes[axis]:
            raise UsageError(f'{place} has {axis}={value!r}, which is not in axes.{axis}')
