"""Plans against trials with known results, without training."""

import collections
import math

import numpy as np
import pytest

from experiments.report.statistics import Option
from experiments.study import planning
from experiments.study.config import default_study
from experiments.study.journal import TrialRecord
from tests.experiments.report.test_statistics import searched

RATES = (0.1, 0.4, 1.6)


def study(search='coarse', rates=RATES, **changes):
    made = default_study()
    made.arms = ({'name': 'a', 'label': ''},)
    made.search = search
    made.grid.learning_rate, made.grid.seed = rates, (0, 1, 2)
    made.update(changes)
    return made


def run(planner, peak):
    """Runs plans to the end; validation is best at `peak`. Returns {(rate, seed)} in each plan."""

    def result(rate, seed):
        del seed
        distance = abs(math.log(rate / peak)) / 20
        return {'validation/top1': 1 - distance, 'test/top1': distance}

    return run_all(planner, result)


def run_all(planner, result):
    """As `run`, with result(rate, seed) -> metrics."""
    plans = run_plans(planner, lambda axes: result(axes['learning_rate'], axes['seed']))
    return [{(axes['learning_rate'], axes['seed']) for axes in plan} for plan in plans]


def run_plans(planner, result):
    """Runs plans to the end, with result(axes) -> metrics; returns the axes in each plan."""
    records, plans = {}, []
    while True:
        plan = planner.plan(list(records.values()))
        if all(t.id in records for t in plan):
            return plans
        plans.append([t.axes for t in plan])
        for trial in plan:
            records[trial.id] = TrialRecord(
                *(0, trial.id, trial.axes, '', {}, 'complete', 6, result(trial.axes), 1.0, None)
            )


def cross(rates, seeds):
    return {(rate, seed) for rate in rates for seed in seeds}


def test_a_full_study_is_its_grid():
    assert run(planning.Planner(study('full')), peak=0.4) == [cross(RATES, (0, 1, 2))]


def test_a_coarse_search_repeats_the_best_and_its_neighbors_on_validation_images():
    rates = (0.025, 0.1, 0.4, 1.6, 6.4)
    plans = run(planning.Planner(study(rates=rates)), peak=0.4)
    assert plans[0] == cross(rates, (0,))
    assert plans[-1] == plans[0] | cross(RATES, (0, 1, 2))


@pytest.mark.parametrize('search', ['full', 'coarse'])
def test_a_grid_goes_on_until_the_best_is_inside(search):
    inside = run(planning.Planner(study(search), extend=False), peak=25.6)[-1]
    assert {rate for rate, _ in inside} == set(RATES)
    found = run(planning.Planner(study(search), extend=True), peak=25.6)[-1]
    assert {rate for rate, _ in found} == {*RATES, 6.4, 25.6, 102.0}
    assert cross((6.4, 25.6, 102.0), (0, 1, 2)) <= found


def test_a_grid_goes_on_in_both_directions_while_nothing_has_learned():
    """At chance the middle may be the best, by noise."""

    def result(rate, seed):
        del seed
        noise = 0.05 if rate == 0.4 else 0.0
        return {'validation/top1': 0.9 if rate in learning else 0.1 + noise}

    learning = (25.6,)
    (first, *_, last) = run_all(planning.Planner(study('full'), extend=True), result)
    assert {rate for rate, _ in first} == set(RATES)
    # Two values at each end are the four that may be added.
    assert {rate for rate, _ in last} == {0.00625, 0.025, *RATES, 6.4, 25.6}
    learning = ()
    last = run_all(planning.Planner(study('full', chance=None), extend=True), result)[-1]
    assert {rate for rate, _ in last} == set(RATES)


def test_a_grid_ends_at_its_limit_and_where_no_config_may_have_the_value():
    found = run(planning.Planner(study(extensions=2), extend=True), peak=1e6)[-1]
    assert {rate for rate, _ in found} == {*RATES, 6.4, 25.6}
    axes = {'learning_rate': 'optimizer.momentum', 'seed': 'seed'}
    momentum = study('full', rates=(0.1, 0.9), axes=axes)
    assert run(planning.Planner(momentum, extend=True), peak=5.0) == [cross((0.1, 0.9), (0, 1, 2))]


@pytest.mark.parametrize('seed', range(8))
def test_a_coarse_search_is_the_one_of_the_simulations(seed):
    rates = (0.025, 0.1, 0.4, 1.6, 6.4)
    validation = np.random.default_rng(seed).random((5, 3)).round(2)

    def result(rate, seed):
        return {'validation/top1': float(validation[rates.index(rate), seed])}

    found = run_all(planning.Planner(study(rates=rates)), result)[-1]
    options = [Option(row, rate) for row, rate in zip(validation, rates, strict=True)]
    whole = [option.runs for option in searched(options)]
    assert found == cross(rates, (0,)) | cross(whole, (0, 1, 2))


def named(**values):
    """A claim about a point with these values of the tuned axes."""
    compare = {'better': {'arm': 'a', **values}, 'worse': {'arm': 'a'}}
    return {'text': 'It is so.', 'source': 'me', 'compare': compare}


def test_a_point_that_a_claim_names_gets_all_seeds():
    rates = (0.025, 0.1, 0.4, 1.6, 6.4)
    claimed = study(rates=rates, claims=(named(learning_rate=6.4),))
    plans = run(planning.Planner(claimed), peak=0.1)
    assert plans[-1] == cross(rates, (0,)) | cross((0.025, 0.1, 0.4, 6.4), (0, 1, 2))
    claimed.arms = ({'name': 'b', 'label': ''}, *claimed.arms)
    last = run_plans(
        planning.Planner(claimed),
        lambda axes: {'validation/top1': -abs(math.log(axes['learning_rate'] / 0.1))},
    )[-1]
    seeds = collections.Counter(axes['arm'] for axes in last if axes['learning_rate'] == 6.4)
    assert seeds == {'a': 3, 'b': 1}


@pytest.mark.parametrize('search', ['full', 'coarse'])
def test_the_best_of_those_that_a_claim_names_is_searched_for_too(search):
    """The best rate is 0.4 for the one clipping factor and 6.4 for the other, which is worse."""
    axes = {'learning_rate': 'optimizer.learning_rate', 'seed': 'seed'}
    axes['clipping'] = 'optimizer.clip.clipping'
    made = study(search, axes=axes, tuned=('learning_rate', 'clipping'))
    made.grid.clipping = (0.01, 0.02, 0.04, 0.08)
    made.claims = (named(clipping=0.01),)

    def result(axes):
        peak = 6.4 if axes['clipping'] == 0.01 else 0.4
        distance = abs(math.log(axes['learning_rate'] / peak)) / 20
        return {'validation/top1': 1 - distance - abs(axes['clipping'] - 0.04)}

    last = run_plans(planning.Planner(made, extend=True), result)[-1]
    found = {tuple(axes[a] for a in ('clipping', 'learning_rate', 'seed')) for axes in last}
    for rate in (1.6, 6.4, 25.6):
        assert {(0.01, rate, seed) for seed in (0, 1, 2)} <= found
    for clipping in (0.02, 0.04, 0.08):
        assert not {one for one in found if one[0] == clipping and one[1] > 1.6}
