"""--help of every command: it fits a screen, has groups, and examples that are commands."""

import os
import pathlib
import re

import pytest
from absl import flags

from experiments.launch import command_help
from tests import processes

ROOT = pathlib.Path(__file__).parents[3]
# With `command.py`: a command whose flags are defined there.
CODE = {'study': 'experiments/study/command.py', 'report': 'experiments/report/__main__.py'}
COMMANDS = sorted(
    path.parent.name if path.name == '__main__.py' else path.stem
    for path in [
        *(ROOT / 'experiments').glob('*.py'),
        *(ROOT / 'experiments').glob('*/__main__.py'),
    ]
    if 'cli.run(' in path.read_text() or path.parent.name in CODE
)
LINES, COLUMNS = 44, 80


def described(command, columns, package='experiments'):
    done = processes.run(
        ['-m', f'{package}.{command}', '--help'],
        cwd=ROOT,
        env={**os.environ, 'COLUMNS': str(columns), 'PATH': ''},
    )
    assert not done.stderr
    assert done.returncode == 0
    return done.stdout


def test_all_commands_are_known():
    assert {'train', 'evaluate', 'study', 'report', 'preflight'} < set(COMMANDS)
    assert len(COMMANDS) >= 14


@pytest.mark.parametrize('command', COMMANDS)
def test_help_fits_a_screen_and_names_every_flag(command):
    text = described(command, COLUMNS)
    lines = text.splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    examples = re.findall(rf'^    python -m experiments\.{command}\b', text, re.M)
    assert len(examples) >= 2
    path = ROOT / CODE.get(command, f'experiments/{command}.py')
    defined = re.findall(
        r"(?:DEFINE_\w+|define_(?:path|paths|image_size))\(\s*'([\w.]+)'", path.read_text()
    )
    for name in defined:
        assert re.search(rf'^  --(\[no\])?{re.escape(name)}(=| |$)', text, re.M), name


def test_a_narrow_terminal_gets_narrow_paragraphs():
    narrow = described('augment_gallery', 40)
    assert max(map(len, narrow.splitlines())) <= 40
    examples = narrow.replace('\\\n        ', '')
    assert '    python -m experiments.augment_gallery --out=strong.png --magnitude=20\n' in examples
    assert described('augment_gallery', 300) == described('augment_gallery', COLUMNS)


@pytest.mark.parametrize(
    ('package', 'command'),
    [('experiments', 'study'), ('benchmarks', 'dispatch'), ('benchmarks', 'all_on_gpu')],
)
def test_lists_and_benchmarks_are_wrapped_too(package, command):
    text = described(command, 40, package)
    assert f'    python -m {package}.{command} \\\n' in text
    prose = [line for line in text.splitlines() if not line.startswith('        --')]
    assert max(map(len, prose)) <= 40  # An option of an example cannot be split.
    assert max(map(len, described(command, COLUMNS, package).splitlines())) <= COLUMNS


def test_lists_are_filled(monkeypatch):
    doc = (
        'Does it.\n\n    a     first words\n          second words\n    longer term  of one line\n'
    )
    monkeypatch.setenv('COLUMNS', '40')
    _, listed, *_ = command_help.parser(doc).format_help().split('\n\n')
    assert listed.splitlines() == [
        '    a            first words second',
        '                 words',
        '    longer term  of one line',
    ]


def test_the_package_lists_its_commands():
    done = processes.run(['-m', 'experiments'], cwd=ROOT)
    assert re.findall(r'^    (\w+)', done.stdout, re.M) == COMMANDS


def test_titles_fit_a_narrow_terminal():
    titles = [line for line in described('evaluate', 40).splitlines() if line.endswith(':')]
    assert 'processes, unless the cluster says it:' in titles
    assert max(map(len, titles)) <= 40


def test_groups_defaults_and_forms():
    values = flags.FlagValues()
    flags.DEFINE_integer('steps', 7, 'How many; 5 % more.', flag_values=values)
    flags.DEFINE_bool('json', False, 'As JSON.', flag_values=values)
    flags.DEFINE_enum('split', None, ['a', 'b'], 'Which.', flag_values=values, required=True)
    flags.DEFINE_string('host', None, 'Where.', flag_values=values)
    flags.DEFINE_float('low', 0, 'From.', flag_values=values)
    known = [values[name] for name in ('steps', 'json', 'split', 'host', 'low')]
    text = command_help.describe('Does it.\n\n    python -m it\n', known, {'far away': ['host']})
    assert text.split('\n\n') == [
        'Does it.',
        '    python -m it',
        'required:\n  --split=a|b  Which.',
        'options:\n  --steps=N    How many; 5 % more. (default: 7)\n  --[no]json   As JSON.\n'
        '  --low=X      From. (default: 0.0)',
        'far away:\n  --host=TEXT  Where.\n',
    ]
