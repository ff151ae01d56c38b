"""Reads the directory of an `experiments.study`: study.json, validated, and the trials' curves."""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from experiments.run import metric_writers
from experiments.study import per_image
from experiments.study.per_image import Correct
from experiments.study.schema import (
    SUMMARY_FILE,
    TIMES,
    ChartSpec,
    Claim,
    Point,
    State,
    StudyConfig,
    Value,
    check_axis,
    check_point,
    parse_chart,
    parse_claim,
    selection_metric,
)
from nfnets_jax import fields
from nfnets_jax.errors import UsageError
from nfnets_jax.fields import Option


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialResult:
    """A trial as study.json records it."""

    id: str
    axes: Point
    state: State
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A study's settings and all its trials, in any state."""

    path: pathlib.Path
    name: str
    title: str
    question: str
    setting: str
    size: str
    axes: Mapping[str, Sequence[Value]]
    tuned: Sequence[str] = ()  # axes of which the best value is taken where none is asked for
    arms: Mapping[str, str] = field(default_factory=dict)  # arm -> its label
    metric: str
    higher_is_better: bool
    search: str = 'full'
    grids: Mapping[str, Mapping[str, Sequence[Value]]] = field(default_factory=dict)
    scopes: Mapping[str, str] = field(default_factory=dict)  # arm -> network, data and budget
    chance: float | None = None  # what a diverged trial counts as in means of `metric`
    claims: Sequence[Claim] = ()
    charts: Sequence[ChartSpec] = ()
    trials: Sequence[TrialResult]
    commands: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    hardware: str = ''

    def label(self, axis: str, value: Value) -> str:
        """Returns the text of a value of an axis: 'ResNet-8', '0.4', or '-' for None."""
        if value is None:
            return '-'
        if axis == 'arm':
            return self.arms.get(str(value), str(value))
        is_number = isinstance(value, float | int) and not isinstance(value, bool)
        return f'{value:g}' if is_number else str(value)

    @functools.cached_property
    def selection_metric(self) -> str:
        """The metric that chooses tuned values; of studies of earlier versions `metric` itself."""
        return selection_metric(self.metric, {name for t in self.trials for name in t.metrics})

    def arm_of(self, point: Point) -> str:
        """Returns the arm of a point; the first, where the point leaves it open."""
        return str(point.get('arm', next(iter(self.arms), '')))

    def grid_of(self, point: Point) -> dict[str, Sequence[Value]]:
        """Returns the values of the tuned axes that a point leaves open, before any extension.

        Studies of earlier versions do not say them: {}.
        """
        grid = self.grids.get(self.arm_of(point), {})
        return {axis: v for axis, v in grid.items() if axis in self.tuned and axis not in point}

    def correct(self, trial: TrialResult, metric: str) -> Correct | None:
        """Returns which images a trial has right, if a metric is their share and they are known."""
        split, _, name = metric.rpartition('/')
        if name != 'top1':
            return None
        if trial.id not in self._correct:
            self._correct[trial.id] = per_image.read(self.path / 'trials' / trial.id)
        return self._correct[trial.id].get(split)

    @functools.cached_property
    def _correct(self) -> dict[str, dict[str, Correct]]:
        return {}

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
        record = json.loads(file.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise UsageError(f'--workdir={directory} holds no study: there is no {file}') from None
    except OSError as error:
        raise UsageError(f'{file} cannot be read: {error.strerror}') from error
    except ValueError as error:
        raise UsageError(f'{file} is not JSON: {error}') from error
    try:
        return _parse(path, record)
    except UsageError as error:
        raise UsageError(f'{file}: {error}') from None


def _read(known: Mapping[str, Option], record: Any, name: str = '') -> dict[str, Any]:
    """Returns the known fields of an object of study.json, checked; null counts as missing.

    Versions before and after this one write others, too.
    """
    if not isinstance(record, dict):
        raise UsageError(f'{name or "it"} must be an object, not {record!r:.60}')
    read = {key: record[key] for key in known if record.get(key) is not None}
    fields.check(known, read, name)
    return read


def _parse(path: pathlib.Path, record: Any) -> Study:
    known, config = fields.options(Study), fields.options(StudyConfig)
    known |= {'claims': config['claims'], 'charts': config['charts']}
    known['trials'] = known['trials']._replace(type=Sequence[Mapping])
    del known['path']
    read = _read(known, record)
    for axis, values in read['axes'].items():
        if not isinstance(values, list) or not all(isinstance(v, Value) for v in values):
            raise UsageError(f'axes.{axis}={values!r:.60} must be a list of texts and numbers')
    axes = read['axes'] = {axis: _in_order(values) for axis, values in read['axes'].items()}
    read.setdefault('tuned', [axis for axis in ('learning_rate',) if axis in axes])
    for axis in read['tuned']:
        check_axis(axis, axes, 'tuned')
    claims, charts = enumerate(read.get('claims', ())), enumerate(read.get('charts', ()))
    parsed = [parse_chart(chart, axes, f'charts[{i}]') for i, chart in charts]
    read |= {
        'claims': [parse_claim(c, axes, read['metric'], f'claims[{i}]') for i, c in claims],
        # Studies of earlier versions have charts of times, and one command: charts are left out.
        'charts': [chart for chart in parsed if chart.y not in TIMES],
        'commands': read.get('commands') or [record.get('command', '')],
        'trials': [_trial(t, axes, f'trials[{i}]') for i, t in enumerate(read['trials'])],
    }
    return Study(path=path, **read)


def _in_order(values: Sequence[Value]) -> Sequence[Value]:
    """Sorts numbers: those of a later grid, and of single arms, come after the others."""
    numbers = [v for v in values if isinstance(v, float | int) and not isinstance(v, bool)]
    return sorted(numbers) if len(numbers) == len(values) else values


def _trial(record: Any, axes: Mapping[str, Any], name: str) -> TrialResult:
    trial = TrialResult(**_read(fields.options(TrialResult), record, name))
    if pathlib.PurePath(trial.id).name != trial.id or trial.id == '..':
        raise UsageError(f'the trial id {trial.id!r} must be the name of a directory in trials/')
    check_point(trial.axes, axes, f'{name}.axes')
    for axis, value in trial.axes.items():
        if value not in axes[axis]:
            raise UsageError(f'trial {trial.id} has {axis}={value!r}, which is not in axes.{axis}')
    finite = {
        key: value
        for key, value in trial.metrics.items()
        if isinstance(value, float | int) and math.isfinite(value)
    }
    return dataclasses.replace(trial, metrics=finite)
