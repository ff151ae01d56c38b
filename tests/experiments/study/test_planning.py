"""Plans against trials with known results, without training."""

import math

import pytest

from experiments.study import planning
from experiments.study.config import default_study
from experiments.study.journal import TrialRecord

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
    records, plans = {}, []
    while True:
        plan = planner.plan(list(records.values()))
        if all(t.id in records for t in plan):
            return plans
        plans.append({(t.axes['learning_rate'], t.axes['seed']) for t in plan})
        for trial in plan:
            distance = abs(math.log(trial.axes['learning_rate'] / peak))
            metrics = {'validation/top1': 1 - distance / 20, 'test/top1': distance / 20}
            records[trial.id] = TrialRecord(
                0, trial.id, trial.axes, '', {}, 'complete', 6, metrics, 1.0, None
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


def test_a_grid_ends_at_its_limit_and_where_no_config_may_have_the_value():
    found = run(planning.Planner(study(extensions=2), extend=True), peak=1e6)[-1]
    assert {rate for rate, _ in found} == {*RATES, 6.4, 25.6}
    axes = {'learning_rate': 'optimizer.momentum', 'seed': 'seed'}
    momentum = study('full', rates=(0.1, 0.9), axes=axes)
    assert run(planning.Planner(momentum, extend=True), peak=5.0) == [cross((0.1, 0.9), (0, 1, 2))]
