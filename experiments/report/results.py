"""Aggregates trials over seeds, picks the tuned values and judges claims."""

import collections
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from experiments.report.reading import Study, TrialResult
from experiments.report.statistics import Comparison, Sample, Verdict, compare
from experiments.study.schema import DONE, Claim, Point, Value

Key = tuple[tuple[str, Value], ...]  # a hashable Point


class Tuning(NamedTuple):
    """The grid search of one setting: an arm at a batch size, ..."""

    setting: Point  # all axes but the tuned ones and the seed
    chosen: Point  # best values of the tuned axes
    sample: Sample  # the study's metric at the chosen values
    tried: dict[str, list[Value]]  # the values of each tuned axis, in order
    by_choice: dict[Key, Sample]

    def at_edge(self) -> list[str]:
        """Returns the tuned axes whose best value is the first or last of those tried."""
        return [
            axis
            for axis, values in self.tried.items()
            if len(values) > 1 and self.chosen[axis] in (values[0], values[-1])
        ]


def key(point: Point) -> Key:
    return tuple(sorted(point.items()))


def matching(trials: Iterable[TrialResult], point: Point) -> list[TrialResult]:
    """Returns the trials with the values of a point; None: the trial does not have the axis."""
    return [t for t in trials if all(t.axes.get(axis) == v for axis, v in point.items())]


def settings(study: Study, trials: Iterable[TrialResult], axes: Iterable[str]) -> list[Point]:
    """Returns the distinct points of trials on some axes, in the order of the study's values."""

    def rank(point: Point) -> list[int]:
        order = study.axes
        return [-1 if v is None else order[axis].index(v) for axis, v in point.items()]

    axes = list(axes)
    points = {key(p): p for p in ({a: t.axes.get(a) for a in axes} for t in trials)}
    return sorted(points.values(), key=rank)


def sample(study: Study, trials: Iterable[TrialResult], metric: str) -> Sample:
    """Returns the values of a metric over seeds, without trials that have no value (yet).

    If several trials share a seed, because an axis that is not tuned is open, their mean counts.
    """
    by_seed: dict[Value, list[float]] = collections.defaultdict(list)
    diverged, uncounted = set(), 0
    for trial in trials:
        seed = trial.axes.get('seed')
        if metric in trial.metrics and trial.state == 'complete':
            by_seed[seed].append(trial.metrics[metric])
        elif trial.state == 'diverged' and metric == study.metric:
            if study.chance is None:
                uncounted += 1
            else:
                by_seed[seed].append(study.chance)
                diverged.add(seed)
    return Sample(tuple(float(sum(v) / len(v)) for v in by_seed.values()), len(diverged), uncounted)


def tune(study: Study, trials: Sequence[TrialResult], tuned: Sequence[str]) -> Tuning | None:
    """Returns the values of the tuned axes with the best mean metric over the seeds.

    Values with uncounted diverged trials rank below all others; between equals the smaller value
    wins. None if no trial has ended.
    """
    ended = [t for t in trials if t.state in DONE]
    if not ended:
        return None
    choices = settings(study, ended, tuned)
    samples = [sample(study, matching(ended, choice), study.metric) for choice in choices]

    def score(one: Sample) -> tuple[int, float]:
        mean = one.mean if study.higher_is_better else -one.mean
        return -one.uncounted, -math.inf if math.isnan(mean) else mean

    best = max(range(len(choices)), key=lambda i: score(samples[i]))
    tried = {axis: [p[axis] for p in settings(study, ended, [axis])] for axis in tuned}
    others = [a for a in study.axes if a not in (*tuned, 'seed')]
    return Tuning(
        {a: ended[0].axes.get(a) for a in others},
        choices[best],
        samples[best],
        {a: _sorted(v) for a, v in tried.items() if v != [None]},
        {key(c): s for c, s in zip(choices, samples, strict=True)},
    )


def _sorted(values: list[Value]) -> list[Value]:
    """Returns the values of an axis in order; unchanged if one of them is None."""
    if None in values:
        return values
    return sorted(values)  # type: ignore[type-var]  # the values of an axis are of one type


def tunings(study: Study, trials: Sequence[TrialResult] | None = None) -> list[Tuning]:
    """Returns a tuning for every setting of the other axes with an ended trial."""
    trials = study.trials if trials is None else trials
    others = [a for a in study.axes if a not in (*study.tuned, 'seed')]
    found = (
        tune(study, matching(trials, point), study.tuned)
        for point in settings(study, trials, others)
    )
    return [tuning for tuning in found if tuning]


def select(study: Study, point: Point) -> list[TrialResult]:
    """Returns the trials of a point, at the best value of each tuned axis that it does not name.

    The best value is by the study's metric, separately for every setting of the other axes.
    """
    selected = []
    for here, tuning in _tuned(study, point):
        selected += matching(here, tuning.chosen) if tuning else here
    return selected


def _tuned(study: Study, point: Point) -> list[tuple[list[TrialResult], Tuning | None]]:
    """Returns the trials of a point and their tuning, for every setting of its other axes."""
    trials = matching(study.trials, point)
    open_axes = [axis for axis in study.tuned if axis not in point]
    if not open_axes:
        return [(trials, None)]
    others = [a for a in study.axes if a not in (*open_axes, 'seed')]
    found = [matching(trials, setting) for setting in settings(study, trials, others)]
    return [(here, tune(study, here, open_axes)) for here in found]


class Judgement(NamedTuple):
    """A claim and its outcome."""

    claim: Claim
    comparison: Comparison
    samples: tuple[Sample, Sample] | None  # better, worse; None if the study does not test it
    tunings: tuple[list[Tuning], list[Tuning]] = ([], [])  # of better, of worse


def judge(study: Study, claim: Claim) -> Judgement:
    """Tests a claim on the trials."""
    points = [point for point in (claim.better, claim.worse) if point is not None]
    if len(points) < 2 or not all(matching(study.trials, point) for point in points):
        nothing = Comparison(
            Verdict.UNTESTED, math.nan, (math.nan, math.nan), 'this study does not test it'
        )
        return Judgement(claim, nothing, None)
    better, worse = (sample(study, select(study, point), claim.metric) for point in points)
    comparison = compare(better, worse, margin=claim.margin, direction=claim.direction)
    of_better, of_worse = ([t for _, t in _tuned(study, point) if t] for point in points)
    return Judgement(claim, comparison, (better, worse), (of_better, of_worse))
