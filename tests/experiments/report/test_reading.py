import json

import pytest

from experiments.report import reading
from nfnets_jax.errors import UsageError


def test_trials_and_their_curves(study):
    assert len(study.trials) == 48
    trial = study.trials[0]
    assert trial.axes == {'arm': 'bn', 'batch_size': 32, 'learning_rate': 0.4, 'seed': 0}
    curve = study.curve(trial, 'test/top1')
    assert [step for step, _ in curve] == [10, 20, 30]
    assert curve[-1][1] == pytest.approx(0.80)
    assert study.curve(trial, 'train/loss') == []


def test_a_trial_that_never_started_has_no_curve(write_study, study_fields):
    study_fields['trials'][0] |= {'state': 'pending', 'metrics': {}, 'seconds': None}
    study = reading.load(write_study(study_fields))
    assert study.curve(study.trials[0], 'test/top1') == []


def test_null_metrics_are_none_at_all(write_study, study_fields):
    study_fields['trials'][0]['metrics'] = {'test/top1': None, 'test/loss': 1.0}
    assert reading.load(write_study(study_fields)).trials[0].metrics == {'test/loss': 1.0}


def test_labels(study):
    assert study.label('arm', 'agc') == 'NF with AGC'
    assert study.label('learning_rate', 0.4) == '0.4'
    assert study.label('batch_size', 256) == '256'
    assert study.label('clipping', None) == '-'
    assert study.label('bn', True) == 'True'


def test_the_learning_rate_is_tuned_unless_the_study_says_otherwise(write_study, study_fields):
    del study_fields['tuned']
    assert reading.load(write_study(study_fields)).tuned == ['learning_rate']


def test_no_study(tmp_path):
    with pytest.raises(UsageError, match=r'holds no study: there is no .*study\.json'):
        reading.load(tmp_path / 'nowhere')


@pytest.mark.parametrize('text', ['', '{"name": ', '[]', 'null', '3'])
def test_what_is_no_json_object_is_refused_by_name(tmp_path, text):
    (tmp_path / 'study.json').write_text(text)
    with pytest.raises(UsageError, match=r'study\.json'):
        reading.load(tmp_path)


def _set(**changes):
    return lambda fields: fields.update(changes)


def _without(key):
    return lambda fields: fields.pop(key)


def _in(key, place, **changes):
    return lambda fields: fields[key][place].update(changes)


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (_without('title'), r'title is missing'),
        (_without('trials'), r'trials is missing'),
        (_set(trials={}), r'trials=\{\}: must be a list'),
        (_set(trials=[3]), r'trials\[0\]=3: must be a mapping'),
        (_set(higher_is_better=1), r'higher_is_better=1: must be True or False'),
        (_set(chance=True), r'chance=True: must be None or a number'),
        (_set(axes={'arm': 'bn'}), r"axes\.arm='bn' must be a list"),
        (_set(tuned=['rate']), r"tuned='rate': no such axis"),
        (_in('trials', 0, state='done'), r"trials\[0\]\.state='done' is unknown"),
        (_in('trials', 0, id='../../x'), r'must be the name of a directory'),
        (_in('trials', 0, id='..'), r'must be the name of a directory'),
        (
            _in('trials', 0, axes={'arms': 'bn'}),
            r"trials\[0\]\.axes has no axis 'arms' \(did you mean 'arm'",
        ),
        (_in('trials', 0, axes={'arm': 'xn'}), r"trials\[0\]\.axes\.arm='xn'"),
        (_in('trials', 0, axes={'seed': 9}), r'seed=9, which is not in axes\.seed'),
        (_in('charts', 0, kind='curve'), r"charts\[0\]\.kind='curve' is unknown.*'curves'"),
        (_in('charts', 1, x='rate'), r"charts\[1\]\.x='rate': no such axis"),
        (_in('charts', 0, where={'arm': 'x'}), r"charts\[0\]\.where\.arm='x'"),
        (_in('charts', 0, logx=True), r'unknown key charts\[0\]\.logx .*log_x'),
        (_in('claims', 0, compare={'better': {}}), r'worse is missing'),
        (
            _in('claims', 0, compare={'better': {}, 'worse': {}, 'direction': 'up'}),
            r"direction='up' is unknown",
        ),
    ],
)
def test_a_broken_study_is_one_line_that_names_the_file(write_study, study_fields, damage, message):
    damage(study_fields)
    directory = write_study({'trials': []})
    (directory / 'study.json').write_text(json.dumps(study_fields))
    with pytest.raises(UsageError, match=message) as error:
        reading.load(directory)
    assert str(directory / 'study.json') in str(error.value)
    assert '\n' not in str(error.value)


def test_numbers_are_in_order_whenever_they_were_added(write_study, study_fields):
    study_fields['axes'] |= {'learning_rate': [1.6, 0.4], 'arm': ['nf', 'agc', 'bn']}
    axes = reading.load(write_study(study_fields)).axes
    assert axes['learning_rate'] == [0.4, 1.6]
    assert axes['arm'] == ['nf', 'agc', 'bn']
