import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

PROGRAM = """
from absl import flags
from ml_collections import config_flags
from experiments import cli
from nfnets_jax.errors import UsageError
config = config_flags.DEFINE_config_file('config', None, 'The config.', lock_config=True)
flags.mark_flag_as_required('config')
def main():
    if config.value.n < 0:
        raise UsageError('config.n=-1: must not be negative')
    print(config.value.n, config.value.inner.x)
cli.run(main)
"""

CONFIG = """
import ml_collections
def get_config(arg=''):
    config = ml_collections.ConfigDict({'n': 3, 'inner': {'x': 0.5, 'flag': True}})
    if arg == 'locked':
        config.lock().m = 1
    if arg == 'raises':
        1 / 0
    return config
"""


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp('cli')
    (path / 'program.py').write_text(PROGRAM)
    (path / 'good.py').write_text(CONFIG)
    (path / 'syntax.py').write_text('def get_config(:\n')
    (path / 'empty.py').write_text('x = 1\n')
    (path / 'plain.py').write_text(CONFIG.replace("arg=''", '').replace('arg', "''"))
    return path


def run(directory, *arguments):
    return subprocess.run(
        [sys.executable, 'program.py', *arguments],
        capture_output=True,
        text=True,
        cwd=directory,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )


def test_overrides_reach_the_config(directory):
    done = run(directory, '--config=good.py', '--config.n=5', '--config.inner.x=1')
    assert (done.returncode, done.stdout, done.stderr) == (0, '5 1.0\n', '')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            ['--config=good.py', '--config.innr.x=1'],
            "unknown key config.innr.x (did you mean 'inner.x'?)",
        ),
        (['--config=good.py', '--config.inner.y=1'], 'unknown key config.inner.y'),
        (['--config=good.py', '--config.n=many'], 'flag --config.n=many: invalid literal'),
        (['--config=good.py', '--config.n=1.5'], 'flag --config.n=1.5: invalid literal'),
        (['--config=good.py', '--config.inner.flag=maybe'], 'flag --config.inner.flag=maybe'),
        (['--config=good.py', '--config.inner=1'], 'flag --config.inner=1'),
        (['--config=good.py', '--config.n=-1'], 'config.n=-1: must not be negative'),
        (['--config=good.py', 'surplus'], "unexpected argument 'surplus'"),
        (['--config=good.py', '--confg=x'], "Unknown command line flag 'confg'"),
        (['--config', 'absent.py'], 'there is no file absent.py'),
        (['--config=good.py', '-config.m=1'], 'unknown key config.m'),
        (['--config=good.py', '--noconfig.inner.flags'], 'unknown key config.inner.flags'),
        ([], 'flag --config=None'),
        (['--config=absent.py'], 'there is no file absent.py'),
        (['--config=syntax.py'], 'syntax.py:1: SyntaxError'),
        (['--config=empty.py'], 'defines no function get_config()'),
        (['--config=plain.py:x'], 'get_config() of plain.py takes no argument'),
        (['--config=good.py:locked'], 'good.py:6: AttributeError'),
        (['--config=good.py:raises'], 'good.py:8: ZeroDivisionError: division by zero'),
    ],
)
def test_a_mistake_is_one_line_and_status_2(directory, arguments, message):
    done = run(directory, *arguments)
    assert message in done.stderr
    assert done.stderr.startswith('error: ')
    assert done.stderr.count('\n') == 1
    assert done.returncode == 2
    assert done.stdout == ''
