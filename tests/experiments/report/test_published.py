"""The results in docs/ follow from the tables beside them, by the command that they print."""

import os
import pathlib
import re
import runpy
import shlex

import pytest

from experiments.report import reading, results, static, summaries, tables
from experiments.report.wording import mean_and_error
from tests import processes

ROOT = pathlib.Path(__file__).parents[3]
STUDIES = ROOT / 'docs' / 'studies.md'
PUBLISHED = ROOT / 'docs' / 'results'


@pytest.fixture(scope='module')
def studies(tmp_path_factory):
    """Every study whose tables are published, by the name of its files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, 'fsync', lambda _: None)  # A thousand small files wait for the disk.
        found = tables.restore_all(PUBLISHED, tmp_path_factory.mktemp('restored'))
    return {static.slug(study): study for study in map(reading.load, found)}


@pytest.fixture(scope='module')
def judged(studies):
    """The judgements of every study, in the same order."""
    return [(study, results.judge(study)) for study in studies.values()]


def row(*cells):
    return '| ' + ' | '.join(map(static.escape, cells)) + ' |'


def test_the_verdicts_of_the_guide_and_the_overview_follow_from_the_tables(studies, judged):
    build = runpy.run_path(str(ROOT / 'docs' / 'build_results.py'))
    for path, rewrite in ((STUDIES, build['guide']), (PUBLISHED / 'README.md', build['overview'])):
        text = path.read_text(encoding='utf-8')
        assert rewrite(text, judged) == text, 'run `python docs/build_results.py`'
    assert sum(text.count(f'({name}.md)') for name in studies) == len(studies)


def test_the_numbers_of_the_guide_follow_from_the_tables(studies):
    text = STUDIES.read_text(encoding='utf-8')
    best = {
        mean_and_error(t.sample, study.metric).replace('\N{NO-BREAK SPACE}', ' ')
        for study in studies.values()
        for t in results.tunings(study)
    }
    printed = set(re.findall(r'\d+\.\d+ ± \d+\.\d+ \(\d\)', text))
    assert printed <= best
    assert len(printed) > 5


def test_the_pages_follow_from_the_tables(judged):
    for study, judgements in judged:
        page = (PUBLISHED / f'{static.slug(study)}.md').read_text(encoding='utf-8')
        assert summaries.progress(study) in page
        for judgement in judgements:
            outcome = summaries.verdict(judgement), summaries.outcome(study, judgement)
            assert row(judgement.claim.text, judgement.claim.source, *outcome) in page


@pytest.mark.slow  # The tests above read the same tables; test_command.py has one of its own.
def test_the_printed_command_computes_them(tmp_path):
    (command,) = re.findall(
        r'^python (-m experiments.report --tables=.*)$', STUDIES.read_text(encoding='utf-8'), re.M
    )
    arguments = shlex.split(command.replace('results.html', str(tmp_path / 'results.html')))
    assert processes.run(arguments, cwd=ROOT).returncode == 0
    page = (tmp_path / 'results.html').read_text(encoding='utf-8')
    for cells in ('+9.86 points', 'corrected = 0.79'):
        assert cells in page
