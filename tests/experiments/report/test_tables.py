import csv
import json

import numpy as np

from experiments.report import reading, results, summaries, tables
from experiments.study import per_image


def test_the_tables_hold_every_number_of_the_report(write_study, study_fields, tmp_path):
    directory = write_study(study_fields)
    rng = np.random.default_rng(0)
    for trial in study_fields['trials']:
        correct = {'test': per_image.Correct(rng.random(355) < 0.9, 'abc')}
        if trial['state'] == 'complete':
            per_image.write(directory / 'trials' / trial['id'], correct)
    study = reading.load(directory)
    written = tables.write(study, tmp_path, 'small-')
    assert written == ['small-trials.csv', 'small-correct.npz', 'small-study.json']
    assert (tmp_path / 'small-correct.npz').stat().st_size < 48 * 1000
    with open(tmp_path / 'small-trials.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 48
    assert {row['state'] for row in rows} == {'complete', 'diverged'}
    first = study_fields['trials'][0]
    assert float(rows[0]['test/top1']) == first['metrics']['test/top1']
    assert rows[0]['versions'] == 'jax=0.10.2'
    assert rows[0]['axis:learning_rate'] == '0.4'

    tables.restore(tmp_path, tmp_path / 'again', 'small-')
    again = reading.load(tmp_path / 'again')
    assert (
        json.loads((tmp_path / 'again' / 'study.json').read_text())['trials'][0]['seconds'] == 2.0
    )
    before, after = (
        [summaries.outcome(one, judged) for judged in results.judge(one)] for one in (study, again)
    )
    assert after == before
    assert 'seeds and images' in before[0]


def test_studies_of_earlier_versions_have_no_images(study, tmp_path):
    assert tables.write(study, tmp_path) == ['trials.csv', 'study.json']
