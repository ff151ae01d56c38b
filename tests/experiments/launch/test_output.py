"""What a command writes arrives whatever the text, and ends well where it cannot."""

import errno
import os
import pty
import signal
import subprocess
import sys

import pytest

from experiments.launch import output
from tests import processes
from tests.experiments.conftest import ROOT

# A program that says `text` on both streams, a thousand times.
PROGRAM = """
import os, sys
from experiments.launch import output
text = os.fsdecode(bytes.fromhex(sys.argv[1]))
with output.session():
    for _ in range(int(sys.argv[2])):
        print(text, flush=True)
        print(text, file=sys.stderr)
"""


def start(text=b'x', count=1, program=PROGRAM, **options):
    return processes.start(
        ['-c', program, text.hex(), str(count)],
        cwd=ROOT,
        text=False,
        **{'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, **options},
    )


@pytest.mark.parametrize(
    ('encoding', 'text', 'written'),
    [
        ('utf-8', b'caf\xc3\xa9 \xff.jpg', b'caf\xc3\xa9 \xff.jpg\n'),
        ('ascii', b'caf\xc3\xa9 \xff.jpg', b'caf\\xe9 \xff.jpg\n'),
        ('latin-1', b'caf\xc3\xa9 \xe2\x82\xac', b'caf\xe9 \\u20ac\n'),
        ('ascii:strict', b'\xf0\x9f\xa6\x8a', b'\\U0001f98a\n'),
    ],
)
def test_any_file_name_can_be_written(encoding, text, written):
    environment = {**os.environ, 'PYTHONUTF8': '1', 'PYTHONIOENCODING': encoding}
    process = start(text, env=environment)
    assert process.communicate() == (written, written)
    assert process.returncode == 0


@pytest.mark.parametrize('stream', ['stdout', 'stderr'])
def test_where_nobody_reads_any_more_it_ends_without_a_word(stream):
    process = start(b'x' * 1000, 1000)
    getattr(process, stream).read(1)
    getattr(process, stream).close()
    setattr(process, stream, None)
    out, err = process.communicate()
    assert set((out or b'') + (err or b'')) <= set(b'x\n')
    assert process.returncode == output.READER_GONE == 128 + signal.SIGPIPE


def test_where_nobody_has_ever_read_it_ends_so_too():
    reading, writing = os.pipe()
    os.close(reading)
    process = start(stdout=writing)
    os.close(writing)
    assert process.communicate()[1] == b''
    assert process.returncode == output.READER_GONE


def test_a_full_disk_is_one_line():
    with open('/dev/full', 'w') as full:
        process = start(stdout=full)
        assert process.communicate()[1].decode() == (
            f'error: the output cannot be written: {os.strerror(errno.ENOSPC)}\n'
        )
        assert process.returncode == output.CANNOT_WRITE
        process = start(stderr=full)
        process.communicate()
        assert process.returncode == output.CANNOT_WRITE


@pytest.mark.parametrize('closed', ['>&-', '2>&-', '>&- 2>&-'])
def test_streams_that_were_closed_are_let_be(closed, tmp_path):
    file = tmp_path / 'program.py'
    file.write_text(PROGRAM + 'assert sys.stderr.isatty() is sys.stdout.isatty() is False\n')
    done = subprocess.run(
        f'"{sys.executable}" "{file}" 78 1 {closed}',
        shell=True,
        capture_output=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == 0
    assert b'Error' not in done.stdout + done.stderr


def test_a_pipe_that_does_not_block_is_waited_for():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    process = start(b'x' * 1000, 200, stdout=writing, stderr=subprocess.DEVNULL)
    os.close(writing)
    with open(reading, 'rb') as file:
        assert file.read() == (b'x' * 1000 + b'\n') * 200
    assert process.wait() == 0


def test_a_terminal_that_is_closed_ends_it_without_a_word():
    ours, theirs = pty.openpty()
    process = start(b'x' * 1000, 1000, stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    os.read(ours, 1)
    os.close(ours)
    process.stderr.read()
    assert process.wait() == output.READER_GONE


SAVES_FIRST = """
import os, sys
from experiments.launch import output
with output.session():
    with output.on_loss(lambda: os.write(2, b'asked ')):
        for _ in range(1000):
            print('x' * 1000)
        os.write(2, b'saved ')
"""


def test_a_block_that_must_save_is_asked_once_and_left_in_peace():
    process = start(program=SAVES_FIRST)
    process.stdout.close()
    process.stdout = None
    assert process.communicate()[1] == b'asked saved '
    assert process.returncode == output.READER_GONE


@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_a_line_on_the_standard_error_is_there_at_once(unbuffered):
    program = PROGRAM + '    sys.stdin.read()\n'
    environment = {**os.environ, 'PYTHONUNBUFFERED': unbuffered}
    process = start(program=program, stdin=subprocess.PIPE, env=environment)
    assert process.stderr.readline() == b'x\n'
    assert process.stdout.readline() == b'x\n'
    process.communicate()
