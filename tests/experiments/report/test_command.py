import json
import shutil

import pytest

from experiments.report import reading, static, tables
from nfnets_jax.errors import UsageError


def _finish(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_page_and_static_version(command, study_directory, tmp_path):
    out, folder = tmp_path / 'report.html', tmp_path / 'static'
    status, printed, errors = _finish(
        command('report', f'--workdir={study_directory}', f'--out={out}', f'--static={folder}')
    )
    assert (status, errors) == (0, '')
    assert f'wrote {out}' in printed
    text = out.read_text()
    assert 'A small study' in text
    assert f'python -m experiments.report --workdir={study_directory}' in text
    assert (folder / 'README.md').exists()
    assert not list(tmp_path.glob('**/*.tmp'))


def test_a_broken_study_is_one_line_and_nothing_is_written(command, study_directory, tmp_path):
    file, out = study_directory / 'study.json', tmp_path / 'report.html'
    file.write_text(json.dumps({'name': 3}))
    status, printed, errors = _finish(
        command('report', f'--workdir={study_directory}', f'--out={out}')
    )
    assert (status, printed) == (2, '')
    assert errors.startswith('error: ')
    assert str(file) in errors
    assert errors.count('\n') == 1
    assert not out.exists()


def test_a_static_version_that_is_refused_leaves_the_page_alone(command, study_directory, tmp_path):
    out = tmp_path / 'report.html'
    out.write_text('what was there')
    status, printed, errors = _finish(
        command(
            'report',
            f'--workdir={study_directory}',
            f'--workdir={study_directory}',
            f'--out={out}',
            f'--static={tmp_path}/static',
        )
    )
    assert (status, printed, errors.count('\n')) == (2, '', 1)
    assert out.read_text() == 'what was there'


def test_the_page_is_in_the_study_unless_said_otherwise(command, study_directory):
    status, printed, _ = _finish(command('report', f'--workdir={study_directory}'))
    assert status == 0
    assert f'wrote {study_directory / "report.html"}' in printed
    assert 'A small study' in (study_directory / 'report.html').read_text()


def test_the_directory_of_the_page_must_exist(command, study_directory, tmp_path):
    status, _, errors = _finish(
        command('report', f'--workdir={study_directory}', f'--out={tmp_path}/nowhere/report.html')
    )
    assert status == 2
    assert 'in a directory that exists' in errors


@pytest.fixture
def whole(write_study, study_fields, tmp_path):
    """What --static writes of a study without charts, whose pictures take a second."""
    study = reading.load(write_study(study_fields | {'charts': []}))
    static.write([study], tmp_path / 'static', made='now')
    return tmp_path / 'static'


def test_the_tables_of_a_page_make_it_again(command, whole, tmp_path):
    out = tmp_path / 'report.html'
    status, _, errors = _finish(command('report', f'--tables={whole}', f'--out={out}'))
    assert (status, errors) == (0, '')
    assert 'agrees (seeds alone)' in out.read_text()
    assert not list(tmp_path.glob('*.csv')), 'the tables are copied'
    (tmp_path / 'empty').mkdir()
    empty = (f'--tables={tmp_path / "empty"}', f'--out={out}')
    for wrong in ((), (f'--tables={whole}',), empty):
        status, _, errors = _finish(command('report', *wrong))
        assert (status, errors.count('\n')) == (2, 1)


def test_tables_that_are_not_whole_are_one_line(study_directory, whole, tmp_path):
    def told(directory):
        with pytest.raises(UsageError) as error:
            tables.restore_all(directory, tmp_path / 'restored')
        assert '\n' not in str(error.value)
        return str(error.value)

    assert 'holds no *-trials.csv' in told(study_directory)
    (settings,) = whole.glob('*-study.json')
    text = settings.read_text()
    settings.write_text(text[:-9])
    assert f'--tables={whole}: {settings.name.removesuffix("study.json")}* are damaged' in told(
        whole
    )
    settings.unlink()
    assert f'{settings.name}: No such file' in told(whole)
    settings.write_text(text)
    (trials,) = whole.glob('*-trials.csv')
    trials.write_text(trials.read_text().replace('axis:', 'axes:'))
    assert 'are damaged' in told(whole)


def test_studies_whose_files_have_one_name_are_refused(command, study_directory, tmp_path):
    shutil.copytree(study_directory, tmp_path / 'other')
    both = f'--workdir={study_directory}', f'--workdir={tmp_path}/other'
    status, _, errors = _finish(command('report', *both, f'--out={tmp_path}/both.html'))
    assert (status, errors.count('\n')) == (2, 1)
    assert 'two of the studies would both be written as' in errors
    assert not (tmp_path / 'both.html').exists()
