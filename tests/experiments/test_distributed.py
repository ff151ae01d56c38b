"""Training with several processes, each with two fake devices, and what may befall them."""

import json
import os
import re
import signal
import socket
import time

import chex
import numpy as np
import pytest

from experiments.run import metric_writers
from experiments.train import train
from tests.experiments.conftest import tiny_config
from tests.experiments.launch.hosts import Network
from tests.experiments.test_train import assert_same_run, final_state, newest_step, timeless

SHORT = {'duration': '12 steps', 'checkpoint__every': '6 steps', 'eval__every': '3 steps'}
LONGER = {'duration': '200 steps', 'checkpoint__every': '10 steps', 'eval__every': '100 steps'}


def as_flags(changes):
    return [f'--config.{key.replace("__", ".")}={value}' for key, value in changes.items()]


class Job:
    """The processes of one run; process 0 alone is given the directory.

    They run on this machine with two devices each, or one with one device on each of `hosts`.
    """

    def __init__(self, command, count, directory, *flags, name='train', flags_of_1=(), hosts=()):
        with socket.create_server(('', 0)) as server:
            coordinator = f'localhost:{server.getsockname()[1]}'
        if hosts:
            coordinator = f'{Network.address(0)}:{Network.PORT}'
        elsewhere = '/proc/nowhere'
        self.processes = [
            command(
                name,
                f'--workdir={elsewhere if index else directory}',
                *flags,
                *(flags_of_1 if index else ()),
                f'--coordinator={coordinator}',
                f'--num_processes={count}',
                f'--process_id={index}',
                devices=1 if hosts else 2,
                host=hosts[index] if hosts else None,
            )
            for index in range(count)
        ]

    def running(self):
        return all(process.poll() is None for process in self.processes)

    def wait(self):
        """Returns (exit status, output, errors) of each."""
        try:
            ended = [p.communicate(timeout=300) for p in self.processes]
        finally:
            self.kill()
        return [(p.returncode, *texts) for p, texts in zip(self.processes, ended, strict=True)]

    def kill(self):
        for process in self.processes:
            process.kill()


def wait_for(job, condition):
    """Returns once the condition holds or a process has ended."""
    deadline = time.monotonic() + 300
    while not condition() and job.running():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def finish(job):
    """Waits for a good end; returns what process 0 said."""
    ended = job.wait()
    for status, _, err in ended:
        assert status == 0, err
    assert all('step' not in out + err for _, out, err in ended[1:]), 'process 0 alone speaks'
    return ended[0][2]


@pytest.fixture(scope='module')
def programs():
    """What the runs in this process share."""
    return {}


@pytest.fixture(scope='module')
def whole(programs, tmp_path_factory):
    """The same run in this process, with four devices."""
    directory = tmp_path_factory.mktemp('runs') / 'whole'
    train(tiny_config(**SHORT), directory, programs=programs, quiet=True)
    return directory


def assert_same_up_to_rounding(directory, other):
    chex.assert_trees_all_close(
        final_state(directory).params, final_state(other).params, rtol=1e-4, atol=1e-5
    )
    for ours, theirs in zip(timeless(directory), timeless(other), strict=True):
        assert ours.pop('train/memory_gib', 0) >= 0
        theirs.pop('train/memory_gib', 0)
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def test_two_processes_are_stopped_by_either_and_one_goes_on(
    whole, programs, command, tmp_path, capsys
):
    directory = tmp_path / 'run'
    job = Job(command, 2, directory, *as_flags(SHORT))
    wait_for(job, (directory / 'metrics.jsonl').exists)  # just before the first step
    job.processes[1].send_signal(signal.SIGTERM)
    said = finish(job)
    step = int(re.search(r'stopped; step (\d+) is saved', said)[1])
    assert newest_step(directory) == step < 12
    train(tiny_config(**SHORT), directory, programs=programs)
    assert (
        f'resuming {directory} at step {step} of 12, with 4 devices instead of 4 devices in '
        '2 processes: the same batches' in capsys.readouterr().err
    )
    assert_same_up_to_rounding(whole, directory)


@pytest.mark.slow
@pytest.mark.parametrize('processes', [2, 4])
def test_several_processes_train_as_one_does(whole, command, tmp_path, processes):
    finish(Job(command, processes, tmp_path / 'run', *as_flags(SHORT)))
    assert_same_up_to_rounding(whole, tmp_path / 'run')
    summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
    assert summary['devices'].startswith(f'{2 * processes} x')


@pytest.mark.slow
def test_where_one_dies_the_other_ends_and_the_restart_continues(command, tmp_path):
    finish(Job(command, 2, tmp_path / 'whole', *as_flags(LONGER)))
    directory = tmp_path / 'run'
    job = Job(command, 2, directory, *as_flags(LONGER))
    wait_for(job, lambda: newest_step(directory) >= 20)
    job.processes[1].kill()
    (status, _, err), _ = job.wait()
    assert status == 3
    assert re.search(r'stopped: process 1 on \S+ has died; start all processes again', err)
    finish(Job(command, 2, directory, *as_flags(LONGER)))
    assert_same_run(directory, tmp_path / 'whole')


# Checkpoints take longer than the others would wait for a process that is silent.
SLOW_DISK = """
import time
from experiments.run.checkpoints import Checkpoints
from tests.experiments.conftest import tiny_config
from tests.experiments.launch.hosts import Network
wait = Checkpoints.wait
def wait_long(checkpoints):
    time.sleep(3 if checkpoints._manager else 0)
    wait(checkpoints)
Checkpoints.wait = wait_long
def get_config():
    return tiny_config()
"""
DIVERGING = {
    'optimizer__learning_rate': 1e30,
    'optimizer__clip__name': 'none',
    'optimizer__schedule__name': 'constant',
}


@pytest.mark.slow
@pytest.mark.parametrize('end', ['stopped', 'diverged'])
def test_the_others_wait_for_the_last_checkpoint(command, tmp_path, end):
    (tmp_path / 'slow_disk.py').write_text(SLOW_DISK)
    directory, changes = tmp_path / 'run', LONGER | {'log_every': '10 steps'}
    flags = [f'--config={tmp_path}/slow_disk.py', '--peer_timeout=5']
    flags += as_flags(changes | (DIVERGING if end == 'diverged' else {}))
    job = Job(command, 2, directory, *flags)
    if end == 'stopped':
        wait_for(job, lambda: newest_step(directory) >= 10)
        job.processes[1].send_signal(signal.SIGTERM)
        step = int(re.search(r'stopped; step (\d+) is saved', finish(job))[1])
        assert newest_step(directory) == step
    else:
        (status, _, err), (other_status, _, other_err) = job.wait()
        assert (status, other_status) == (1, 1)
        assert 'stopped: the loss or the gradient was not finite at step' in err
        assert 'stopped' not in other_err


@pytest.mark.slow
def test_processes_with_different_configs_end_with_one_line(command, tmp_path):
    job = Job(command, 2, tmp_path / 'run', flags_of_1=['--config.seed=1'])
    (status, _, err), (other_status, _, other_err) = job.wait()
    assert (status, other_status) == (2, 2)
    assert 'error: config.seed is 1 in process 1 and 0 in process 0: start all' in err
    assert 'error' not in other_err
    assert not (tmp_path / 'run').exists()


# Long enough to be killed often.
KILLED = LONGER | {'duration': '600 steps', 'eval__every': '300 steps', 'log_every': '10 steps'}


def kill_and_resume(command, directory, processes, moments):
    """Kills a run at random moments, resuming it each time, and lets it end.

    Returns:
      Where each kill met it: 'start' (any moment of it), 'step' or 'writing' (a checkpoint), and
      the step of the newest checkpoint then.
    """
    random = np.random.default_rng(0)
    checkpoints = directory / 'checkpoints'
    being_written = re.compile(r'\d+\..*tmp.*')
    killed_at = []
    for moment in range(moments):
        place = ('start', 'step', 'step', 'writing')[moment % 4]
        job = Job(command, processes, directory, *as_flags(KILLED))
        begun, seconds = time.monotonic(), random.uniform(0, 8)
        goal = newest_step(directory) + 10 * int(random.integers(1, 3))
        victim = int(random.integers(processes)) if place != 'writing' else 0

        def due(place=place, begun=begun, seconds=seconds, goal=goal):
            if place == 'start':
                return time.monotonic() - begun > seconds
            return newest_step(directory) >= goal and (
                place == 'step' or any(map(being_written.fullmatch, os.listdir(checkpoints)))
            )

        wait_for(job, due)
        job.processes[victim].kill()
        if place == 'start':
            # Who has not met the others yet cannot know of their death and waits for them until
            # --start_timeout. It is for the launcher to end all that it started, as here.
            job.kill()
        ended = job.wait()
        assert ended[victim][0] == -signal.SIGKILL, 'it was still running'
        for index, (status, _, err) in enumerate(ended):
            assert status == 3 or index == victim or place == 'start', err
        killed_at.append((place, newest_step(directory)))
    finish(Job(command, processes, directory, *as_flags(KILLED)))
    return killed_at


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_killed_at_twenty_moments_it_ends_where_the_uninterrupted_run_does(
    command, tmp_path, processes
):
    finish(Job(command, processes, tmp_path / 'whole', *as_flags(KILLED)))
    killed_at = kill_and_resume(command, tmp_path / 'run', processes, moments=20)
    print(f'{processes} processes, killed at', killed_at)
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


@pytest.mark.slow
def test_evaluation_follows_a_job_both_with_two_processes(command, tmp_path):
    directory = tmp_path / 'run'
    watching = Job(command, 2, directory, '--watch', '--json', name='evaluate')
    finish(Job(command, 2, directory, *as_flags(LONGER), '--config.checkpoint.keep=30'))
    (status, out, err), (other_status, other_out, _) = watching.wait()
    assert (status, other_status) == (0, 0), err
    assert other_out == ''
    found = {line['step']: line for line in map(json.loads, out.splitlines())}
    assert sorted(found) == list(range(10, 201, 10))
    kept = (directory / 'evaluations.jsonl').read_text()
    assert kept == out
    for told in metric_writers.read_metrics(directory):
        if 'test/top1' in told:
            assert found[told['step']] == pytest.approx(told, rel=1e-6)
