"""The contents of a study's charts, which `interactive.py` and `static.py` draw.

Values are in the unit that is shown (percent, not fractions).
"""

import collections
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from experiments.report.reading import Study, TrialResult
from experiments.report.results import matching, sample, select, settings
from experiments.report.statistics import Sample
from experiments.report.wording import (
    Table,
    axis_label,
    is_percent,
    mean_and_error,
    metric_label,
    number,
    scale,
)
from experiments.study.schema import DONE, ChartSpec, Point, Value

_SPREAD = 0.06  # height over which the lines through one value of an axis are spread
NUM_COLORS = 7  # of a palette; further series repeat the colors
_TABLE_ROWS = 25  # at most, of a learning curve


class Mark(NamedTuple):
    """One x of a series: the mean over seeds."""

    x: Value
    mean: float
    error: float  # standard error of the mean; 0 with one seed
    values: tuple[float, ...]  # one for each seed
    diverged: int
    text: str


class Series(NamedTuple):
    """One entry of the legend."""

    name: str
    color: int  # index into the palette
    dash: int  # 0: solid
    marks: Sequence[Mark]
    ends: Sequence[tuple[float, float, str]] = ()  # x, y, text of diverged trials


class XY(NamedTuple):
    """Series over x: 'curves' and 'line' as lines with bands, 'bars', or only a 'table'."""

    kind: str
    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[str] | None  # the categories, if x is not numeric
    log_x: bool
    log_y: bool
    percent: bool
    series: Sequence[Series]

    def numbers(self) -> list[float]:
        """Returns the numeric x values in order: the ticks of a logarithmic axis."""
        return sorted({m.x for s in self.series for m in s.marks if isinstance(m.x, int | float)})

    def positions(self, series: Series) -> list:
        """Returns the x coordinates of a series: the values, or the indices of categories."""
        if self.x_ticks is None:
            return [mark.x for mark in series.marks]
        ticks: list[Value] = list(self.x_ticks)
        return [ticks.index(mark.x) for mark in series.marks]

    def table(self) -> Table:
        xs = list(dict.fromkeys(m.x for s in self.series for m in s.marks))
        if self.x_ticks is None:
            xs.sort()
        if len(xs) > _TABLE_ROWS:
            last = len(xs) - 1
            xs = [xs[round(i * last / (_TABLE_ROWS - 1))] for i in range(_TABLE_ROWS)]
        texts = [{m.x: m.text for m in s.marks} for s in self.series]
        rows = [[_written(x), *(text.get(x, '') for text in texts)] for x in xs]
        names = [s.name or self.y_label for s in self.series]
        return Table([self.x_label, *names], rows)

    def alt_text(self) -> str:
        """Returns a description of the chart for those who do not see it."""
        kind = 'Bars' if self.kind == 'bars' else 'Lines'
        names = '; '.join(s.name for s in self.series if s.name)
        return f'{kind} of {self.y_label} against {self.x_label}{": " if names else ""}{names}.'


class Heatmap(NamedTuple):
    """A grid of means over two axes."""

    title: str
    x_label: str
    y_label: str
    value_label: str
    columns: Sequence[str]
    rows: Sequence[str]
    means: Sequence[Sequence[float]]  # [row][column]; NaN if missing
    texts: Sequence[Sequence[str]]
    low: float  # ends of the color scale; diverged cells are off the scale and marked
    high: float

    def shade(self, mean: float) -> float:
        """Returns the position of a mean on the color scale, 0..1."""
        return min(1.0, max(0.0, (mean - self.low) / ((self.high - self.low) or 1.0)))

    def table(self) -> Table:
        header = [f'{self.y_label} \\ {self.x_label}', *self.columns]
        return Table(header, [[r, *t] for r, t in zip(self.rows, self.texts, strict=True)])

    def alt_text(self) -> str:
        cells = [
            (mean, text, row, column)
            for row, means, texts in zip(self.rows, self.means, self.texts, strict=True)
            for column, mean, text in zip(self.columns, means, texts, strict=True)
            if not math.isnan(mean)
        ]
        what = f'Heat map of {self.value_label} for {self.x_label} by {self.y_label}.'
        if not cells:
            return what
        (_, low, *low_at), (_, high, *high_at) = min(cells), max(cells)
        return (
            f'{what} Lowest {low} at {self.y_label} {low_at[0]}, {self.x_label} {low_at[1]}; '
            f'highest {high} at {self.y_label} {high_at[0]}, {self.x_label} {high_at[1]}.'
        )


class Thread(NamedTuple):
    """The line of one trial across all dimensions."""

    series: int
    heights: Sequence[float]  # 0..1
    text: str


class Parallel(NamedTuple):
    """Parallel coordinates: a line for every trial across the axes to its metric."""

    title: str
    dimensions: Sequence[tuple[str, Sequence[tuple[float, str]]]]  # label, (height, tick)s
    names: Sequence[str]  # one for each series
    colors: Sequence[int]
    threads: Sequence[Thread]
    rows: Table

    def table(self) -> Table:
        return self.rows

    def alt_text(self) -> str:
        labels = ', '.join(label for label, _ in self.dimensions)
        return f'Parallel coordinates of {len(self.threads)} trials across {labels}.'


Chart = XY | Heatmap | Parallel


def build(study: Study, spec: ChartSpec) -> list[Chart]:
    """Returns the charts of a spec: one, or a heat map for each setting of the open axes.

    Returns [] if no trial has recorded the metric (yet), or none at two steps for curves.
    """
    if spec.kind == 'heatmap':
        return _heatmaps(study, spec)
    if spec.kind == 'parallel':
        parallel = _parallel(study, spec)
        return [parallel] if parallel.threads else []
    xy = _curves(study, spec) if spec.kind == 'curves' else _over_axis(study, spec)
    return [xy] if xy.series else []


def _groups(study: Study, spec: ChartSpec, *shown: str) -> list[Point]:
    """Returns the settings that a chart separates: of its series and of all open axes."""
    known = {'seed', *spec.where, *shown, *(a for a in study.tuned if a != spec.series)}
    trials = _where(study, spec)
    open_axes = [
        axis
        for axis in study.axes
        if axis not in known and len({t.axes.get(axis) for t in trials} - {None}) > 1
    ]
    series = [] if spec.series in shown else [spec.series]
    axes = dict.fromkeys([*series, *open_axes])
    return settings(study, trials, axes)


def _where(study: Study, spec: ChartSpec) -> list[TrialResult]:
    return [t for t in study.trials if all(t.axes.get(a) == v for a, v in spec.where.items())]


def _styles(study: Study, spec: ChartSpec, groups: Sequence[Point]) -> list[tuple[str, int, int]]:
    """Returns name, color and dash of each group: a color for each value of the series axis."""
    seen: dict[int, int] = collections.defaultdict(int)
    styles = []
    known = study.axes[spec.series]
    for place, group in enumerate(groups):
        value = group.get(spec.series)
        color = known.index(value) if value in known else place
        if spec.series in group and value is None:
            color = len(known)
        parts = [
            study.label(a, v) if a == 'arm' else f'{axis_label(a)} {study.label(a, v)}'
            for a, v in group.items()
            if v is not None or a == spec.series
        ]
        shown = color % NUM_COLORS
        styles.append((', '.join(parts), color, seen[shown]))
        seen[shown] += 1
    return styles


def _curves(study: Study, spec: ChartSpec) -> XY:
    groups = _groups(study, spec)
    series = []
    for group, style in zip(groups, _styles(study, spec, groups), strict=True):
        trials = select(study, {**spec.where, **group})
        curves = [(t, study.curve(t, spec.y)) for t in trials if t.state in DONE]
        by_step: dict[float, list[float]] = collections.defaultdict(list)
        for step, value in itertools.chain.from_iterable(curve for _, curve in curves):
            by_step[step].append(value)
        marks = [_mark(step, Sample(tuple(by_step[step])), spec.y) for step in sorted(by_step)]
        ends = [
            (*end, f'seed {study.label("seed", t.axes.get("seed"))} diverged after step {t.step:,}')
            for t, curve in curves
            if t.state == 'diverged' and (end := _end(study, t, curve, spec.y))
        ]
        if marks or ends:
            series.append(Series(*style, marks, ends))
    if all(len(each.marks) < 2 for each in series):  # as of a split that is evaluated at the end
        series = []
    return _xy(study, spec, spec.x_label or 'step', series)


def _end(
    study: Study, trial: TrialResult, curve: list[tuple[float, float]], metric: str
) -> tuple[float, float] | None:
    """Returns the position of a diverged trial's mark: at its last value, or at chance level."""
    if curve:
        return curve[-1][0], curve[-1][1] * scale(metric)
    if metric == study.metric and study.chance is not None:
        return trial.step, study.chance * scale(metric)
    return None


def _over_axis(study: Study, spec: ChartSpec) -> XY:
    groups = _groups(study, spec, spec.x)
    own_colors = groups == [{}] and spec.series == spec.x  # each bar is a series
    if own_colors:
        groups = settings(study, _where(study, spec), [spec.x])
    series = []
    for group, style in zip(groups, _styles(study, spec, groups), strict=True):
        marks = []
        for x in study.axes[spec.x]:
            if own_colors and group[spec.x] != x:
                continue
            trials = select(study, {**spec.where, **group, spec.x: x})
            found = sample(study, trials, spec.y)
            if found.values or found.uncounted:
                marks.append(_mark(x, found, spec.y))
        if marks:
            series.append(Series(*style, marks))
    return _xy(study, spec, spec.x_label or axis_label(spec.x), series)


def _xy(study: Study, spec: ChartSpec, x_label: str, series: list[Series]) -> XY:
    values = study.axes[spec.x] if spec.kind != 'curves' else []
    ticks = None
    if spec.kind in ('bars', 'table') or not all(_is_number(v) for v in values):
        ticks = [study.label(spec.x, v) for v in values]
        series = [
            s._replace(marks=[m._replace(x=study.label(spec.x, m.x)) for m in s.marks])
            for s in series
        ]
    return XY(
        spec.kind,
        spec.title,
        x_label,
        metric_label(spec.y),
        ticks,
        spec.log_x and ticks is None,
        spec.log_y,
        is_percent(spec.y),
        series,
    )


def _mark(x: Value, found: Sample, metric: str) -> Mark:
    factor, error = scale(metric), found.standard_error
    return Mark(
        x,
        found.mean * factor,
        0.0 if math.isnan(error) else error * factor,
        tuple(value * factor for value in found.values),
        found.diverged + found.uncounted,
        mean_and_error(found, metric),
    )


def _heatmaps(study: Study, spec: ChartSpec) -> list[Chart]:
    others = _groups(study, spec, spec.x, spec.series)
    charts: list[Chart] = []
    for group in others:
        point = {**spec.where, **group}
        here = matching(study.trials, point)
        columns, rows = (
            [v for v in study.axes[axis] if any(t.axes.get(axis) == v for t in here)]
            for axis in (spec.x, spec.series)
        )
        samples = [
            [
                sample(study, select(study, {**point, spec.series: y, spec.x: x}), spec.y)
                for x in columns
            ]
            for y in rows
        ]
        if not any(s.values for row in samples for s in row):
            continue
        where = ', '.join(f'{axis_label(a)} {study.label(a, v)}' for a, v in group.items())
        empty = Sample(())
        found = [s for row in samples for s in row if s.values]
        means = [s.mean * scale(spec.y) for s in found if not s.diverged] or [
            s.mean * scale(spec.y) for s in found
        ]
        charts.append(
            Heatmap(
                spec.title + (f' ({where})' if where else ''),
                axis_label(spec.x),
                axis_label(spec.series),
                metric_label(spec.y),
                [study.label(spec.x, v) for v in columns],
                [study.label(spec.series, v) for v in rows],
                [[s.mean * scale(spec.y) for s in row] for row in samples],
                [['' if s == empty else mean_and_error(s, spec.y) for s in r] for r in samples],
                min(means),
                max(means),
            )
        )
    return charts


def _parallel(study: Study, spec: ChartSpec) -> Parallel:
    trials = [t for t in _where(study, spec) if _outcome(study, t, spec.y) is not None]
    axes = [a for a in study.axes if a != 'seed' and len({t.axes.get(a) for t in trials}) > 1]
    heights: dict[str, dict[Value, float]] = {}
    dimensions = []
    for axis in axes:
        values = [p[axis] for p in settings(study, trials, [axis])]
        heights[axis] = {v: i / (len(values) - 1) for i, v in enumerate(values)}
        ticks = [(height, study.label(axis, v)) for v, height in heights[axis].items()]
        dimensions.append((axis_label(axis), ticks))
    outcomes = [o for t in trials if (o := _outcome(study, t, spec.y)) is not None]
    finite = [o for o, t in zip(outcomes, trials, strict=True) if t.state == 'complete']
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    span, floor = (high - low) or 1.0, 0.15 if len(finite) < len(trials) else 0.0
    ticks = [(floor + (1 - floor) * i / 4, number(low + i / 4 * span, spec.y)) for i in range(5)]
    ticks += [(0.0, 'diverged')] if floor else []
    dimensions.append((metric_label(spec.y), ticks))

    groups = [p[spec.series] for p in settings(study, trials, [spec.series])]
    threads, rows = [], []
    for place, (trial, outcome) in enumerate(zip(trials, outcomes, strict=True)):
        lost = trial.state == 'diverged'
        written = 'diverged' if lost else number(outcome, spec.y)
        labels = [study.label(a, trial.axes.get(a)) for a in axes]
        # Draw trials that share all values side by side, not on top of one another.
        aside = _SPREAD * (place / max(1, len(trials) - 1) - 0.5)
        at = [heights[a][trial.axes.get(a)] + aside for a in axes]
        at.append(aside if lost else floor + (1 - floor) * (outcome - low) / span)
        text = ', '.join(f'{axis_label(a)} {v}' for a, v in zip(axes, labels, strict=True))
        threads.append(Thread(groups.index(trial.axes.get(spec.series)), at, f'{text}: {written}'))
        rows.append([trial.id, *labels, written])
    header = ['trial', *map(axis_label, axes), metric_label(spec.y)]
    order = list(study.axes[spec.series])
    return Parallel(
        spec.title,
        dimensions,
        [study.label(spec.series, g) for g in groups],
        [order.index(g) if g in order else len(order) for g in groups],
        threads,
        Table(header, rows),
    )


def _outcome(study: Study, trial: TrialResult, metric: str) -> float | None:
    """Returns the value of a trial's metric, None if it has none (yet)."""
    values = sample(study, [trial], metric).values
    return values[0] if values else None


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _written(x: Value) -> str:
    return f'{x:,g}' if _is_number(x) else str(x)
