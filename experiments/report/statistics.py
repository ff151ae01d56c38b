"""Means over seeds, and tests of the difference of two arms that count seeds, images and tuning.

A difference of two means varies with the seeds and with the test images. With the accuracy x[s, i]
of seed s on image i, seeds crossed with images, its variance is estimated as

    V = max(S + D - R, S, D),   S = s_A^2 / n_A + s_B^2 / n_B,   D = d^2 / N,
                                R = r_A^2 / (n_A N) + r_B^2 / (n_B N)

s^2 is the variance over seeds of the mean over images, d^2 that over images of the difference of
the means over seeds, and r^2 that of what seeds and images leave, which S and D both count. Neither
S nor D expects more than the true variance, so none may be undercut by chance. The degrees of
freedom are Satterthwaite's.

Tuning is counted by an intersection-union test: 'the best of A is better than the best of B' holds
if one choice of A is better than every choice of B. For each seed the choice of A is the best by
validation of the other seeds, so it does not depend on that seed's luck; p is the largest over all
choices of B.
"""

import enum
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, special, stats

LEVEL = 0.05  # share of studies with a false verdict among their claims, at most
POWER = 0.8


class Sample(NamedTuple):
    """The values of one metric, one for each seed.

    `diverged` of the values are of diverged trials, which count as chance level. `uncounted` trials
    also diverged but have no value, because the study does not give the chance level.
    """

    values: tuple[float, ...]
    diverged: int = 0
    uncounted: int = 0

    @property
    def mean(self) -> float:
        """The mean; NaN without values."""
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def standard_error(self) -> float:
        """The sample standard deviation (n - 1) over sqrt(n); NaN below 2 values."""
        n = len(self.values)
        return float(np.std(self.values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan


class Verdict(enum.Enum):
    AGREES = 'agrees'
    DOES_NOT = 'does not'
    NOISY = 'too noisy to say'
    UNDECIDED = 'undecided'
    UNTESTED = 'cannot say'


class Runs:
    """The runs of one setting, a seed each.

    Args:
      values: their metric, [n].
      correct: their metric on each image, [n, N], if the metric is a mean over images.
      images: checksum of these images.
    """

    def __init__(
        self, values: Sequence[float], correct: np.ndarray | None = None, images: str = ''
    ):
        self.values, self.correct, self.images = np.asarray(values, float), correct, images
        self.mean = float(self.values.mean())
        n = len(self.values)
        self.seed_variance = float(self.values.var(ddof=1)) / n if n > 1 else math.nan
        if correct is None or n < 2:
            return
        count = correct.shape[1]
        self.by_image = correct.mean(axis=0, dtype=np.float64)
        squares = np.square(correct, dtype=np.float64).sum()
        squares += n * count * self.mean**2 - count * np.square(self.values).sum()
        squares -= n * np.square(self.by_image).sum()
        self.rest_variance = max(0.0, squares) / ((n - 1) * (count - 1)) / (n * count)


class Option(NamedTuple):
    """One choice of an arm's tuned values."""

    selection: np.ndarray  # [n], what chooses it, larger is better; a seed each
    runs: Runs


class Estimate(NamedTuple):
    """A difference of means with its standard error."""

    difference: float
    error: float
    df: float  # degrees of freedom of the error
    counts_images: bool  # or seeds alone

    def p_above(self, bound: float) -> float:
        """Returns the one-sided p value of 'the difference is greater than a bound'."""
        if self.error == 0:
            return 0.0 if self.difference > bound else 1.0
        return float(special.stdtr(self.df, (bound - self.difference) / self.error))

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Returns the interval that holds the difference but for a share `level` of cases."""
        reach = special.stdtrit(self.df, 1 - level / 2) * self.error if self.error else 0.0
        return float(self.difference - reach), float(self.difference + reach)


def estimate(first: Runs, second: Runs) -> Estimate:
    """Returns first - second; both need two seeds at least."""
    seeds = [first.seed_variance, second.seed_variance]
    counts_images = first.correct is not None and second.correct is not None
    images = rest = 0.0
    by_seeds = sum(seeds)
    squares = sum(
        v**2 / (len(runs.values) - 1) for v, runs in zip(seeds, (first, second), strict=True)
    )
    if counts_images:
        rest = first.rest_variance + second.rest_variance
        if first.images == second.images:
            gaps = [first.by_image - second.by_image]
        else:
            gaps = [first.by_image, second.by_image]
        terms = [float(gap.var(ddof=1)) / len(gap) for gap in gaps]
        images = sum(terms)
        squares += sum(t**2 / (len(gap) - 1) for t, gap in zip(terms, gaps, strict=True))
    variance = max(by_seeds + images - rest, by_seeds, images)
    df = variance**2 / squares if squares else math.inf
    return Estimate(first.mean - second.mean, math.sqrt(variance), df, counts_images)


def choose(options: Sequence[Option]) -> int:
    """Returns the index of the option with the best mean of `selection`; the first of equals."""
    return int(np.argmax([option.selection.mean() for option in options]))


def cross_fit(options: Sequence[Option]) -> Runs:
    """Returns runs whose options are chosen by the other seeds, for each seed."""
    if len(options) == 1:
        return options[0].runs
    table = np.array([option.selection for option in options])
    chosen = np.argmax(table.sum(axis=1, keepdims=True) - table, axis=0)
    picked = [options[i].runs for i in chosen]
    correct = None
    if all(runs.correct is not None for runs in picked):
        correct = np.stack([runs.correct[s] for s, runs in enumerate(picked)])
    return Runs([runs.values[s] for s, runs in enumerate(picked)], correct, picked[0].images)


class Rival(NamedTuple):
    """A choice of one side that the other side has to beat."""

    estimate: Estimate  # of the other side's cross-fitted difference to it
    gap: float  # how far it is below the side's chosen one


def rivals(first: Sequence[Option], second: Sequence[Option]) -> list[Rival]:
    """Returns each choice of second as the best of first, chosen by `cross_fit`, meets it."""
    runs, best = cross_fit(first), second[choose(second)].runs.mean
    return [Rival(estimate(runs, each.runs), best - each.runs.mean) for each in second]


def p_better(against: Sequence[Rival], margin: float) -> float:
    """Returns the p value of 'each of the rivals is beaten by more than a margin'."""
    return max(rival.estimate.p_above(margin) for rival in against)


class Evidence(NamedTuple):
    """What a claim and its opposite have for themselves."""

    estimate: Estimate  # at the chosen values
    agrees: float  # p value of the claim
    against: float  # p value of its opposite
    rivals: Sequence[Rival]  # all that must be beaten for the claim to hold

    @property
    def p(self) -> float:
        """Two-sided p value."""
        return min(1.0, 2 * min(self.agrees, self.against))


def weigh(
    first: Sequence[Option], second: Sequence[Option], margin: float, direction: str
) -> Evidence:
    """Tests a claim about the best of two arms.

    Args:
      first, second: the options of each arm, all with the same number of seeds, two or more.
      margin: of the claim.
      direction: 'greater': first - second > margin; 'less': first - second < margin; 'same':
        |first - second| < margin, by two one-sided tests.
    """
    found = estimate(first[choose(first)].runs, second[choose(second)].runs)
    of_first, of_second = rivals(first, second), rivals(second, first)
    above = p_better(of_first, margin)
    if direction == 'same':
        agrees = max(p_better(of_first, -margin), p_better(of_second, -margin))
        against = min(1.0, 2 * min(above, p_better(of_second, margin)))
        return Evidence(found, agrees, against, of_first + of_second)
    below = p_better(of_second, -margin)
    if direction == 'less':
        return Evidence(found, below, above, of_second)
    return Evidence(found, above, below, of_first)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values corrected for their number (Holm 1979), in the same order."""
    order = np.argsort(p_values, kind='stable')
    corrected, highest = [0.0] * len(order), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


def detectable(rivals: Sequence[Rival], level: float) -> float:
    """Returns the smallest difference that a two-sided test finds with probability `POWER`.

    It is the one at which the chances of not beating a rival add up to 1 - `POWER`. For a claim of
    sameness it is the smallest margin in which arms that are equal are found to be. With three
    seeds the errors are rough estimates themselves: of simulated studies 75 to 90 % found a
    difference of the mean size that studies told, one choice and peaks least, plateaus most.

    Args:
      rivals: all that must be beaten.
      level: of the test.
    """
    errors, dfs, gaps = np.array([(r.estimate.error, r.estimate.df, r.gap) for r in rivals]).T
    dfs = np.minimum(dfs, 1e6)
    critical = special.stdtrit(dfs, 1 - level / 2)
    reach = float(np.max(20 * critical * errors - gaps))
    if not errors.any():
        return 0.0
    errors = np.maximum(errors, 1e-9 * errors.max())

    def missed(difference: float) -> float:
        shifts = np.clip((difference + gaps) / errors, 0, 20 * critical)
        return float(np.nan_to_num(stats.nct.cdf(critical, dfs, shifts)).sum()) - (1 - POWER)

    return float(optimize.bisect(missed, -float(gaps.max()), reach, xtol=1e-6 * reach))


class Comparison(NamedTuple):
    """A claim about two samples, and its outcome."""

    verdict: Verdict
    difference: float  # of the means, first - second; NaN if a sample is empty
    interval: tuple[float, float]  # of the difference, at 1 - `LEVEL`, for this claim alone
    reason: str = ''  # why there is no verdict
    p: float = math.nan  # two-sided, for this claim alone
    corrected: float = math.nan  # for all claims of the study, by Holm
    detectable: float = math.nan  # smallest difference at `POWER`, at the corrected level
    basis: str = ''  # 'seeds and images', 'seeds alone' or 'exact'


def decide(found: Evidence, corrected: float) -> Verdict:
    """Returns the verdict that evidence allows, given its corrected p value."""
    if corrected >= LEVEL:
        return Verdict.NOISY
    return Verdict.AGREES if found.agrees < found.against else Verdict.DOES_NOT
