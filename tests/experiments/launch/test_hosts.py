"""Drills: training on several hosts, and what may befall the network between them."""

import functools
import signal
import subprocess
import sys
import time

import pytest

from experiments.train import train
from tests.experiments.conftest import ROOT, tiny_config
from tests.experiments.launch.hosts import Network, networks
from tests.experiments.launch.test_distributed import STRANGERS, errors_of
from tests.experiments.test_distributed import (
    SHORT,
    Job,
    as_flags,
    assert_same_up_to_rounding,
    finish,
    wait_for,
)
from tests.experiments.test_train import assert_same_run, newest_step

STEPS = {
    'duration': '60 steps',
    'checkpoint__every': '10 steps',
    'eval__every': '30 steps',
    'log_every': '10 steps',
}
RESTART = 'start all processes again, and training continues from the last checkpoint'


@pytest.fixture(scope='module')
def uninterrupted(command, tmp_path_factory):
    """A function: number of hosts, changes of the config -> the workdir of that run."""

    @functools.cache
    def run(count, **changes):
        directory = tmp_path_factory.mktemp('uninterrupted')
        with networks(directory) as make:
            flags = as_flags(STEPS | changes)
            finish(Job(command, count, directory / 'run', *flags, hosts=make(count).hosts))
        return directory / 'run'

    return run


@pytest.mark.slow
@pytest.mark.parametrize('count', [2, 4])
def test_hosts_train_as_one_process_does(network, command, tmp_path, count):
    train(tiny_config(**SHORT), tmp_path / 'whole')
    hosts = network(count).hosts
    finish(Job(command, count, tmp_path / 'run', *as_flags(SHORT), hosts=hosts))
    assert_same_up_to_rounding(tmp_path / 'whole', tmp_path / 'run')


def silent(process, seconds=5):
    host = f'host{process}' if process else Network.address(0)
    return f'stopped: process {process} on {host} is silent for {seconds} s; {RESTART}'


def cable(network, job):
    network.plug(1, 'down')
    yield
    network.plug(1, 'up')


def interface(network, job):
    network.hosts[1].run('ip', 'link', 'set', 'eth0', 'down')
    yield
    network.hosts[1].run('ip', 'link', 'set', 'eth0', 'up')


def firewall(network, job):
    network.hosts[0].drop(f'tcp dport != {Network.PORT} drop')
    yield
    network.hosts[0].run('nft', 'flush', 'ruleset')


def hang(victim):
    def stop(network, job):
        job.processes[victim].send_signal(signal.SIGSTOP)
        yield
        job.processes[victim].kill()

    return stop


FAULTS = {
    # hosts, the fault, and what each process says; None: it cannot.
    'cable of 2': (2, cable, [silent(1), silent(0)]),
    'cable of 4': (4, cable, [silent(1), silent(0), '', '']),
    'interface': (2, interface, [silent(1), silent(0)]),
    'firewall': (2, firewall, [silent(1), silent(0)]),
    'hanging': (2, hang(1), [silent(1), None]),
    'hanging of 4': (4, hang(0), [None, *3 * [silent(0)]]),
}


# Two processes that watch each other, without training.
WATCHING = """
import socket, sys, time
import jax
from experiments.launch import distributed

process, address = int(sys.argv[1]), sys.argv[2]
jax.process_index, jax.process_count = lambda: process, lambda: 2
if process == 0:
    with socket.create_server((address, 4321)) as listener:
        connections = distributed._accept(listener, 'token')
else:
    while not (connections := distributed._reach([address], 4321, 'token')):
        time.sleep(0.1)
distributed._GRACE = 1
distributed.FailureDetector(connections, timeout=3)
print('connected', flush=True)
time.sleep(60)
"""


def test_where_a_cable_is_pulled_both_say_so(network, monkeypatch):
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    network = network(2)
    processes = [
        subprocess.Popen(
            host.command(sys.executable, '-c', WATCHING, index, Network.address(0)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, host in enumerate(network.hosts)
    ]
    assert [process.stdout.readline() for process in processes] == 2 * ['connected\n']
    network.plug(1, 'down')
    for process, line in zip(processes, [silent(1, 3), silent(0, 3)], strict=True):
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (3, f'{line}\n')


@pytest.mark.slow
@pytest.mark.parametrize('fault', FAULTS)
def test_where_a_host_falls_silent_all_end_and_the_restart_continues(
    network, command, uninterrupted, tmp_path, fault
):
    count, cause, lines = FAULTS[fault]
    network, directory = network(count), tmp_path / 'run'
    start = functools.partial(
        Job, command, count, directory, *as_flags(STEPS), '--peer_timeout=5', hosts=network.hosts
    )
    job = start()
    wait_for(job, lambda: newest_step(directory) >= 10)
    trouble = cause(network, job)
    next(trouble)
    begun = time.monotonic()
    able = [index for index, line in enumerate(lines) if line is not None]
    for index in able:
        job.processes[index].wait(timeout=120)
    seconds = time.monotonic() - begun
    print(f'{fault}: ended after {seconds:.1f} s')
    next(trouble, None)
    ended = job.wait()
    for index in able:
        status, _, err = ended[index]
        assert status == 3, err
        assert errors_of(err) == [lines[index]] * bool(lines[index])
        assert 'Fatal Python error' not in err
    assert 5 <= seconds < 60, 'the silence, and 5 seconds of grace; it may be a slow machine'
    assert 10 <= newest_step(directory) < 60
    finish(start())
    assert_same_run(directory, uninterrupted(count))


@pytest.mark.slow
def test_where_two_hosts_lose_each_other_all_end_and_the_restart_continues(
    network, command, uninterrupted, tmp_path
):
    network, directory = network(4), tmp_path / 'run'
    for host in network.hosts:  # The kernel's own patience is 15 minutes.
        host.run('sh', '-c', 'echo 4 > /proc/sys/net/ipv4/tcp_retries2')
    start = functools.partial(Job, command, 4, directory, *as_flags(STEPS), hosts=network.hosts)
    job = start()
    wait_for(job, lambda: newest_step(directory) >= 10)
    network.hosts[2].drop(f'ip saddr {Network.address(1)} drop')
    ended = job.wait()
    for status, _, err in ended:
        assert status == 3, err
        assert 'Traceback' not in err
    (line,) = errors_of(ended[0][2])
    assert line.startswith('stopped: the connection between two processes failed (')
    assert f'; {RESTART} (process ' in line
    assert all(not errors_of(err) for _, _, err in ended[1:])
    network.hosts[2].run('nft', 'flush', 'ruleset')
    finish(start())
    assert_same_run(directory, uninterrupted(4))


@pytest.mark.slow
def test_an_outage_shorter_than_the_timeout_changes_nothing(
    network, command, uninterrupted, tmp_path
):
    network, directory = network(2), tmp_path / 'run'
    job = Job(command, 2, directory, *as_flags(STEPS), hosts=network.hosts)
    wait_for(job, lambda: newest_step(directory) >= 10)
    network.plug(1, 'down')
    time.sleep(5)
    assert job.running()
    network.plug(1, 'up')
    finish(job)
    assert_same_run(directory, uninterrupted(2))


@pytest.mark.slow
def test_where_packets_are_lost_training_is_slow_and_the_same(
    network, command, uninterrupted, tmp_path
):
    few = {'duration': '4 steps', 'checkpoint__every': '2 steps', 'eval__every': '4 steps'}
    network, directory = network(2), tmp_path / 'run'
    network.hosts[1].drop('numgen random mod 100 < 30 drop')
    for _ in range(3):  # A connection may lose so many in a row that it counts as dead.
        ended = Job(command, 2, directory, *as_flags(STEPS | few), hosts=network.hosts).wait()
        statuses = {status for status, *_ in ended}
        if statuses == {0}:
            break
        assert statuses == {3}, ended
    assert_same_run(directory, uninterrupted(2, **few))


@pytest.mark.slow
def test_a_firewall_must_pass_the_coordinator_and_the_ports_that_the_system_gives(
    network, command, uninterrupted, tmp_path
):
    network, directory = network(2), tmp_path / 'run'
    for host in network.hosts:
        host.drop(f'ct state new tcp dport != {Network.PORT} drop')
    flags = (*as_flags(STEPS), '--start_timeout=60')
    for status, _, err in Job(command, 2, directory, *flags, hosts=network.hosts).wait():
        assert status == 2, err
        assert errors_of(err) == [
            'error: the processes have met, but cannot connect to one another within '
            '--start_timeout=60 seconds: firewalls must let the hosts of a run reach all ports of '
            'one another'
        ]
    assert not directory.exists()
    for host in network.hosts:
        host.run('nft', 'flush', 'ruleset')
        host.run('sh', '-c', 'echo 50000 50099 > /proc/sys/net/ipv4/ip_local_port_range')
        host.drop(f'ct state new tcp dport != {{ {Network.PORT}, 50000-50099 }} drop')
    finish(Job(command, 2, directory, *flags, hosts=network.hosts))
    assert_same_run(directory, uninterrupted(2))


# Connects to each address that it reads, with each of the payloads, and stays.
STRANGER = f"""
import contextlib, socket, sys
connections, reached = [], set()
for line in sys.stdin:
    host, _, port = line.strip().rpartition(':')
    for said in {STRANGERS!r}:
        with contextlib.suppress(OSError):
            connections.append(socket.create_connection((host, int(port)), timeout=1))
            reached.add(line)
            connections[-1].send(said)
print(len(reached))
"""


def listening(host):
    """Returns the addresses with ports on which programs of the host listen."""
    lines = host.run('ss', '--no-header', '--listening', '--tcp', '--numeric').splitlines()
    return {line.split()[3].replace('[::ffff:', '').replace(']', '') for line in lines}


@pytest.mark.slow
def test_what_listens_does_so_for_the_network_of_the_run_and_bears_strangers(
    network, command, uninterrupted, tmp_path
):
    program = tmp_path / 'stranger.py'
    program.write_text(STRANGER)
    *hosts, outsider = network(3).hosts
    job = Job(command, 2, tmp_path / 'run', *as_flags(STEPS), hosts=hosts)
    stranger = subprocess.Popen(
        outsider.command(sys.executable, program),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    found = set()
    while job.running():
        for index, host in enumerate(hosts):
            for place in listening(host) - found:
                assert place.startswith(f'{Network.address(index)}:')
                print(place, file=stranger.stdin, flush=True)
                found.add(place)
        time.sleep(0.2)
    finish(job)
    assert f'{Network.address(0)}:{Network.PORT}' in found
    assert len(found) >= 3, 'the coordinator, and Gloo of each'
    connected, _ = stranger.communicate()
    assert int(connected) >= 3
    assert_same_run(tmp_path / 'run', uninterrupted(2))
