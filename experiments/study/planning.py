"""Decides which trials a study needs, given those that have ended.

Without a search these are all points of the grid. With `study.search='coarse'` every point runs
with the first seed only; the best by validation, and the points beside it on each tuned axis, run
with all seeds, until the best of those has its neighbors beside it. With `extend`, an axis whose
best value is the first or last goes on by the ratio of its last two values, and in both directions
while no value has learned anything. Where a claim names a value of a tuned axis, the best of the
points with this value is searched for likewise.

A plan follows from the journal alone, so all workers make the same.
"""

import collections
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments import config as schema
from experiments.study import config as study_config
from experiments.study.config import Trial
from experiments.study.journal import TrialRecord
from experiments.study.schema import DONE, has_learned, selection_metric
from nfnets_jax.errors import UsageError

Point = tuple  # values of the tuned axes, in order


class Planner:
    """Plans the trials of a study.

    Args:
      study: the study.
      extend: whether to extend grids whose best value is at the edge.

    Attributes:
      grid: the trials of the whole grid, with all seeds.
    """

    def __init__(self, study: ConfigDict, *, extend: bool = False):
        self._study = study
        self._most = study.extensions if extend else 0
        self.grid = study_config.make_trials(study)
        self._trials = {trial.id: trial for trial in self.grid}

    @property
    def grows(self) -> bool:
        """Whether the results of some trials decide about others."""
        return bool(self._most) or self._study.search == 'coarse'

    def plan(self, records: Sequence[TrialRecord]) -> list[Trial]:
        """Returns the trials that the study needs now, ended or not.

        If all of them have ended, the study is complete.
        """
        known = {record.id: record for record in records}
        if not self.grows:
            return list(self._trials.values())
        ids = [
            id
            for setting, grid in self._settings()
            for id in _Search(self, setting, grid, self._named_values(setting, grid)).run(known)
        ]
        by_program: dict[str, list[Trial]] = {}
        for id in ids:
            by_program.setdefault(self._trials[id].program, []).append(self._trials[id])
        return [trial for group in by_program.values() for trial in group]

    def _settings(self) -> Iterator[tuple[dict[str, Any], dict[str, list]]]:
        """Yields each arm at each value of the axes that are not tuned, and the tuned values."""
        for arm in self._study.arms:
            grid = study_config.arm_grid(self._study, arm)
            tuned = {a: sorted(v) for a, v in grid.items() if a in self._study.tuned}
            others = [axis for axis in grid if axis not in tuned and axis != 'seed']
            for values in itertools.product(*(grid[axis] for axis in others)):
                setting = {'arm': arm['name'], **dict(zip(others, values, strict=True))}
                yield setting, tuned | {'seed': list(grid.get('seed', ()))}

    def _named_values(
        self, setting: Mapping[str, Any], grid: Mapping[str, list]
    ) -> list[dict[int, Any]]:
        """Returns which values of the tuned axes, by their positions, claims name in a setting."""
        compared = [claim.get('compare') or {} for claim in self._study.claims]
        points = [pair.get(side) or {} for pair in compared for side in ('better', 'worse')]
        tuned = [axis for axis in grid if axis != 'seed']
        found: list[dict[int, Any]] = []
        for point in points:
            if all(setting[key] == point[key] for key in setting.keys() & point.keys()):
                named = {i: point[axis] for i, axis in enumerate(tuned) if axis in point}
                found += [named] if named and named not in found else []
        return found

    def trial(self, point: Mapping[str, Any]) -> Trial | None:
        """Returns the trial at a point; None if no config may have these values."""
        id = study_config.trial_id(self._study, point)
        if id not in self._trials:
            made = study_config.make_trial(self._study, point)
            try:
                schema.check(made.config)
            except UsageError:
                return None
            self._trials[id] = made
        return self._trials[id]

    def score(self, records: Sequence[TrialRecord]) -> float:
        """Returns the mean of what chooses among tuned values, larger is better."""
        study = self._study
        metric = selection_metric(study.metric, {name for r in records for name in r.metrics})
        values = []
        for record in records:
            value = record.metrics.get(metric) if record.state == 'complete' else study.chance
            if record.state not in DONE or value is None or math.isnan(value):
                return -math.inf
            values.append(value if study.higher_is_better else -value)
        return sum(values) / len(values)

    def has_learned(self, score: float) -> bool:
        """Returns whether a score is of a network that has learned something, if that is known."""
        study = self._study
        return not study.higher_is_better or has_learned(score, study.chance)

    @property
    def most(self) -> int:
        return self._most

    @property
    def is_coarse(self) -> bool:
        return self._study.search == 'coarse'


class _Search:
    """The search of one setting: an arm at a batch size, ...

    Args:
      planner: makes the trials.
      setting: the arm, and the values of the axes that are not tuned.
      grid: the values of the tuned axes, and of the seed.
      named: values of some tuned axes, by position. The best point with such values is searched
        for as the best of all is.
    """

    def __init__(
        self,
        planner: Planner,
        setting: dict[str, Any],
        grid: dict[str, list],
        named: Sequence[Mapping[int, Any]],
    ):
        self._planner, self._setting = planner, setting
        self._named: list[Mapping[int, Any]] = [{}, *named]
        self._seeds: list = grid.pop('seed') or [None]
        self._axes = list(grid)
        self._added: collections.Counter[tuple] = collections.Counter()
        few = self._seeds[:1] if planner.is_coarse else self._seeds
        self._points: dict[Point, list] = dict.fromkeys(itertools.product(*grid.values()), few)

    def run(self, known: Mapping[str, TrialRecord]) -> list[str]:
        """Returns the ids of the trials that are needed now."""
        while True:
            ids = {point: self._ids(point) for point in self._points}
            needed = [id for several in ids.values() for id in several]
            if not all(id in known and known[id].ended for id in needed):
                return needed
            grown: dict[Point, list] = {}
            for named in self._named:
                for point, seeds in self._grow(named, ids, known).items():
                    grown[point] = max(grown.get(point, []), seeds, key=len)
            if not grown:
                return needed
            self._points |= grown

    def _grow(
        self,
        named: Mapping[int, Any],
        ids: Mapping[Point, Sequence[str]],
        known: Mapping[str, TrialRecord],
    ) -> dict[Point, list]:
        """Returns points beside the best of those with the named values, and their seeds."""
        points = [p for p in ids if all(p[i] == value for i, value in named.items())]
        if not points:
            return {}
        most_seeds = max(len(ids[point]) for point in points)
        scores = {
            point: self._planner.score([known[id] for id in ids[point]])
            for point in points
            if len(ids[point]) == most_seeds
        }
        best = max(scores, key=lambda point: scores[point])
        learned = self._planner.has_learned(scores[best])
        # Of each axis whose value is not named.
        tried = {
            i: sorted({point[i] for point in points})
            for i in range(len(self._axes))
            if i not in named
        }
        beyond = self._extensions(best, tried, named, anywhere=not learned)
        new = dict.fromkeys(beyond, self._points[best])
        if self._planner.is_coarse and not (new and most_seeds < len(self._seeds)):
            around = (best, *new, *_neighbors(best, tried))
            new = {p: self._seeds for p in around if self._points.get(p) != self._seeds}
        return new

    def _extensions(
        self,
        best: Point,
        tried: Mapping[int, list],
        named: Mapping[int, Any],
        *,
        anywhere: bool,
    ) -> Iterator[Point]:
        """Yields new points beyond the edges at which the best lies, and counts them.

        With `anywhere` the best may lie inside.
        """
        for i, values in tried.items():
            key = (i, *sorted(named.items()))
            for first, second in (
                ((values[0], values[1]), (values[-1], values[-2])) if len(values) > 1 else ()
            ):
                at_edge = best[i] == first or anywhere
                if not at_edge or self._added[key] >= self._planner.most:
                    continue
                if not isinstance(first, float) or min(first, second) <= 0:
                    continue
                point = _with_value(best, i, float(f'{first * first / second:.3g}'))
                if self._planner.trial(self._trial_axes(point, self._seeds[0])) is None:
                    continue
                self._added[key] += 1
                yield point

    def _ids(self, point: Point) -> list[str]:
        trials = [
            self._planner.trial(self._trial_axes(point, seed)) for seed in self._points[point]
        ]
        return [trial.id for trial in trials if trial is not None]

    def _trial_axes(self, point: Point, seed: Any) -> dict[str, Any]:
        seeds = {} if seed is None else {'seed': seed}
        return self._setting | dict(zip(self._axes, point, strict=True)) | seeds


def _neighbors(best: Point, tried: Mapping[int, list]) -> Iterator[Point]:
    """Yields the points beside the best on each axis, among the values tried."""
    for i, values in tried.items():
        place = values.index(best[i])
        for j in (place - 1, place + 1):
            if 0 <= j < len(values):
                yield _with_value(best, i, values[j])


def _with_value(point: Point, i: int, value: Any) -> Point:
    return (*point[:i], value, *point[i + 1 :])
