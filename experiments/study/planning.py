"""Decides which trials a study needs, given those that have ended.

Without a search these are all points of the grid. With `study.search='coarse'` every point runs
with the first seed only; the best by validation, and the points beside it on each tuned axis, run
with all seeds, until the best of those has its neighbors beside it. With `extend`, an axis whose
best value is the first or last goes on by the ratio of its last two values.

A plan follows from the journal alone, so all workers make the same.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments import config as schema
from experiments.study import config as study_config
from experiments.study.config import Trial
from experiments.study.journal import TrialRecord
from experiments.study.schema import DONE, selection_metric
from nfnets_jax.errors import UsageError

Point = tuple  # values of the tuned axes, in order


class Planner:
    """Plans the trials of a study.

    Args:
      study: the study.
      extend: whether to extend grids whose best value is at the edge.
    """

    def __init__(self, study: ConfigDict, *, extend: bool = False):
        self._study = study
        self._most = study.extensions if extend else 0
        self._trials = {trial.id: trial for trial in study_config.make_trials(study)}

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
        ids = [id for setting in self._settings() for id in _Search(self, *setting).run(known)]
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

    @property
    def most(self) -> int:
        return self._most

    @property
    def is_coarse(self) -> bool:
        return self._study.search == 'coarse'


class _Search:
    """The search of one setting: an arm at a batch size, ..."""

    def __init__(self, planner: Planner, setting: dict[str, Any], grid: dict[str, list]):
        self._planner, self._setting = planner, setting
        self._seeds: list = grid.pop('seed') or [None]
        self._values = {axis: list(values) for axis, values in grid.items()}
        self._added = dict.fromkeys(grid, 0)
        few = self._seeds[:1] if planner.is_coarse else self._seeds
        self._points: dict[Point, list] = dict.fromkeys(
            itertools.product(*self._values.values()), few
        )

    def run(self, known: Mapping[str, TrialRecord]) -> list[str]:
        """Returns the ids of the trials that are needed now."""
        while True:
            ids = {point: self._ids(point) for point in self._points}
            needed = [id for several in ids.values() for id in several]
            if not all(id in known and known[id].ended for id in needed):
                return needed
            most_seeds = max(map(len, ids.values()))
            best = max(
                (point for point in ids if len(ids[point]) == most_seeds),
                key=lambda point: self._planner.score([known[id] for id in ids[point]]),
            )
            if not self._grow(best, searching=most_seeds < len(self._seeds)):
                return needed

    def _grow(self, best: Point, *, searching: bool) -> bool:
        """Adds points beside the best, or seeds to them; returns whether there are any to add."""
        new = dict.fromkeys(self._extensions(best), self._points[best])
        if self._planner.is_coarse and not (searching and new):
            around = (best, *new, *self._neighbors(best))
            new = {p: self._seeds for p in around if self._points.get(p) != self._seeds}
        self._points |= new
        return bool(new)

    def _neighbors(self, best: Point) -> Iterator[Point]:
        for i, axis in enumerate(self._values):
            place = self._values[axis].index(best[i])
            for j in (place - 1, place + 1):
                if 0 <= j < len(self._values[axis]):
                    yield (*best[:i], self._values[axis][j], *best[i + 1 :])

    def _extensions(self, best: Point) -> list[Point]:
        """Returns new points beyond the edges at which the best lies, and adds their values."""
        found = []
        for i, (axis, values) in enumerate(self._values.items()):
            for first, second in (
                ((values[0], values[1]), (values[-1], values[-2])) if len(values) > 1 else ()
            ):
                if best[i] != first or self._added[axis] >= self._planner.most:
                    continue
                if not isinstance(first, float) or min(first, second) <= 0:
                    continue
                value = float(f'{first * first / second:.3g}')
                point = (*best[:i], value, *best[i + 1 :])
                if self._planner.trial(self._axes(point, self._seeds[0])) is None:
                    continue
                self._added[axis] += 1
                found.append((axis, value, point))
        for axis, value, _ in found:
            self._values[axis] = sorted([*self._values[axis], value])
        return [point for _, _, point in found]

    def _ids(self, point: Point) -> list[str]:
        trials = [self._planner.trial(self._axes(point, seed)) for seed in self._points[point]]
        return [trial.id for trial in trials if trial is not None]

    def _axes(self, point: Point, seed: Any) -> dict[str, Any]:
        seeds = {} if seed is None else {'seed': seed}
        return self._setting | dict(zip(self._values, point, strict=True)) | seeds
