"""The processes of one run: they start together, they end together, and none waits for the dead.

`jax.distributed` lets the devices of several processes compute together. What it does where a
process dies is not enough for a run that nobody watches: the others hang in a collective operation
until the heartbeats have been missed, and are then aborted with a stack trace of C++. Therefore
every process holds a connection to process 0, the lifeline. On it go signs of life, and the last
words of a process that fails: then all of them end with its exit status, and one line says why.
"""

import contextlib
import importlib.metadata
import importlib.util
import ipaddress
import json
import os
import re
import secrets
import select
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from experiments.launch import output
from experiments.run import parallel
from nfnets_jax.errors import UsageError, first_line

MISTAKE, PEER_LOST, INTERRUPTED = 2, 3, 130  # exit statuses
_GRACE = 5.0  # seconds that a failing process is given to hear of it, and the others to end


class Peers(NamedTuple):
    """How the processes of a run find one another; as the flags of the same names say."""

    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    start_timeout: float  # seconds
    peer_timeout: float  # seconds


@contextlib.contextmanager
def joined(peers: Peers) -> Iterator[None]:
    """Makes this process one of several, where the flags or the cluster's environment say so.

    What is done inside may use all devices. An exception or an exit status that leaves it ends all
    processes. To be called before anything else of JAX.

    Raises:
      UsageError: the flags do not fit together.
    """
    with _bounded(peers):
        lifeline = _tie(peers) if _start(peers) else None
    if not lifeline:
        yield
        return
    try:
        yield
    except UsageError as error:
        lifeline.fail(MISTAKE, f'error: {error}')
    except SystemExit as ending:
        if ending.code:
            lifeline.fail(ending.code if isinstance(ending.code, int) else 1, '')
        raise
    except KeyboardInterrupt:
        lifeline.fail(INTERRUPTED, 'interrupted')
    except BaseException as error:
        # Where a peer has died a collective operation may fail before the lifeline tells.
        lifeline.wait_for_news(_GRACE)
        sys.excepthook(type(error), error, error.__traceback__)
        lifeline.fail(1, f'stopped by {type(error).__name__}')
    finally:
        lifeline.leave()
        jax.distributed.shutdown()


def _start(peers: Peers) -> bool:
    """Starts jax.distributed; returns whether there are several processes."""
    given = {
        f'--{name}': getattr(peers, name) for name in ('coordinator', 'num_processes', 'process_id')
    }
    missing = [name for name, value in given.items() if value is None]
    explicit = len(missing) < len(given)
    if _alone(peers) or not explicit and _launched_alone():
        return False
    if explicit:
        coordinator, num_processes, process_id = peers[:3]
        if coordinator is None or num_processes is None or process_id is None:
            raise UsageError(
                f'{" and ".join(missing)} missing: give --coordinator, --num_processes and '
                '--process_id, or none of them where the cluster is recognised'
            )
        _check(coordinator, num_processes, process_id)
        if num_processes > 1:
            _check_own_name(_host(coordinator))
    # Its handler would swallow SIGTERM; how a run is stopped is said in `train`.
    jax.config.update('jax_enable_preemption_service', False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of clusters that are looked for and not there
        try:
            jax.distributed.initialize(
                peers.coordinator,
                peers.num_processes,
                peers.process_id,
                # Later than ours, which end in an abort of C++.
                initialization_timeout=int(peers.start_timeout + 30),
                heartbeat_timeout_seconds=int(peers.peer_timeout + 30),
                shutdown_timeout_seconds=int(peers.peer_timeout),
            )
        except ValueError as error:
            if not explicit and 'coordinator_address' in str(error):
                return False  # No cluster was recognised.
            raise UsageError(f'the processes cannot be joined: {first_line(error)}') from error
        except Exception as error:  # Of JAX, gRPC or the client of Kubernetes.
            hint = '' if explicit else '; to train with this process alone give --num_processes=1'
            raise UsageError(
                f'the processes cannot be joined: {first_line(error)}{hint}'
            ) from error
        _keep_stdout()
        jax.devices()  # Waits for the others as well.
    return jax.process_count() > 1


def _alone(peers: Peers) -> bool:
    return peers.num_processes == 1 and peers.coordinator is None and not peers.process_id


def _launched_alone() -> bool:
    """Whether SLURM or Open MPI says that this process is the only one.

    JAX would then take them at their word and use one GPU only, for it expects a process for each.
    """
    counts = [os.environ.get(name) for name in ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')]
    return '1' in counts


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    if num_processes < 1:
        raise UsageError(f'--num_processes={num_processes}: must be at least 1')
    if not 0 <= process_id < num_processes:
        raise UsageError(
            f'--process_id={process_id}: must be at least 0 and below '
            f'--num_processes={num_processes}'
        )
    port = re.fullmatch(r'.+:(\d+)', coordinator)
    if not port or not 0 < int(port[1]) < 1 << 16:
        raise UsageError(
            f'--coordinator={coordinator}: must be host:port, like 10.0.0.1:1234, where '
            'process 0 runs'
        )


def _check_own_name(coordinator: str) -> None:
    """Raises a UsageError where this host's name keeps CPUs of several hosts from talking.

    By Gloo each process gives the others the first address of its host's name, which Debian sets to
    127.0.1.1: a process on another host then reaches itself, and that only after both have met.
    """
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]  # JAX adds it
    if platforms != 'cpu' and (platforms or _has_accelerator_plugins()):
        return
    problem = _name_problem()
    if problem and not (_addresses(socket.gethostname()) and _is_loopback(coordinator)):
        raise UsageError(problem)


def _has_accelerator_plugins() -> bool:
    plugins = importlib.metadata.entry_points(group='jax_plugins')
    return bool(plugins) or importlib.util.find_spec('libtpu') is not None


def _name_problem() -> str | None:
    """Says what this host's name resolves to, where no other host can reach that."""
    name = socket.gethostname()
    addresses = _addresses(name)
    if addresses and not _is_loopback(addresses[0]):
        return None
    found = f'which it resolves to {addresses[0]}' if addresses else 'which resolves to no address'
    return (
        f'this host is called {name}, {found}: other hosts cannot reach it; on every host, let '
        '/etc/hosts or DNS resolve what `hostname` prints to the address in the network'
    )


def _addresses(host: str) -> list[str]:
    """Returns what a name or an address resolves to, in the order in which Gloo tries them."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [str(address).partition('%')[0] for *_, (address, *_) in found]


def _is_loopback(host: str) -> bool:
    return any(ipaddress.ip_address(address).is_loopback for address in _addresses(host))


@contextlib.contextmanager
def _bounded(peers: Peers) -> Iterator[None]:
    """Ends this process with one line if what is inside takes longer than the start may."""

    def give_up():
        who = (
            f'process {peers.process_id} has not met all {peers.num_processes} processes at '
            f'{peers.coordinator}'
            if peers.coordinator
            else 'this process has not met all those that the cluster names'
        )
        _end(MISTAKE, f'error: {who} within --start_timeout={peers.start_timeout:g} seconds')

    timer = threading.Timer(peers.start_timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _keep_stdout() -> None:
    """Sends what libraries of C++ print there, like Gloo's greetings, to the standard error."""
    sys.stdout.flush()
    sys.stdout = output.open_stream(os.dup(1), like=sys.stdout)
    os.dup2(2, 1)


def _tie(peers: Peers) -> 'Lifeline':
    """Connects every process with process 0; ends this one if another dies meanwhile."""
    try:
        return Lifeline(_connections(peers), peers.peer_timeout)
    except Exception as error:  # Of a collective operation that one has left.
        if jax.default_backend() == 'cpu' and (problem := _name_problem()):
            _end(MISTAKE, f'error: {problem}')
        _end(
            PEER_LOST,
            f'stopped: a process has died while all met ({first_line(error)}); start all again',
        )


def _connections(peers: Peers) -> dict[int, '_Connection']:
    """Returns what `Lifeline` takes; nothing, in all processes, if one cannot reach process 0."""
    listener = socket.create_server(('', 0)) if parallel.is_primary() else None
    port = listener.getsockname()[1] if listener else None
    hosts, port, token = parallel.broadcast_json([_hosts(peers), port, secrets.token_hex(16)])
    if listener:
        with listener:
            connections = _accept(listener, token)
        complete = len(connections) == jax.process_count() - 1
    else:
        connections = _connect(hosts, port, token)
        complete = bool(connections)
    if not parallel.gather(np.array([complete], np.uint32)).all():
        if parallel.is_primary():
            print(
                f'warning: not every process can reach port {port} of process 0 at '
                f'{" or ".join(hosts)}: JAX alone notices, and later, should one of them die',
                file=sys.stderr,
            )
        return {}
    return connections


def _host(coordinator: str) -> str:
    return coordinator.rpartition(':')[0].strip('[]')


def _hosts(peers: Peers) -> list[str]:
    """Returns the names and addresses at which other processes may reach this one."""
    if peers.coordinator:
        return [_host(peers.coordinator)]
    hosts = []
    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect(('192.0.2.1', 9))  # Sends nothing: it asks which interface leads outside.
        hosts.append(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        hosts.append(socket.gethostbyname(socket.gethostname()))
    return list(dict.fromkeys(hosts)) or ['127.0.0.1']


def _accept(listener: socket.socket, token: str) -> dict[int, '_Connection']:
    """Returns the connections of all others by their process index, or what has come in time."""
    connections: dict[int, _Connection] = {}
    deadline = time.monotonic() + _CONNECT_SECONDS
    while len(connections) < jax.process_count() - 1 and time.monotonic() < deadline:
        listener.settimeout(max(deadline - time.monotonic(), 0.1))
        # Whoever else may have found the port can say anything.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            connection = _Connection(listener.accept()[0])
            greeting = connection.read_greeting()
            if secrets.compare_digest(str(greeting['token']).encode(), token.encode()):
                connection.host = greeting['host']
                connections[int(greeting['process'])] = connection
    return connections


def _connect(hosts: Iterable[str], port: int, token: str) -> dict[int, '_Connection']:
    """Returns the connection to process 0, by that index; nothing if it cannot be reached."""
    for host in hosts:
        with contextlib.suppress(OSError):
            connection = _Connection(socket.create_connection((host, port), timeout=5))
            connection.host = host
            connection.send(
                {'token': token, 'process': jax.process_index(), 'host': socket.gethostname()}
            )
            return {0: connection}
    return {}


_CONNECT_SECONDS = 20.0


class _Connection:
    """One end of a lifeline: messages are JSON objects, one a line."""

    host = ''

    def __init__(self, end: socket.socket):
        self.socket = end
        self.heard = time.monotonic()
        self._received, self._sending = b'', threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a message; where the other end is gone that is for `receive` to find out."""
        with contextlib.suppress(OSError), self._sending:
            self.socket.sendall(json.dumps(message).encode() + b'\n')

    def receive(self) -> list[dict]:
        """Returns the messages that have come; raises OSError once the other end is gone."""
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionResetError
        self.heard = time.monotonic()
        *lines, self._received = (self._received + data).split(b'\n')
        return [json.loads(line) for line in lines]

    def read_greeting(self) -> dict:
        self.socket.settimeout(5)
        while True:
            if messages := self.receive():
                return messages[0]


class Lifeline:
    """Ends this process when another has failed or died.

    Args:
      connections: to process 0, or of process 0 to all others, by process index.
      timeout: seconds of silence after which a process counts as dead.
    """

    def __init__(self, connections: dict[int, _Connection], timeout: float):
        self._connections, self._timeout = connections, timeout
        self._failure: tuple[int, str] | None = None  # exit status and line, of this process
        self._ended: set[int] = set()  # those that took their leave
        self._left = False
        self._thread = threading.Thread(target=self._watch, name='lifeline', daemon=True)
        if connections:
            self._thread.start()

    def fail(self, status: int, line: str) -> NoReturn:
        """Ends all processes with this status; one of them tells the line."""
        self._failure = status, line
        self.wait_for_news(2 * _GRACE)
        _end(status, line)

    def wait_for_news(self, seconds: float) -> None:
        """Gives another process time to end this one too."""
        if self._connections:
            self._thread.join(seconds)

    def leave(self) -> None:
        """Tells the others that this process has done its part."""
        self._left = True
        for connection in self._connections.values():
            connection.send({'left': True})

    def _watch(self) -> None:
        interval = min(0.5, self._timeout / 4)
        while not self._left:
            self._listen(interval)
            if self._failure:
                self._end_all(*self._failure)
            for connection in self._connections.values():
                connection.send({})
            for index, connection in self._connections.items():
                if index in self._ended:
                    continue  # What has taken its leave may be silent.
                if time.monotonic() - connection.heard > self._timeout:
                    self._end_all(
                        PEER_LOST, _lost(index, connection, f'is silent for {self._timeout:g} s')
                    )

    def _listen(self, seconds: float) -> None:
        here = [c.socket for i, c in self._connections.items() if i not in self._ended]
        readable, _, _ = select.select(here, [], [], seconds)
        for index, connection in self._connections.items():
            if connection.socket not in readable:
                continue
            try:
                messages = connection.receive()
            except (OSError, ValueError):
                self._end_all(PEER_LOST, _lost(index, connection, 'has died'))
            for message in messages:
                if 'left' in message:
                    self._ended.add(index)
                elif 'status' in message:
                    self._hear_last_words(index, message)

    def _hear_last_words(self, index: int, message: Mapping[str, Any]) -> NoReturn:
        if not parallel.is_primary():
            _end(message['status'], '')  # Process 0 has told why.
        # Often all have the same to say; then it is not that process's own.
        time.sleep(1)
        line = f'{message["line"]} (process {index})' if message['line'] else ''
        self._end_all(*(self._failure or (message['status'], line)))

    def _end_all(self, status: int, line: str) -> NoReturn:
        """Tells the line, or has process 0 tell it, and sees to it that the others end first."""
        told = parallel.is_primary()
        if told:
            _tell(line)
        for connection in self._connections.values():
            connection.send({'status': status, 'line': line})
        deadline = time.monotonic() + _GRACE
        for connection in self._connections.values():
            connection.socket.settimeout(max(deadline - time.monotonic(), 0.01))
            with contextlib.suppress(OSError, ValueError):
                while not any('status' in message for message in connection.receive()):
                    pass
                if not told:
                    _end(status, '')
        _end(status, '' if told else line)


def _lost(index: int, connection: _Connection, what: str) -> str:
    return (
        f'stopped: process {index} on {connection.host} {what}; start all processes again, and '
        'training continues from the last checkpoint'
    )


def _tell(line: str) -> None:
    if line:
        # Below the progress bar, where there is one.
        print(f'\n{line}' if sys.stderr.isatty() else line, file=sys.stderr, flush=True)


def _end(status: int, line: str) -> NoReturn:
    """Ends this process at once: its main thread may be waiting for the dead, and never return."""
    try:
        _tell(line)
        sys.stdout.flush()
    finally:
        os._exit(status)
