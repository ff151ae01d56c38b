"""Means over seeds, and tests of the difference of two means."""

import enum
import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

# 5 % on each side: `agrees` and `does not` are each wrong in at most one case of twenty.
CONFIDENCE = 0.9


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
    UNTESTED = 'cannot say'


class Comparison(NamedTuple):
    """A claim 'first - second > margin' (or '< margin') against two samples."""

    verdict: Verdict
    difference: float  # of the means, first - second; NaN if a sample is empty
    interval: tuple[float, float]  # of the difference, at `CONFIDENCE`
    reason: str = ''  # why the verdict is UNTESTED


def welch_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Returns Welch's t interval of the difference of two means, at `CONFIDENCE`.

    The interval of two constant samples is a point.

    Args:
      first, second: at least two numbers each.
    """
    if np.ptp(first) == np.ptp(second) == 0:
        return (first[0] - second[0],) * 2
    with warnings.catch_warnings(action='ignore', category=RuntimeWarning):  # of a constant sample
        test = stats.ttest_ind(first, second, equal_var=False)
    low, high = test.confidence_interval(CONFIDENCE)
    return float(low), float(high)


def compare(
    first: Sample, second: Sample, *, margin: float = 0.0, direction: str = 'greater'
) -> Comparison:
    """Tests whether first - second is greater (or less) than a margin.

    AGREES if the whole Welch interval is on the claimed side of the margin, DOES_NOT if it is on
    the other side, NOISY if it contains the margin.
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
