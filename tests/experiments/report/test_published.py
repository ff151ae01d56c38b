"""The results in docs/ follow from the tables beside them, by the command that they print."""

import collections
import os
import pathlib
import re
import shlex

import pytest

from experiments.report import reading, results, static, summaries, tables
from experiments.report.statistics import Verdict
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


def row(*cells):
    return '| ' + ' | '.join(map(static._escape, cells)) + ' |'


def test_the_numbers_of_the_guide_follow_from_the_tables(studies):
    text = STUDIES.read_text(encoding='utf-8')
    rows = {row(*cells) for study in studies.values() for cells in summaries.answers(study)}
    told = [line for line in text.splitlines() if re.search(r'\| (corrected p .*|exact) \|$', line)]
    for line in told:  # Its first cell is the name of the study.
        assert f'|{line.split("|", 2)[2]}' in rows, line
    decided = {r for r in rows if re.search(r'\| (agrees|does not)[^|]*\|', r)}
    assert decided == {f'|{line.split("|", 2)[2]}' for line in told}
    every = [
        judged.comparison.verdict for study in studies.values() for judged in results.judge(study)
    ]
    counts = collections.Counter(every)
    trials = sum(len(study.trials) for study in studies.values())
    assert f'{trials:,} trials' in text
    assert (
        f'Of their {len(every)} claims {counts[Verdict.DOES_NOT]} are contradicted, '
        f'{counts[Verdict.AGREES]} hold, {counts[Verdict.NOISY]} are too noisy to say, '
        f'{counts[Verdict.UNDECIDED]} undecided'
    ) in ' '.join(text.split())
    best = {
        mean_and_error(t.sample, study.metric).replace('\N{NO-BREAK SPACE}', ' ')
        for study in studies.values()
        for t in results.tunings(study)
    }
    printed = set(re.findall(r'\d+\.\d+ ± \d+\.\d+ \(\d\)', text))
    assert printed <= best
    assert len(printed) > 5


def test_the_pages_follow_from_the_tables(studies):
    for name, study in studies.items():
        page = (PUBLISHED / f'{name}.md').read_text(encoding='utf-8')
        assert summaries.progress(study) in page
        for judged in results.judge(study):
            outcome = summaries.verdict(judged), summaries.outcome(study, judged)
            assert row(judged.claim.text, judged.claim.source, *outcome) in page


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
