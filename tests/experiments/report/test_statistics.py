import itertools
import math

import numpy as np
import pytest
from scipy import stats

from experiments.report.statistics import CONFIDENCE, Sample, Verdict, compare, welch_interval


def test_mean_and_standard_error():
    sample = Sample((1.0, 2.0, 3.0, 4.0))
    assert sample.mean == 2.5
    assert sample.standard_error == pytest.approx(stats.sem([1, 2, 3, 4]))


def test_one_value_has_no_standard_error_and_none_has_no_mean():
    assert Sample((2.0,)).mean == 2.0
    assert math.isnan(Sample((2.0,)).standard_error)
    assert math.isnan(Sample(()).mean)


@pytest.mark.parametrize('sizes', [(2, 2), (3, 3), (3, 7)])
def test_interval_is_scipys(sizes):
    rng = np.random.default_rng(0)
    first, second = rng.normal(1, 0.1, sizes[0]), rng.normal(0, 2.0, sizes[1])
    test = stats.ttest_ind(first, second, equal_var=False)
    expected = test.confidence_interval(CONFIDENCE)
    np.testing.assert_allclose(welch_interval(first, second), expected, rtol=1e-12)


def test_interval_holds_the_difference_as_often_as_it_says():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(2000):
        low, high = welch_interval(rng.normal(0.3, 1, 3), rng.normal(0, 1, 3))
        held += low <= 0.3 <= high
    assert held / 2000 == pytest.approx(CONFIDENCE, abs=0.04)


HIGH, LOW, WIDE = Sample((0.90, 0.91, 0.92)), Sample((0.80, 0.81, 0.82)), Sample((0.7, 0.9, 1.0))


@pytest.mark.parametrize(
    ('first', 'second', 'margin', 'direction', 'verdict'),
    [
        (HIGH, LOW, 0.0, 'greater', Verdict.AGREES),
        (LOW, HIGH, 0.0, 'greater', Verdict.DOES_NOT),
        (HIGH, WIDE, 0.0, 'greater', Verdict.NOISY),
        (HIGH, LOW, 0.1, 'greater', Verdict.NOISY),
        (HIGH, LOW, 0.2, 'greater', Verdict.DOES_NOT),
        (HIGH, HIGH, -0.05, 'greater', Verdict.AGREES),
        (LOW, HIGH, 0.0, 'less', Verdict.AGREES),
        (HIGH, LOW, 0.0, 'less', Verdict.DOES_NOT),
        (HIGH, HIGH, 0.05, 'less', Verdict.AGREES),
    ],
)
def test_verdict(first, second, margin, direction, verdict):
    found = compare(first, second, margin=margin, direction=direction)
    assert found.verdict is verdict
    assert found.difference == pytest.approx(first.mean - second.mean)
    assert found.interval[0] < found.difference < found.interval[1]


def test_constant_samples_need_no_test():
    assert compare(Sample((0.9, 0.9)), Sample((0.1, 0.1), diverged=2)).verdict is Verdict.AGREES
    assert compare(Sample((0.9, 0.9)), Sample((0.9, 0.9))).verdict is Verdict.NOISY


@pytest.mark.parametrize('few', [Sample(()), Sample((0.9,))])
def test_below_two_seeds_nothing_is_said(few):
    for pair in itertools.permutations([few, HIGH]):
        found = compare(*pair)
        assert found.verdict is Verdict.UNTESTED
        assert 'two' in found.reason


def test_divergence_of_unknown_cost_forbids_a_verdict():
    found = compare(HIGH, LOW._replace(uncounted=1))
    assert found.verdict is Verdict.UNTESTED
    assert 'diverged' in found.reason
