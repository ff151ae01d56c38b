"""The processes of a run: how they meet, and that none outlives another in silence."""

import os
import re
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.launch.distributed import Options, session
from experiments.run import parallel
from nfnets_jax.errors import UsageError
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
        processes = [
            subprocess.Popen(
                [sys.executable, file, f'--coordinator=localhost:{port}', '--num_processes=2']
                + [f'--process_id={index}', *flags, fate],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment_of_two(),
            )
            for index in range(2)
        ]
        try:
            return [(*p.communicate(timeout=120), p.returncode) for p in reversed(processes)][::-1]
        finally:
            for process in processes:
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
    process = subprocess.run(
        [sys.executable, '-m', 'experiments.evaluate', '--workdir=nowhere', '--start_timeout=1']
        + [f'--coordinator=localhost:{free_port()}', '--num_processes=2', '--process_id=1'],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert process.returncode == 2
    assert re.fullmatch(
        r'error: process 1 has not met all 2 processes at localhost:\d+ within '
        r'--start_timeout=1 seconds\n',
        process.stderr,
    )


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


NAMES = ('nfnets-test-a', 'nfnets-test-b')


@pytest.fixture
def two_hosts(tmp_path):
    """Two network namespaces with addresses 10.77.0.1 and .2: a function that runs PROGRAM there.

    It takes what their own names resolve to, and returns exit status, output, errors of each.
    """
    if os.geteuid() or not (shutil.which('ip') and shutil.which('unshare')):
        pytest.skip('needs to be root, and iproute2 and util-linux')

    def ip(*arguments):
        return subprocess.run(['ip', *arguments], capture_output=True, text=True)

    def remove():
        for name in NAMES:
            ip('netns', 'del', name)

    remove()
    commands = [
        *(('netns', 'add', name) for name in NAMES),
        (
            'link',
            'add',
            'eth0',
            'netns',
            NAMES[0],
            'type',
            'veth',
            'peer',
            'eth0',
            'netns',
            NAMES[1],
        ),
    ]
    for index, name in enumerate(NAMES):
        commands += [
            ('-n', name, 'addr', 'add', f'10.77.0.{index + 1}/24', 'dev', 'eth0'),
            ('-n', name, 'link', 'set', 'eth0', 'up'),
            ('-n', name, 'link', 'set', 'lo', 'up'),
        ]
    for command in commands:
        if (done := ip(*command)).returncode:
            remove()
            pytest.skip(f'needs to make network namespaces: {done.stderr.strip()}')
    program = tmp_path / 'program.py'
    program.write_text(PROGRAM)

    def run(addresses):
        processes = []
        for index, (name, address) in enumerate(zip(NAMES, addresses, strict=True)):
            hosts = tmp_path / f'hosts{index}'
            hosts.write_text(f'127.0.0.1 localhost\n{address} {name}\n')
            script = f'mount --bind {hosts} /etc/hosts && hostname {name} && exec "$@"'
            processes.append(
                subprocess.Popen(
                    ['ip', 'netns', 'exec', name, 'unshare', '--uts', '--mount']
                    + ['sh', '-c', script, 'sh', sys.executable, str(program)]
                    + ['--coordinator=10.77.0.1:4321', '--num_processes=2']
                    + [f'--process_id={index}', 'none:0'],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment_of_two(),
                )
            )
        return [(p.returncode, *texts) for p, texts in ((p, p.communicate()) for p in processes)]

    yield run
    remove()


def test_two_hosts_whose_own_names_lead_to_themselves_say_so(two_hosts):
    for name, (status, out, err) in zip(NAMES, two_hosts(['127.0.1.1', '127.0.0.1']), strict=True):
        assert (status, out) == (2, ''), err
        assert re.fullmatch(
            rf'error: this host is called {name}, which it resolves to 127\.0\.[01]\.1: other '
            r'hosts cannot reach it; on every host, let /etc/hosts .*\n',
            err,
        )


@pytest.mark.slow
def test_two_hosts_train_where_their_names_are_those_of_the_network(two_hosts):
    for index, (status, out, err) in enumerate(two_hosts(['10.77.0.1', '10.77.0.2'])):
        assert (status, out) == (0, f'done {index}\n'), err
