"""Means over seeds, and when a difference between two of them says something."""

import enum
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

# Each way at 5 %: `agrees` and `does not` are each wrong in at most one case of twenty.
CONFIDENCE = 0.9


class Sample(NamedTuple):
    """The values of one metric, one for each seed.

    `diverged` of them are of trials that diverged and count as what chance gives. `uncounted`
    trials diverged as well, but have no value, for nobody said what chance gives.
    """

    values: tuple[float, ...]
    diverged: int = 0
    uncounted: int = 0

    @property
    def mean(self) -> float:
        """NaN of no values."""
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def standard_error(self) -> float:
        """Of the mean: the sample's standard deviation (n - 1) over sqrt(n); NaN below 2 values."""
        n = len(self.values)
        return float(np.std(self.values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan


class Verdict(enum.Enum):
    AGREES = 'agrees'
    DOES_NOT = 'does not'
    NOISY = 'too noisy to say'
    UNTESTED = 'cannot say'


class Comparison(NamedTuple):
    """A claim 'first - second > margin' (or '< margin') against two samples."""

    verdict: Verdict
    difference: float  # of the means, first - second; NaN where there is none
    interval: tuple[float, float]  # of the difference, at `CONFIDENCE`
    reason: str = ''  # why it cannot be said


def welch_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Returns the t interval of the difference of two means, at `CONFIDENCE`.

    Variances may differ (Welch 1947). Two constant samples leave no doubt: the interval is a point.

    Args:
      first, second: at least two numbers each.
    """
    n = np.array([len(first), len(second)])
    squares = np.array([np.var(first, ddof=1), np.var(second, ddof=1)]) / n  # of the std. errors
    difference = float(np.mean(first) - np.mean(second))
    if squares.sum() == 0:
        return difference, difference
    degrees = squares.sum() ** 2 / (squares**2 / (n - 1)).sum()
    half = stats.t.ppf((1 + CONFIDENCE) / 2, degrees) * math.sqrt(squares.sum())
    return difference - float(half), difference + float(half)


def compare(
    first: Sample, second: Sample, *, margin: float = 0.0, direction: str = 'greater'
) -> Comparison:
    """Tells whether first - second is greater (or less) than a margin.

    It agrees where the whole Welch interval is on the claimed side of the margin, does not where
    the whole interval is on the other, and else the seeds scatter too much to say.
    """
    nothing = Comparison(Verdict.UNTESTED, first.mean - second.mean, (math.nan, math.nan))
    if first.uncounted or second.uncounted:
        return nothing._replace(reason='trials diverged, and what chance gives is not known')
    fewest = min(len(first.values), len(second.values))
    if fewest < 2:
        return nothing._replace(reason=f'{fewest or "no"} seed of one side, and a test needs two')
    low, high = interval = welch_interval(first.values, second.values)
    beyond, short = (low > margin, high < margin)
    if direction == 'less':
        beyond, short = short, beyond
    verdict = Verdict.AGREES if beyond else Verdict.DOES_NOT if short else Verdict.NOISY
    return Comparison(verdict, nothing.difference, interval)
