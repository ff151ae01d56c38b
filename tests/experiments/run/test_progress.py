import fcntl
import io
import os
import pty
import select
import struct
import termios

import pytest

from experiments.run.progress import Progress


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def _metrics(step):
    return {
        'loss': 1 / step,
        'top1': 0.9876,
        'images_per_second': 4321.9,
        'learning_rate': 0.1,
    }


def _run(steps, *, total, log_every, seconds_per_step, start_step=0):
    stream, clock = io.StringIO(), Clock()
    with Progress(total, stream=stream, clock=clock) as progress:
        for step in range(start_step + 1, steps + 1):
            clock.now += seconds_per_step
            progress.update(step, _metrics(step) if step % log_every == 0 else None)
    return stream.getvalue().splitlines()


def test_plain_lines_are_few_with_the_first_and_the_last():
    lines = _run(100, total=100, log_every=2, seconds_per_step=1)
    steps = [int(line.split()[1].split('/')[0]) for line in lines]
    assert steps == [2, 12, 22, 32, 42, 52, 62, 72, 82, 92, 100]
    assert lines[5] == 'step 52/100  loss 0.019  top-1 98.8%  4,322 images/s  00:48 left'
    assert lines[-1] == 'step 100/100  loss 0.010  top-1 98.8%  4,322 images/s'


def test_every_log_step_is_shown_when_they_are_rare():
    lines = _run(40, total=100, log_every=10, seconds_per_step=60)
    assert [line.split()[1] for line in lines] == ['10/100', '20/100', '30/100', '40/100']
    assert lines[-1].endswith('1:00:00 left')


def test_a_run_that_stops_early_shows_where():
    lines = _run(7, total=100, log_every=1, seconds_per_step=1)
    assert [line.split()[1] for line in lines] == ['1/100', '7/100']


def test_time_left_counts_this_session_alone():
    lines = _run(80, total=100, log_every=10, seconds_per_step=3, start_step=50)
    assert lines[-1].startswith('step 80/100')
    assert lines[-1].endswith('01:00 left')


def test_lines_of_their_own():
    stream = io.StringIO()
    progress = Progress(10, stream=stream)
    progress.log('test top-1 98.9%')
    progress.close()
    assert stream.getvalue() == 'test top-1 98.9%\n'


def test_silent_processes():
    stream = io.StringIO()
    progress = Progress(10, stream=stream, enabled=False)
    progress.update(10, _metrics(10))
    progress.log('hello')
    progress.close()
    assert stream.getvalue() == ''


def waiting(screen):
    """Returns the next bytes of a terminal, b'' if none come for a second."""
    return os.read(screen, 1 << 16) if select.select([screen], [], [], 1)[0] else b''


@pytest.fixture
def terminal():
    """Yields a stream that is a terminal of 100 columns, and a function that reads its screen."""
    screen, keyboard = pty.openpty()
    fcntl.ioctl(keyboard, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 100, 0, 0))
    with os.fdopen(keyboard, 'w') as stream:
        yield stream, lambda: b''.join(iter(lambda: waiting(screen), b'')).decode()
    os.close(screen)


def test_a_terminal_gets_a_bar(terminal):
    stream, read = terminal
    progress = Progress(100, stream=stream)
    for step in range(21, 61):
        progress.update(step)
    progress.update(61, _metrics(61))
    progress.log('test top-1 98.9%')
    progress.close()
    frames = read().replace('\n', '\r').split('\r')
    assert next(f for f in frames if f).startswith('step 21/100 |'), 'once it is compiled'
    assert 'test top-1 98.9%' in [frame.strip() for frame in frames]
    last = [frame for frame in frames if frame.startswith('step')][-1]
    assert last.startswith('step 61/100 |')
    assert '█' in last
    assert 'loss 0.016  top-1 98.8%  4,322 images/s  00:0' in last
    assert last.rstrip().endswith('left')
    assert len(last) <= 100
