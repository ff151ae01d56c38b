"""What `experiments.study` left in a directory: study.json, checked, and the trials' curves."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from experiments.run import metric_writers
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
)
from nfnets_jax import fields
from nfnets_jax.errors import UsageError
from nfnets_jax.fields import Field


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a study."""

    id: str
    axes: Point
    state: str
    step: int
    metrics: Mapping[str, float]
    error: str | None


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

    def label(self, axis: str, value: Value) -> str:
        """Returns how a value of an axis is written: 'ResNet-8', '0.4', or '-' for none."""
        if value is None:
            return '-'
        if axis == 'arm':
            return self.arms.get(str(value), str(value))
        is_number = isinstance(value, float | int) and not isinstance(value, bool)
        return f'{value:g}' if is_number else str(value)

    def curve(self, trial: Trial, metric: str) -> list[tuple[float, float]]:
        """Returns (step, value) where a trial recorded a finite value; [] if it never started."""
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
      UsageError: study.json is missing or is not what `experiments.study` writes.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TrialRecord:
    """What study.json holds of a trial."""

    id: Annotated[str, Field('Name of its directory in trials/.')]
    axes: Annotated[Mapping, Field('Its point of the grid.')]
    state: Annotated[State, Field('What became of it.')]
    step: Annotated[int | None, Field('Its last step.')] = None
    metrics: Annotated[Mapping | None, Field('Its last metrics.')] = None
    error: Annotated[str | None, Field('Why it failed.')] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Record:
    """What study.json holds besides fields of the study's config."""

    axes: Annotated[Mapping, Field('Axis -> its values.')]
    arms: Annotated[Mapping | None, Field('Arm -> its label.')] = None
    trials: Annotated[Sequence[Mapping], Field('As in _TrialRecord.')]
    command: Annotated[str, Field('The first of the commands.')] = ''
    commands: Annotated[Sequence[str], Field('All of them, since there may be several.')] = ()
    versions: Annotated[Mapping | None, Field('Package -> its version.')] = None
    hardware: Annotated[str, Field('What it ran on.')] = ''


_CONFIG = fields.options(StudyConfig)
_WORDS = ('name', 'title', 'question', 'setting', 'size', 'metric', 'higher_is_better')
_RECORD = (
    {key: _CONFIG[key]._replace(default=fields.REQUIRED) for key in _WORDS}
    | {key: _CONFIG[key] for key in ('chance', 'tuned', 'claims', 'charts')}
    | fields.options(_Record)
)


def _check(known: Mapping[str, fields.Option], record: Any, name: str = '') -> None:
    """Raises a UsageError unless known fields are as declared; other versions may have others."""
    if not isinstance(record, dict):
        raise UsageError(f'{name or "it"} must be an object, not {record!r:.60}')
    fields.check(known, {key: value for key, value in record.items() if key in known}, name)


def _parse(path: pathlib.Path, record: Any) -> Study:
    _check(_RECORD, record)
    for axis, values in record['axes'].items():
        if not isinstance(values, list) or not all(isinstance(v, Value) for v in values):
            raise UsageError(f'axes.{axis}={values!r:.60} must be a list of texts and numbers')
    axes = {axis: _in_order(values) for axis, values in record['axes'].items()}
    tuned = record.get('tuned', [axis for axis in ('learning_rate',) if axis in axes])
    for axis in tuned:
        check_axis(axis, axes, 'tuned')
    claims = enumerate(record.get('claims', ()))
    charts = enumerate(record.get('charts', ()))
    return Study(
        path=path,
        **{key: record[key] for key in _WORDS},
        axes=axes,
        tuned=tuned,
        arms=record.get('arms') or {},
        chance=record.get('chance'),
        claims=[parse_claim(c, axes, record['metric'], f'claims[{i}]') for i, c in claims],
        # Studies of earlier versions have charts of times: they are left out.
        charts=[
            chart
            for chart in (parse_chart(c, axes, f'charts[{i}]') for i, c in charts)
            if chart.y not in TIMES
        ],
        trials=[_trial(t, axes, f'trials[{i}]') for i, t in enumerate(record['trials'])],
        commands=record.get('commands') or [record.get('command', '')],
        versions=record.get('versions') or {},
        hardware=record.get('hardware', ''),
    )


def _in_order(values: Sequence[Value]) -> Sequence[Value]:
    """Sorts numbers: those of a later grid, and of single arms, come after the others."""
    numbers = [v for v in values if isinstance(v, float | int) and not isinstance(v, bool)]
    return sorted(numbers) if len(numbers) == len(values) else values


def _trial(record: Any, axes: Mapping[str, Any], name: str) -> Trial:
    _check(fields.options(_TrialRecord), record, name)
    id, point, metrics = record['id'], record['axes'], record.get('metrics') or {}
    if pathlib.PurePath(id).name != id or id == '..':
        raise UsageError(f'the trial id {id!r} must be the name of a directory in trials/')
    check_point(point, axes, f'{name}.axes')
    for axis, value in point.items():
        if value not in axes[axis]:
            raise UsageError(f'trial {id} has {axis}={value!r}, which is not in axes.{axis}')
    return Trial(
        id=id,
        axes=point,
        state=record['state'],
        step=record.get('step') or 0,
        metrics={
            k: v for k, v in metrics.items() if isinstance(v, float | int) and math.isfinite(v)
        },
        error=record.get('error'),
    )
