import copy

import numpy as np
import pytest

from experiments.report import reading, results, summaries
from experiments.report.statistics import Verdict
from experiments.study import per_image


def _load(write_study, fields):
    return reading.load(write_study(fields))


def _tuning(study, **setting):
    (found,) = [t for t in results.tunings(study) if t.setting == setting]
    return found


def test_every_setting_is_tuned_apart(study):
    assert len(results.tunings(study)) == 6
    tuning = _tuning(study, arm='agc', batch_size=256)
    assert tuning.chosen == {'learning_rate': 0.4, 'clipping': 0.01}
    assert tuning.sample.values == pytest.approx((0.90, 0.91, 0.92))
    assert len(tuning.by_choice) == 4
    assert tuning.tried == {'learning_rate': [0.4, 1.6], 'clipping': [0.01, 0.16]}


def test_an_axis_that_an_arm_lacks_is_not_tuned_there(study):
    tuning = _tuning(study, arm='bn', batch_size=32)
    assert tuning.tried == {'learning_rate': [0.4, 1.6]}
    assert tuning.at_edge() == ['learning_rate']


def test_a_study_may_tune_nothing(write_study, study_fields):
    study_fields['tuned'] = []
    found = results.tunings(_load(write_study, study_fields))
    assert len(found) == 2 * 2 + 2 * 2 + 2 * 4
    assert all(tuning.chosen == {} and tuning.at_edge() == [] for tuning in found)


def test_the_edge_is_told_from_the_middle(write_study, study_fields):
    study_fields['axes']['learning_rate'] = [0.1, 0.4, 1.6]
    for trial in list(study_fields['trials']):
        if trial['axes']['arm'] == 'bn' and trial['axes']['learning_rate'] == 1.6:
            low = {
                **trial,
                'id': trial['id'] + 'low',
                'axes': {**trial['axes'], 'learning_rate': 0.1},
            }
            study_fields['trials'].append(low)
    study = _load(write_study, study_fields)
    assert _tuning(study, arm='bn', batch_size=32).at_edge() == []
    assert _tuning(study, arm='nf', batch_size=32).at_edge() == ['learning_rate']


def test_the_lowest_is_best_where_less_is_better(write_study, study_fields):
    study_fields['higher_is_better'] = False
    study = _load(write_study, study_fields)
    assert _tuning(study, arm='bn', batch_size=32).chosen['learning_rate'] == 1.6


def test_diverged_trials_count_as_chance(study):
    trials = results.matching(study.trials, {'arm': 'nf', 'learning_rate': 1.6, 'batch_size': 32})
    sample = results.sample(study, trials, 'test/top1')
    assert sample.values == (0.1, 0.1, 0.1)
    assert (sample.diverged, sample.uncounted) == (3, 0)


def test_diverged_trials_without_chance_are_never_chosen_over_others(write_study, study_fields):
    del study_fields['chance']
    study = _load(write_study, study_fields)
    assert _tuning(study, arm='nf', batch_size=32).chosen['learning_rate'] == 0.4
    trials = results.matching(study.trials, {'arm': 'nf', 'learning_rate': 1.6, 'batch_size': 32})
    assert results.sample(study, trials, 'test/top1') == ((), 0, 3)


def test_divergence_says_nothing_of_other_metrics(study):
    trials = results.matching(study.trials, {'arm': 'nf', 'batch_size': 32})
    assert results.sample(study, trials, 'train/gradient_norm') == ((1e3, 1e3, 1e3), 0, 0)


def test_failed_and_pending_trials_are_left_out(write_study, study_fields):
    for trial, state in zip(study_fields['trials'][:2], ('failed', 'pending'), strict=True):
        trial |= {'state': state, 'metrics': {}}
    study = _load(write_study, study_fields)
    assert _tuning(study, arm='bn', batch_size=32).sample.values == pytest.approx((0.82,))


def test_a_study_that_has_not_begun_has_no_results(write_study, study_fields):
    for trial in study_fields['trials']:
        trial |= {'state': 'pending', 'metrics': {}}
    study = _load(write_study, study_fields)
    assert results.tunings(study) == []
    verdicts = {judged.comparison.verdict for judged in results.judge(study)}
    assert verdicts == {Verdict.UNTESTED}


def test_what_is_named_is_not_tuned(study):
    point = {'arm': 'agc', 'batch_size': 32, 'clipping': 0.16}
    chosen = results.select(study, point)
    assert {(t.axes['clipping'], t.axes['learning_rate']) for t in chosen} == {(0.16, 0.4)}
    assert len(chosen) == 3


def test_an_open_axis_that_is_not_tuned_is_averaged_by_seed(study):
    sample = results.sample(study, results.select(study, {'arm': 'bn'}), 'test/top1')
    assert sample.values == pytest.approx((0.85, 0.86, 0.87))


def test_claims_are_judged(study):
    better, worse, alike = [judged.comparison for judged in results.judge(study)]
    assert better.verdict is Verdict.AGREES
    assert better.difference == pytest.approx(0.3)
    assert worse.verdict is Verdict.DOES_NOT
    assert alike.verdict is Verdict.NOISY
    assert {one.basis for one in (better, worse, alike)} == {'seeds alone'}
    # Three claims: Holm multiplies the smallest by 3, the next by 2, and never goes down.
    assert better.corrected == pytest.approx(3 * better.p)
    assert worse.corrected == better.corrected
    assert alike.corrected == alike.p == 1.0


def test_the_best_at_an_edge_is_no_verdict(write_study, study_fields):
    study_fields['claims'][0]['compare'] |= {'better': {'arm': 'agc'}, 'worse': {'arm': 'nf'}}
    study_fields['claims'] = study_fields['claims'][:1]
    judged = results.judge(_load(write_study, study_fields))[0]
    assert judged.comparison.verdict is Verdict.UNDECIDED
    assert judged.comparison.reason.endswith('give --extend')
    assert judged.comparison.p < 0.05


@pytest.mark.parametrize('learned', [True, False])
def test_a_side_that_has_learned_nothing_is_no_verdict(learned, write_study, study_fields):
    """Its best rate may lie elsewhere, although one inside the grid is the best by noise."""
    study_fields['axes']['learning_rate'] = [0.1, 0.4, 1.6]
    for trial in list(study_fields['trials']):
        if trial['axes']['learning_rate'] == 1.6:
            low = {'id': f'{trial["id"]}low', 'axes': {**trial['axes'], 'learning_rate': 0.1}}
            study_fields['trials'].append(copy.deepcopy(trial) | low)
    for trial in study_fields['trials']:
        if trial['axes']['arm'] == 'nf':
            noise = 0.01 * (trial['axes']['learning_rate'] == 0.4) + 0.001 * trial['axes']['seed']
            trial['metrics']['test/top1'] = 0.25 * learned + 0.15 + noise
    side = {'batch_size': 256}
    compare = {'better': {'arm': 'bn', **side}, 'worse': {'arm': 'nf', **side}}
    study_fields['claims'] = study_fields['claims'][:1]
    study_fields['claims'][0]['compare'] |= compare
    found = results.judge(_load(write_study, study_fields))[0].comparison
    assert found.p < 0.05
    assert found.verdict is (Verdict.AGREES if learned else Verdict.UNDECIDED)
    assert found.reason.startswith('' if learned else 'no value tried of one side has learned')


def test_unequal_grids_are_not_compared(write_study, study_fields):
    side = {'learning_rate': 0.4, 'batch_size': 256}
    study_fields['claims'][0]['compare'] |= {'better': {'arm': 'agc', **side}}
    study_fields['grids'] = {
        arm: {'learning_rate': [0.4, 1.6], 'clipping': [0.01, 0.16], 'seed': [0, 1, 2]}
        if arm == 'agc'
        else {'learning_rate': [0.4, 1.6]}
        for arm in study_fields['arms']
    }
    found = results.judge(_load(write_study, study_fields))[0].comparison
    assert found.verdict is Verdict.UNTESTED
    assert found.reason == 'the grids of the two sides have 2 and 1 points'


def test_exact_figures_are_compared_without_a_test(write_study, study_fields):
    for trial in study_fields['trials']:
        trial['metrics']['memory/step_mib'] = 2.0 if trial['axes']['arm'] == 'agc' else 1.0
    study_fields['claims'][1]['compare'] |= {'metric': 'memory/step_mib'}
    study = _load(write_study, study_fields)
    first, exact, _ = results.judge(study)
    assert exact.comparison.verdict is Verdict.DOES_NOT
    assert exact.comparison.basis == 'exact'
    assert first.comparison.corrected == pytest.approx(2 * first.comparison.p), 'two are tested'
    text = summaries.outcome(study, exact).replace('\xa0', ' ')
    assert text.startswith('Memory step, MiB: 1 of NF, batch size 256, learning rate 0.4, 2 of NF')


def test_the_tuned_value_is_chosen_on_validation_images(write_study, study_fields):
    for trial in study_fields['trials']:
        if trial['metrics']:
            slow = trial['axes']['learning_rate'] == 0.4
            trial['metrics']['validation/top1'] = 0.5 if slow else 0.6
    study = _load(write_study, study_fields)
    assert study.selection_metric == 'validation/top1'
    tuning = _tuning(study, arm='bn', batch_size=32)
    assert tuning.chosen['learning_rate'] == 1.6
    assert tuning.sample.values == pytest.approx((0.70, 0.71, 0.72)), 'of the test images'


def test_a_search_chooses_among_the_values_with_all_seeds(write_study, study_fields):
    study_fields['search'] = 'coarse'
    for trial in study_fields['trials']:
        if trial['axes']['learning_rate'] == 0.4 and trial['axes']['seed']:
            trial |= {'state': 'pending', 'metrics': {}}
    study = _load(write_study, study_fields)
    assert _tuning(study, arm='bn', batch_size=32).chosen['learning_rate'] == 1.6


def test_a_verdict_counts_the_images(write_study, study_fields):
    """Seeds that agree on few images are no proof: both arms might do as well on others."""
    directory = write_study(study_fields)
    rng = np.random.default_rng(0)
    for trial in study_fields['trials']:
        right = 48 if trial['axes']['arm'] == 'agc' else 46
        bits = rng.permutation(50) < right
        images = {'test': per_image.Correct(bits, 'the same')}
        per_image.write(directory / 'trials' / trial['id'], images)
    found = results.judge(reading.load(directory))[2].comparison
    assert found.basis == 'seeds and images'
    assert found.difference == pytest.approx(0.04)
    assert found.verdict is Verdict.NOISY
    assert found.interval[0] < 0.04 < found.interval[1]
    assert found.detectable > 0.04


def test_a_claim_may_be_of_another_metric(write_study, study_fields):
    study_fields['claims'][0]['compare'] |= {'metric': 'train/gradient_norm', 'margin': -1.0}
    study = _load(write_study, study_fields)
    assert results.judge(study)[0].comparison.verdict is Verdict.AGREES


@pytest.mark.parametrize(
    'compare', [None, {'better': {'arm': 'agc', 'batch_size': 1024}, 'worse': {'arm': 'bn'}}]
)
def test_what_the_grid_does_not_hold_cannot_be_judged(write_study, study_fields, compare):
    study_fields['claims'][0]['compare'] = compare
    study = _load(write_study, study_fields)
    judgement = results.judge(study)[0]
    assert judgement.comparison.verdict is Verdict.UNTESTED
    assert summaries.outcome(study, judgement) == 'This study does not test it.'
