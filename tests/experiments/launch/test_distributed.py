"""The processes of a run: how they meet, and that none outlives another in silence."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments.launch import distributed
from experiments.launch.distributed import Options, session
from experiments.run import parallel
from nfnets_jax.errors import UsageError
from tests import processes
from tests.experiments.conftest import ROOT

# What a process does once it has met the other; FATE is for the process of that number.
PROGRAM = """
import os, sys, time
import jax, numpy as np
from absl import flags
from experiments.launch import cli
from experiments.run import parallel
from nfnets_jax.errors import UsageError

FATES = {
    'mistake': lambda: (_ for _ in ()).throw(UsageError('config.x is wrong')),
    'bug': lambda: 1 / 0,
    'killed': lambda: os.kill(os.getpid(), 9),
}

def main():
    process, (fate, victim) = jax.process_index(), sys.argv[-1].split(':')
    tree = {'a': np.float32([-0.0, np.nan, 1]) * (process + 1), 'b': np.arange(5, dtype='u1')}
    received = parallel.broadcast(tree)
    assert received['a'].tobytes() == np.float32([-0.0, np.nan, 1]).tobytes()
    assert received['b'].tolist() == [0, 1, 2, 3, 4]
    assert parallel.broadcast_json({'process': process}) == {'process': 0}
    assert parallel.gather(np.uint32([process, 7])).tolist() == [[0, 7], [1, 7]]
    assert parallel.gather_text(f'I am {process}') == ['I am 0', 'I am 1']
    assert parallel.describe_devices() == '4 devices in 2 processes'
    if fate != 'none':
        if process == int(victim):
            FATES[fate]()
        time.sleep(60)
    print('done', process)

cli.run(lambda arguments: main(), positional=True, distributed=True)
"""


def free_port():
    with socket.create_server(('', 0)) as server:
        return server.getsockname()[1]


def environment_of_two():
    return {
        **os.environ,
        'PYTHONPATH': str(ROOT),
        'XLA_FLAGS': re.sub(r'(device_count)=\d+', r'\1=2', os.environ['XLA_FLAGS']),
    }


@pytest.fixture
def run_two(tmp_path):
    """A function: two processes of PROGRAM with a fate -> exit status, output, errors of each."""
    file = tmp_path / 'program.py'
    file.write_text(PROGRAM)

    def run(fate, *flags):
        port = free_port()
        both = [
            processes.start(
                [file, f'--coordinator=localhost:{port}', '--num_processes=2']
                + [f'--process_id={index}', *flags, fate],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment_of_two(),
            )
            for index in range(2)
        ]
        try:
            return [(*p.communicate(timeout=120), p.returncode) for p in reversed(both)][::-1]
        finally:
            for process in both:
                process.kill()

    return run


def errors_of(text):
    """The lines on the standard error that are ours or Python's, not Gloo's and C++'s."""
    return [line for line in text.splitlines() if re.match(r'error|stopped|warning|Trace', line)]


def test_two_processes_agree_on_what_process_0_has_and_end_together(run_two):
    for index, (out, err, status) in enumerate(run_two('none:0')):
        assert status == 0, err
        assert out == f'done {index}\n', 'nothing else on the standard output'


def test_a_mistake_of_one_is_told_once_and_ends_both(run_two):
    (_, err_0, status_0), (_, err_1, status_1) = run_two('mistake:1')
    assert status_0 == status_1 == 2
    assert errors_of(err_0) == ['error: config.x is wrong (process 1)']
    assert errors_of(err_1) == []


def test_where_one_is_killed_the_other_says_so_and_ends(run_two):
    (_, err, status), (_, _, killed) = run_two('killed:1')
    assert (status, killed) == (3, -9)
    assert errors_of(err)[0].startswith('stopped: process 1 on ')
    assert 'has died; start all processes again' in errors_of(err)[0]


@pytest.mark.slow
def test_where_process_0_is_killed_too(run_two):
    (_, _, killed), (_, err, status) = run_two('killed:0')
    assert (status, killed) == (3, -9)
    assert any(line.startswith('stopped: process 0 on') for line in errors_of(err))


@pytest.mark.slow
def test_a_bug_ends_both_with_its_stack_trace(run_two):
    (_, err_0, status_0), (_, err_1, status_1) = run_two('bug:1')
    assert status_0 == status_1 == 1
    assert errors_of(err_0) == ['stopped by ZeroDivisionError (process 1)']
    assert 'ZeroDivisionError: division by zero' in err_1


def test_one_that_the_others_never_join_gives_up():
    process = processes.run(
        ['-m', 'experiments.evaluate', '--workdir=nowhere', '--start_timeout=1']
        + [f'--coordinator=localhost:{free_port()}', '--num_processes=2', '--process_id=1'],
        cwd=ROOT,
    )
    assert process.returncode == 2
    assert re.fullmatch(
        r'error: process 1 has not met all 2 processes at localhost:\d+ within '
        r'--start_timeout=1 seconds\n',
        process.stderr,
    )


STRANGERS = [
    b'',  # and stays
    b'GET / HTTP/1.1\r\n\r\n',
    bytes(range(256)),
    b'x' * 200_000,
    b'{"token": "guessed", "process": 1, "host": "stranger"}\n',
    b'{"token": 1}\n',
    b'[[]]\n',
    b'[' * 60_000 + b'\n',
    b'{"token": ',  # and more never comes
]


def test_strangers_neither_join_a_run_nor_delay_it(monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(distributed._listen('127.0.0.1'))
        place = listener.getsockname()
        for said in STRANGERS * 3:
            stranger = stack.enter_context(socket.create_connection(place))
            stranger.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                stranger.send(said)
        monkeypatch.setattr(jax, 'process_index', lambda: 1)
        distributed._reach([place[0]], place[1], 'token')
        begun = time.monotonic()
        connections = distributed._accept(listener, 'token')
        assert time.monotonic() - begun < distributed._CONNECT_SECONDS / 2
        assert [(index, c.host) for index, c in connections.items()] == [(1, socket.gethostname())]


def test_where_a_process_does_not_come_strangers_are_not_waited_for(monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(distributed, '_CONNECT_SECONDS', 0.5)
    with (
        distributed._listen('127.0.0.1') as listener,
        socket.create_connection(listener.getsockname()) as stranger,
    ):
        stranger.send(b'{')
        assert distributed._accept(listener, 'token') == {}
        assert stranger.recv(1) == b'', 'it is hung up on'


@pytest.mark.parametrize(
    ('coordinator', 'addresses', 'listens'),
    [
        ('127.0.0.1:4321', ['127.0.0.1'], True),
        ('localhost:4321', ['::1', '127.0.0.1'], True),
        ('me:4321', ['127.0.1.1'], False),  # Other hosts may know it by another address.
        ('elsewhere:4321', ['192.0.2.1'], False),
        ('nowhere:4321', [], False),
        (None, [], False),
    ],
)
def test_the_coordinator_listens_on_its_own_address_alone(
    monkeypatch, coordinator, addresses, listens
):
    known = {(coordinator or '').rpartition(':')[0]: addresses}
    monkeypatch.setattr(distributed, '_addresses', lambda host: known.get(host, [host]))
    assert distributed._bind_address(coordinator) == (coordinator if listens else None)
    monkeypatch.setenv('JAX_COORDINATOR_BIND_ADDRESS', '[::]:4321')
    assert distributed._bind_address(coordinator) is None


def test_heartbeats_come_twice_a_second_however_many_arrive():
    here, there = socket.socketpair()
    with there:
        detector = distributed.FailureDetector({1: distributed._Connection(here)}, timeout=60)
        received, end = 0, time.monotonic() + 2
        while time.monotonic() < end:
            received += there.recv(1 << 16).count(b'\n')
            there.send(b'{}\n')
        detector.leave()
    assert 2 <= received <= 6


def test_a_pause_of_a_process_is_no_silence_of_the_others(monkeypatch):
    ended = []
    monkeypatch.setattr(distributed.FailureDetector, '_end_all', lambda _, *why: ended.append(why))
    here, there = socket.socketpair()
    connection = distributed._Connection(here)

    def pause(message):
        time.sleep(0.3)
        there.send(b'{}\n')  # meanwhile

    monkeypatch.setattr(connection, 'send', pause)
    with there:
        detector = distributed.FailureDetector({1: connection}, timeout=0.2)
        time.sleep(0.8)
        detector.leave()
        detector.wait_for_end(2)
    assert not ended


def test_jax_detects_a_silent_process_later_than_we_do(monkeypatch):
    given = {}

    def initialize(*_, **options):
        given.update(options)
        raise RuntimeError

    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    with pytest.raises(UsageError), session(Options('localhost:1', 2, 0, 300, 60)):
        pass
    # It sends heartbeats at half of that interval: it may have sent one before the silence began.
    assert given['heartbeat_timeout_seconds'] / 2 > 60 + 2 * distributed._GRACE
    assert given['initialization_timeout'] > 300


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ((None, 2, 0), '--coordinator missing: give --coordinator, --num_processes and'),
        (('host:1', None, None), '--num_processes and --process_id missing'),
        (('host', 2, 0), '--coordinator=host: must be host:port, like 10.0.0.1:1234'),
        (('host:99999', 2, 0), '--coordinator=host:99999: must be host:port'),
        (('host:1', 2, 2), '--process_id=2: must be at least 0 and below --num_processes=2'),
        (('host:1', 2, -1), '--process_id=-1: must be at least 0'),
        (('host:1', 0, 0), '--num_processes=0: must be at least 1'),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    with pytest.raises(UsageError, match=message), session(Options(*flags, 300, 60)):
        pass


@pytest.mark.parametrize('name', ['SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'])
def test_a_launcher_of_one_process_is_no_cluster(monkeypatch, name):
    monkeypatch.setenv(name, '1')
    with session(Options(None, None, None, 300, 60)):
        assert parallel.is_primary()


def test_one_process_may_say_that_it_is_alone(monkeypatch):
    monkeypatch.setenv('SLURM_NTASKS', '2')
    with session(Options(None, 1, None, 300, 60)):
        assert parallel.describe_devices() == '4 devices'
    tree = {'w': np.float32([-0.0])}
    assert parallel.broadcast(tree)['w'].tobytes() == tree['w'].tobytes()
    assert parallel.gather(np.uint32([3])).tolist() == [[3]]


@pytest.mark.parametrize(
    ('coordinator', 'platforms', 'names', 'found'),
    [
        ('10.0.0.1:1', 'cpu', {'me': '127.0.1.1'}, 'which it resolves to 127.0.1.1: other hosts'),
        ('there:1', 'cpu', {'me': '::1', 'there': '10.0.0.1'}, 'which it resolves to ::1: other'),
        ('10.0.0.1:1', 'cpu', {}, 'which resolves to no address: other hosts cannot reach it'),
        ('localhost:1', 'cpu', {'localhost': '127.0.0.1'}, 'which resolves to no address'),
        ('10.0.0.1:1', 'cpu', {'me': '10.0.0.1'}, None),
        ('10.0.0.1:1', 'cuda', {'me': '127.0.1.1'}, None),
        ('localhost:1', 'cpu', {'me': '127.0.1.1', 'localhost': '127.0.0.1'}, None),
    ],
)
def test_the_name_of_a_host_that_others_cannot_reach(
    monkeypatch, coordinator, platforms, names, found
):
    def getaddrinfo(host, *_, **__):
        if host not in names and not host[0].isdigit() and ':' not in host:
            raise socket.gaierror
        return [(0, 0, 0, '', (names.get(host, host), 0))]

    monkeypatch.setattr(socket, 'gethostname', lambda: 'me')
    monkeypatch.setattr(socket, 'getaddrinfo', getaddrinfo)
    # JAX is started here: what comes after the check must not happen.
    monkeypatch.setattr(jax.distributed, 'initialize', lambda *_, **__: 1 / 0)
    before = jax.config.jax_platforms
    jax.config.update('jax_platforms', platforms)
    try:
        expected = f'this host is called me, {found}' if found else 'the processes cannot be joined'
        peers = Options(coordinator, 2, 0, 300, 60)
        with pytest.raises(UsageError, match=re.escape(expected)), session(peers):
            pass
    finally:
        jax.config.update('jax_platforms', before)


@pytest.fixture
def run_on_hosts(network, tmp_path):
    """A function: PROGRAM on two hosts that resolve their own names to these addresses.

    It returns exit status, output and errors of each.
    """
    program = tmp_path / 'program.py'
    program.write_text(PROGRAM)

    def run(own_addresses):
        hosts = network(2, own_addresses).hosts
        both = [
            subprocess.Popen(
                host.command(sys.executable, program, '--coordinator=10.77.0.1:4321')
                + ['--num_processes=2', f'--process_id={index}', 'none:0'],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment_of_two(),
            )
            for index, host in enumerate(hosts)
        ]
        return [(p.returncode, *texts) for p, texts in ((p, p.communicate()) for p in both)]

    return run


def test_two_hosts_whose_own_names_lead_to_themselves_say_so(run_on_hosts):
    for index, (status, out, err) in enumerate(run_on_hosts(['127.0.1.1', '127.0.0.1'])):
        assert (status, out) == (2, ''), err
        assert re.fullmatch(
            rf'error: this host is called host{index}, which it resolves to 127\.0\.[01]\.1: other '
            r'hosts cannot reach it; on every host, let /etc/hosts .*\n',
            err,
        )


@pytest.mark.slow
def test_two_hosts_train_where_their_names_are_those_of_the_network(run_on_hosts):
    for index, (status, out, err) in enumerate(run_on_hosts(['10.77.0.1', '10.77.0.2'])):
        assert (status, out) == (0, f'done {index}\n'), err
