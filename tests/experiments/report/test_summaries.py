import pytest

from configs.studies import bn_price
from experiments.report import page, reading, results, summaries
from experiments.study import config as study_config
from nfnets_jax.errors import UsageError


def test_progress(write_study, study_fields):
    for trial, state in zip(study_fields['trials'], ('failed', 'pending'), strict=False):
        trial |= {'state': state, 'metrics': {}}
    study = reading.load(write_study(study_fields))
    assert summaries.progress(study) == (
        '40 of 48 trials are complete, 6 diverged; 1 failed, 1 pending.'
    )
    assert not summaries.is_complete(study)


def test_a_diverged_study_is_complete(study):
    assert summaries.progress(study) == '42 of 48 trials are complete, 6 diverged.'
    assert summaries.is_complete(study)


def test_outcome_tells_what_the_verdict_rests_on(study):
    judged = results.judge(study)[0]
    text = summaries.outcome(study, judged).replace('\xa0', ' ')
    assert text.startswith(
        'Test top-1, %: 91.00 ± 0.58 (3) of NF with AGC, clipping 0.01, batch size 256, '
        'learning rate 0.4, 61.00 ± 0.58 (3) of NF, batch size 256, learning rate 0.4. '
        'Difference +30.00 points (95% interval +27.73 points to +32.27 points); '
        'claimed is more than 0.00 points. p < 0.0001, corrected < 0.0001, by the seeds alone; '
        'smallest difference that could have been seen +'
    )
    assert summaries.verdict(judged) == 'agrees (seeds alone)'


def test_a_row_about_another_network_says_so(write_study, study_fields):
    study_fields['scopes'] = {'agc': 'NF-ResNet-8, digits, 10 epochs'}
    study_fields['claims'][0]['scope'] = 'NFNet-F0, ImageNet, 360 epochs'
    study_fields['claims'][1]['scope'] = ''
    study = reading.load(write_study(study_fields))
    first, second, _ = (summaries.outcome(study, judged) for judged in results.judge(study))
    assert first.endswith(
        'Claimed of NFNet-F0, ImageNet, 360 epochs; judged here on NF-ResNet-8, digits, 10 epochs.'
    )
    assert 'Claimed of' not in second


def test_the_edge_of_a_grid_is_named(write_study, study_fields):
    study_fields['claims'][0]['compare']['better'] = {'arm': 'agc', 'batch_size': 256}
    study = reading.load(write_study(study_fields))
    text = summaries.outcome(study, results.judge(study)[0])
    assert text.endswith(
        'Perhaps not the best: learning rate 0.4 (the smallest tried) of NF with AGC, batch size '
        '256; clipping 0.01 (the smallest tried) of NF with AGC, batch size 256.'
    )
    assert 'Perhaps' not in summaries.outcome(study, results.judge(study)[1])


def test_results_name_what_was_tuned_and_its_edge(study):
    table = summaries.results_table(study, results.tunings(study))
    header = ['arm', 'batch size', 'best learning rate', 'best clipping', 'test top-1, %']
    assert table.header == header
    row = next(row for row in table.rows if row[:2] == ['NF with AGC', '256'])
    assert row[2:4] == ['0.4 (the smallest tried)', '0.01 (the smallest tried)']
    assert row[4].replace('\xa0', ' ') == '91.00 ± 0.58 (3)'


def test_grid_marks_the_best(study):
    tunings = results.tunings(study)
    table = summaries.grid_table(study, tunings)
    best = [row for row in table.rows if row[-1].endswith('← best')]
    assert len(table.rows) == 2 * 2 + 2 * 2 + 2 * 4
    assert len(best) == len(tunings)


def test_unsuccessful_trials_are_listed_with_their_error(study):
    table = summaries.trials_table(study, only_unsuccessful=True)
    assert [row[1] for row in table.rows] == ['diverged'] * 6
    assert table.rows[0][-1] == 'the loss was not finite at step 15'
    every = summaries.trials_table(study)
    assert len(every.rows) == 48
    assert every.rows[0][3] == '80.00'


@pytest.mark.parametrize(
    ('metric', 'label'),
    [
        ('test_ema/top1', 'test EMA top-1, %'),
        ('train/loss', 'train loss'),
        ('memory/step_mib', 'memory step, MiB'),
    ],
)
def test_a_metric_is_labelled_with_its_unit(metric, label):
    assert summaries.metric_label(metric) == label


def test_no_time_is_shown_of_trials_that_share_a_machine(study_fields, write_study):
    """Studies of earlier versions have charts of speed and seconds of every trial."""
    chart = study_fields['charts'][0] | {'kind': 'bars', 'x': 'arm', 'y': 'images_per_second'}
    for trial in study_fields['trials']:
        trial['metrics'] |= {'images_per_second': 8230.0}
    study_fields['charts'].append(chart | {'title': 'Images a second'})
    study = reading.load(write_study(study_fields))
    assert [chart.y for chart in study.charts].count('images_per_second') == 0
    assert len(study.charts) == len(study_fields['charts']) - 1
    assert 'time' not in summaries.provenance(study)
    assert 'time' not in summaries.trials_table(study).header
    page_text = page.render([study], command='', made='')
    assert 'Images a second' not in page_text
    assert '8,230' not in page_text


@pytest.mark.parametrize('kind', ['charts', 'claims'])
def test_a_study_that_asks_for_a_time_is_refused(kind):
    config = bn_price.get_config('digits')
    if kind == 'charts':
        config.charts[0]['y'] = 'images_per_second'
        key = r'config.charts\[0\].y'
    else:
        config.claims[0]['compare']['metric'] = 'training_seconds'
        key = r'config.claims\[0\].compare.metric'
    with pytest.raises(UsageError, match=f'{key}=.*cannot measure time'):
        study_config.make_trials(config)
