"""Reads the directory of an `experiments.study`: study.json, validated, and the trials' curves."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.run import metric_writers
from experiments.study.schema import (
    NONE,
    NUMBER,
    STATES,
    SUMMARY_FILE,
    TIMES,
    ChartSpec,
    Claim,
    Fields,
    Point,
    Value,
    parse_chart,
    parse_claim,
)
from nfnets_jax.errors import UsageError, nearest


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """A trial as study.json records it."""

    id: str
    axes: Point
    state: str
    step: int
    metrics: Mapping[str, float]
    error: str | None


@dataclasses.dataclass(frozen=True)
class Study:
    """A study's settings and all its trials, in any state."""

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
    trials: Sequence[TrialResult]
    commands: Sequence[str]
    versions: Mapping[str, str]
    hardware: str

    def label(self, axis: str, value: Value) -> str:
        """Returns the text of a value of an axis: 'ResNet-8', '0.4', or '-' for None."""
        if value is None:
            return '-'
        if axis == 'arm':
            return self.arms.get(str(value), str(value))
        is_number = isinstance(value, float | int) and not isinstance(value, bool)
        return f'{value:g}' if is_number else str(value)

    def curve(self, trial: TrialResult, metric: str) -> list[tuple[float, float]]:
        """Returns (step, value) of the finite values in a trial's metrics; [] if it never began."""
        directory = self.path / 'trials' / trial.id
        if not (directory / metric_writers.METRICS_FILE).exists():
            return []
        return [
            (record['step'], record[metric])
            for record in metric_writers.read_metrics(directory)
            if math.isfinite(record.get(metric, math.nan))
        ]


def load(directory: str | os.PathLike) -> Study:
    """Reads the study in a directory, finished or not.

    Raises:
      UsageError: study.json is missing or invalid.
    """
    path = pathlib.Path(directory)
    file = path / SUMMARY_FILE
    try:
        fields = json.loads(file.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise UsageError(f'--workdir={directory} holds no study: there is no {file}') from None
    except OSError as error:
        raise UsageError(f'{file} cannot be read: {error.strerror}') from error
    except ValueError as error:
        raise UsageError(f'{file} is not JSON: {error}') from error
    try:
        return _parse(path, Fields(fields, ''))
    except UsageError as error:
        raise UsageError(f'{file}: {error}') from None


def _parse(path: pathlib.Path, fields: Fields) -> Study:
    axes = fields.take('axes', dict)
    for axis, values in axes.items():
        if not isinstance(values, list) or not all(isinstance(v, Value) for v in values):
            raise UsageError(f'axes.{axis}={values!r:.60} must be a list of texts and numbers')
    axes = {axis: _in_order(values) for axis, values in axes.items()}
    tuned = fields.take('tuned', list, [a for a in ('learning_rate',) if a in axes])
    for axis in tuned:
        if axis not in axes:
            raise UsageError(f'tuned has no axis {axis!r}{nearest(axis, axes)}')
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
        chance=fields.take('chance', (*NUMBER, NONE), None),
        claims=[parse_claim(f, axes, metric) for f in fields.objects('claims', [])],
        # Studies of earlier versions have charts of times: they are left out.
        charts=[
            chart
            for chart in (parse_chart(f, axes) for f in fields.objects('charts', []))
            if chart.y not in TIMES
        ],
        trials=[_trial(f, axes) for f in fields.objects('trials')],
        commands=fields.take('commands', list, []) or [fields.take('command', str)],
        versions=fields.take('versions', dict, {}),
        hardware=fields.take('hardware', str, ''),
    )


def _in_order(values: Sequence[Value]) -> Sequence[Value]:
    """Sorts numbers: those of a later grid, and of single arms, come after the others."""
    numbers = [v for v in values if isinstance(v, NUMBER) and not isinstance(v, bool)]
    return sorted(numbers) if len(numbers) == len(values) else values


def _trial(fields: Fields, axes: Mapping[str, Any]) -> TrialResult:
    id, point = fields.take('id', str), fields.point('axes', axes)
    if pathlib.PurePath(id).name != id or id == '..':
        raise UsageError(f'the trial id {id!r} must be the name of a directory in trials/')
    for axis, value in point.items():
        if value not in axes[axis]:
            raise UsageError(f'trial {id} has {axis}={value!r}, which is not in axes.{axis}')
    metrics = fields.take('metrics', (dict, NONE), None) or {}
    return TrialResult(
        id=id,
        axes=point,
        state=fields.one_of('state', STATES),
        step=fields.take('step', (int, NONE), None) or 0,
        metrics={k: v for k, v in metrics.items() if isinstance(v, NUMBER) and math.isfinite(v)},
        error=fields.take('error', (str, NONE), None),
    )
