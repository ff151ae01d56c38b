"""What tests/conftest.py promises of all tests."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


def run_tests(tmp_path, text, ignoring='USR1'):
    (tmp_path / 'test_it.py').write_text(text)
    return subprocess.run(
        [
            'sh',
            '-c',
            f'trap "" {ignoring}; exec "$@"',
            'sh',
            sys.executable,
            '-m',
            'pytest',
            '-p',
            'tests.conftest',
            '-p',
            'no:cacheprovider',
        ]
        + ['--rootdir', tmp_path, '-q', tmp_path],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


LEAVES = """
import os, subprocess, sys, time, types
from tests import conftest

# Twenty times as fast, so that the grace of a process that is left is over soon.
conftest.time = types.SimpleNamespace(
    monotonic=lambda: 20 * time.monotonic(), sleep=time.sleep
)

def test_a_child():
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
    print('left:', child.pid, ':')

def test_an_orphan():
    shell = subprocess.Popen('sleep 600 & echo $!', shell=True, stdout=subprocess.PIPE)
    print('left:', int(shell.stdout.readline()), ':')
    assert shell.wait() == 0

def test_none():
    subprocess.run(['true'], check=True)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc')
def test_a_test_that_leaves_a_process_fails_and_the_process_ends(tmp_path):
    done = run_tests(tmp_path, LEAVES)
    assert 'ERROR' in done.stdout
    assert '3 passed, 2 errors' in done.stdout
    for number in re.findall(r'left: (\d+) :', done.stdout):
        status = pathlib.Path('/proc', number, 'status')
        assert not status.exists() or 'zombie' in status.read_text()


ENDS = """
import signal, subprocess

def test_sigint_ends_what_is_started():
    process = subprocess.Popen(['sleep', '600'])
    process.send_signal(signal.SIGINT)
    assert process.wait() == -signal.SIGINT
    signal.raise_signal(signal.SIGINT)  # The tests themselves go on ignoring it.
"""


def test_what_a_job_that_ignores_signals_starts_does_not_ignore_them(tmp_path):
    done = run_tests(tmp_path, ENDS, ignoring='INT')
    assert done.returncode == 0, done.stdout
