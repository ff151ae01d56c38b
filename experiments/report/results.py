"""Aggregates trials over seeds, picks the tuned values and judges claims."""

import collections
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.report import statistics
from experiments.report.reading import Study, TrialResult
from experiments.report.statistics import Comparison, Option, Runs, Sample, Verdict
from experiments.report.wording import is_exact
from experiments.study.schema import DONE, Claim, Point, Value, has_learned

Key = tuple[tuple[str, Value], ...]  # a hashable Point


class Tuning(NamedTuple):
    """The grid search of one setting: an arm at a batch size, ..."""

    setting: Point  # all axes but the tuned ones and the seed
    chosen: Point  # best values of the tuned axes
    sample: Sample  # the study's metric at the chosen values
    tried: dict[str, list[Value]]  # the values of each tuned axis, in order
    by_choice: dict[Key, Sample]
    learned: bool = True  # whether the best of several is above chance, where that is known

    def at_edge(self) -> list[str]:
        """Returns the tuned axes whose best value is the first or last of those tried."""
        return [axis for axis in self.tried if self.edge(axis)]

    def edge(self, axis: str) -> str:
        """Returns 'smallest' or 'largest' if the best value of a tuned axis is that, else ''.

        Of the values that were tried with the best ones of the other axes.
        """
        chosen = key(self.chosen)
        beside = [
            values[axis]
            for values in map(dict, self.by_choice)
            if key(values | {axis: self.chosen[axis]}) == chosen
        ]
        if len(beside) < 2 or None in beside:
            return ''
        ends = {'smallest': min(beside), 'largest': max(beside)}  # type: ignore[type-var]
        return next((name for name, end in ends.items() if end == self.chosen[axis]), '')


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
        elif trial.state == 'diverged' and metric in (study.metric, study.selection_metric):
            if study.chance is None:
                uncounted += 1
            else:
                by_seed[seed].append(study.chance)
                diverged.add(seed)
    return Sample(tuple(float(sum(v) / len(v)) for v in by_seed.values()), len(diverged), uncounted)


def tune(study: Study, trials: Sequence[TrialResult], tuned: Sequence[str]) -> Tuning | None:
    """Returns the values of the tuned axes with the best mean over the seeds, by validation.

    Values of a search that have fewer seeds than others rank below those, values with uncounted
    diverged trials below all others; between equals the smaller value wins.
    None if no trial has ended.
    """
    ended = [t for t in trials if t.state in DONE]
    if not ended:
        return None
    choices = settings(study, ended, tuned)
    found = [matching(ended, choice) for choice in choices]
    samples = [sample(study, trials, study.metric) for trials in found]
    judged = [sample(study, trials, study.selection_metric) for trials in found]

    def score(one: Sample) -> tuple[int, int, float]:
        mean = one.mean if study.higher_is_better else -one.mean
        seeds = len(one.values) if study.search == 'coarse' else 0
        return seeds, -one.uncounted, -math.inf if math.isnan(mean) else mean

    best = max(range(len(choices)), key=lambda i: score(judged[i]))
    tried = {axis: [p[axis] for p in settings(study, ended, [axis])] for axis in tuned}
    searched = study.higher_is_better and len(choices) > 1
    others = [a for a in study.axes if a not in (*tuned, 'seed')]
    return Tuning(
        {a: ended[0].axes.get(a) for a in others},
        choices[best],
        samples[best],
        {a: _sorted(v) for a, v in tried.items() if v != [None]},
        {key(c): s for c, s in zip(choices, samples, strict=True)},
        not searched or has_learned(samples[best].mean, study.chance),
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


def judge(study: Study) -> list[Judgement]:
    """Tests the claims of a study on its trials, corrected for their number."""
    tested = [_test(study, claim) for claim in study.claims]
    found = [test for _, test in tested if test is not None]
    corrected = iter(statistics.holm([test.p for test in found]))
    return [
        judgement if test is None else _decide(judgement, test, next(corrected), len(found))
        for judgement, test in tested
    ]


def _decide(
    judgement: Judgement, test: statistics.Evidence, corrected: float, claims: int
) -> Judgement:
    of = test.estimate
    tunings = [tuning for side in judgement.tunings for tuning in side]
    reason = ''
    if any(tuning.at_edge() for tuning in tunings):
        reason = 'the best value tried is at the edge of the grid: give --extend'
    elif not all(tuning.learned for tuning in tunings):
        reason = 'no value tried of one side has learned: give --extend, or another grid'
    verdict = Verdict.UNDECIDED if reason else statistics.decide(test, corrected)
    return judgement._replace(
        comparison=Comparison(
            verdict,
            of.difference,
            of.interval(),
            reason,
            p=test.p,
            corrected=corrected,
            detectable=statistics.detectable(test.rivals, statistics.LEVEL / claims),
            basis='seeds and images' if of.counts_images else 'seeds alone',
        )
    )


def _test(study: Study, claim: Claim) -> tuple[Judgement, statistics.Evidence | None]:
    """Returns a claim without its verdict, and its test; None where the verdict needs none."""
    points = [point for point in (claim.better, claim.worse) if point is not None]
    nothing = Comparison(Verdict.UNTESTED, math.nan, (math.nan, math.nan))
    if len(points) < 2 or not all(matching(study.trials, point) for point in points):
        nothing = nothing._replace(reason='this study does not test it')
        return Judgement(claim, nothing, None), None
    first, second = (sample(study, select(study, point), claim.metric) for point in points)
    of_first, of_second = ([t for _, t in _tuned(study, point) if t] for point in points)
    nothing = nothing._replace(difference=first.mean - second.mean)
    judgement = Judgement(claim, nothing, (first, second), (of_first, of_second))

    def without(reason: str) -> tuple[Judgement, None]:
        return judgement._replace(comparison=nothing._replace(reason=reason)), None

    if first.uncounted or second.uncounted:
        return without('trials diverged, and what chance gives is not known')
    if is_exact(claim.metric) and first.values and second.values:
        return judgement._replace(comparison=_exact(claim, nothing.difference)), None
    fewest = min(len(first.values), len(second.values))
    if fewest < 2:
        return without(f'{fewest or "no"} seed of one side, and a test needs two')
    sizes = [math.prod(len(v) for v in grid.values()) for grid in map(study.grid_of, points)]
    if len(set(sizes)) > 1:
        return without(f'the grids of the two sides have {sizes[0]} and {sizes[1]} points')
    ours, theirs = (_options(study, point, claim.metric) for point in points)
    return judgement, statistics.weigh(ours, theirs, claim.margin, claim.direction)


def _exact(claim: Claim, difference: float) -> Comparison:
    """Returns the outcome of a claim about a figure that is the same in every run."""
    signed = {'greater': difference - claim.margin, 'less': claim.margin - difference}
    signed['same'] = claim.margin - abs(difference)
    verdict = Verdict.AGREES if signed[claim.direction] > 0 else Verdict.DOES_NOT
    return Comparison(verdict, difference, (difference, difference), basis='exact')


def _options(study: Study, point: Point, metric: str) -> list[Option]:
    """Returns the choices of the tuned axes that a point leaves open, those with most seeds."""
    trials, tuning = (groups := _tuned(study, point))[0]
    if len(groups) > 1 or tuning is None:  # Averaged over axes that are not tuned.
        choices = [select(study, point)]
    else:
        choices = [matching(trials, dict(choice)) for choice in tuning.by_choice]
    made = [_option(study, trials, metric) for trials in choices]
    most = max(len(option.selection) for option in made)
    return [option for option in made if len(option.selection) == most]


def _option(study: Study, trials: Sequence[TrialResult], metric: str) -> Option:
    sign = 1.0 if study.higher_is_better else -1.0
    seeds = dict.fromkeys(trial.axes.get('seed') for trial in trials)
    by_seed = [[t for t in trials if t.axes.get('seed') == seed] for seed in seeds]
    values, selection, correct, images = [], [], [], set()
    for group in by_seed:
        found = sample(study, group, metric)
        if not found.values:
            continue
        chosen = sample(study, group, study.selection_metric)
        values.append(found.mean)
        selection.append(sign * chosen.mean if chosen.values else -math.inf)
        rows = [study.correct(trial, metric) for trial in group]
        images |= {row.images for row in rows if row is not None}
        correct += [None if row is None else row.is_correct for row in rows]
    known = [row for row in correct if row is not None]
    diverged = sum(trial.state == 'diverged' for trial in trials)
    if len(images) != 1 or len(known) + diverged < len(correct) or len(correct) > len(values):
        return Option(np.array(selection), Runs(values))
    # A diverged trial is at chance level on every image.
    chance = np.full(known[0].shape, study.chance, np.float32)
    table = np.stack([chance if row is None else row.astype(np.float32) for row in correct])
    return Option(np.array(selection), Runs(table.mean(axis=1, dtype=np.float64), table, *images))
