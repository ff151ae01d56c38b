"""Start-up, failure detection and shutdown of a multi-process run.

`jax.distributed` lets the devices of several processes compute together. If a process dies, the
others hang in a collective operation until its heartbeats time out, and then abort with a stack
trace of C++. That is not enough for an unattended run. So every process also holds a connection to
process 0, for heartbeats and for the error of a process that fails: then all processes end with its
exit status, and one line says why.
"""

import contextlib
import importlib.metadata
import importlib.util
import ipaddress
import json
import os
import re
import secrets
import selectors
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from experiments.launch import output
from experiments.run import parallel
from nfnets_jax.errors import UsageError, first_line

MISTAKE, PEER_LOST, INTERRUPTED = 2, 3, 130  # exit statuses
_GRACE = 5.0  # seconds that a failing process and the others have to end


class Options(NamedTuple):
    """The flags of the same names: how the processes of a run find one another."""

    coordinator: str | None
    num_processes: int | None
    process_id: int | None
    start_timeout: float  # seconds
    peer_timeout: float  # seconds


@contextlib.contextmanager
def session(options: Options) -> Iterator[None]:
    """Joins the processes of a run if the flags or the environment of the cluster name several.

    The block may use the devices of all. An exception or exit status that leaves the block ends all
    processes. Enter it before any other use of JAX.

    Raises:
      UsageError: the flags do not fit together.
    """
    detector = None
    with _startup_deadline(options) as met:
        if _start(options):
            met.set()
            detector = _connect(options)
    if not detector:
        yield
        return
    try:
        yield
    except UsageError as error:
        detector.fail(MISTAKE, f'error: {error}')
    except SystemExit as ending:
        if ending.code:
            detector.fail(ending.code if isinstance(ending.code, int) else 1, '')
        raise
    except KeyboardInterrupt:
        detector.fail(INTERRUPTED, 'interrupted')
    except BaseException as error:
        # If another process has died, a collective operation may fail before it is detected.
        detector.wait_for_end(_GRACE)
        if isinstance(error, jax.errors.JaxRuntimeError) and 'Gloo' in str(error):
            lost = f'the connection between two processes failed ({first_line(error)})'
            detector.fail(PEER_LOST, f'stopped: {lost}; {_RESTART}')
        sys.excepthook(type(error), error, error.__traceback__)
        detector.fail(1, f'stopped by {type(error).__name__}')
    finally:
        detector.leave()
        jax.distributed.shutdown()


def _start(options: Options) -> bool:
    """Starts jax.distributed; returns whether there are several processes."""
    given = {
        f'--{name}': getattr(options, name)
        for name in ('coordinator', 'num_processes', 'process_id')
    }
    missing = [name for name, value in given.items() if value is None]
    explicit = len(missing) < len(given)
    if _is_single(options) or not explicit and _is_launched_singly():
        return False
    if explicit:
        coordinator, num_processes, process_id = options[:3]
        if coordinator is None or num_processes is None or process_id is None:
            raise UsageError(
                f'{" and ".join(missing)} missing: give --coordinator, --num_processes and '
                '--process_id, or none of them where the cluster is recognised'
            )
        _check_flags(coordinator, num_processes, process_id)
        if num_processes > 1:
            _check_host_name(_host(coordinator))
    # Its handler would swallow SIGTERM, which experiments.launch.preemption handles.
    jax.config.update('jax_enable_preemption_service', False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # JAX warns about clusters that it does not find.
        try:
            jax.distributed.initialize(
                options.coordinator,
                options.num_processes,
                options.process_id,
                # Longer than ours, because these end in an abort of C++. JAX sends a heartbeat each
                # half of its timeout, so it may miss one after the other half.
                initialization_timeout=int(options.start_timeout + 30),
                heartbeat_timeout_seconds=int(2 * (options.peer_timeout + 30)),
                shutdown_timeout_seconds=int(options.peer_timeout),
                coordinator_bind_address=_bind_address(options.coordinator),
            )
        except ValueError as error:
            if not explicit and 'coordinator_address' in str(error):
                return False  # No cluster was recognised.
            raise UsageError(f'the processes cannot be joined: {first_line(error)}') from error
        except Exception as error:  # From JAX, gRPC or the client of Kubernetes.
            hint = '' if explicit else '; to train with this process alone give --num_processes=1'
            raise UsageError(
                f'the processes cannot be joined: {first_line(error)}{hint}'
            ) from error
        _redirect_stdout()
        jax.devices()  # Waits for the other processes, too.
    return jax.process_count() > 1


def _is_single(options: Options) -> bool:
    return options.num_processes == 1 and options.coordinator is None and not options.process_id


def _is_launched_singly() -> bool:
    """Returns whether SLURM or Open MPI started this process alone.

    JAX would then use one GPU only, because it expects one process for each.
    """
    counts = [os.environ.get(name) for name in ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')]
    return '1' in counts


def _check_flags(coordinator: str, num_processes: int, process_id: int) -> None:
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


def _check_host_name(coordinator: str) -> None:
    """Raises a UsageError if this host's name prevents CPUs of several hosts from communicating.

    With Gloo each process sends the others the first address of its host's name, which Debian sets
    to 127.0.1.1. A process on another host then connects to itself, after both have met.
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
    """Describes what this host's name resolves to, if no other host can reach that."""
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
    """Returns the addresses of a name or an address, in the order in which Gloo tries them."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return [str(address).partition('%')[0] for *_, (address, *_) in found]


def _is_loopback(host: str) -> bool:
    return any(ipaddress.ip_address(address).is_loopback for address in _addresses(host))


def _own_address(host: str) -> str:
    """Returns the address with this name if it is one of this host; '' otherwise.

    A name that leads to the loopback here may lead elsewhere on other hosts, except localhost.
    """
    addresses = sorted(_addresses(host), key=lambda address: ':' in address)  # IPv4 first
    if _is_loopback(host) and host not in ('localhost', *addresses):
        return ''
    for address in addresses:
        with contextlib.suppress(OSError), _listen(address):
            return address
    return ''


def _listen(address: str) -> socket.socket:
    """Returns a socket that listens on any free port of the address; '': of all of this host."""
    family = socket.AF_INET6 if ':' in address else socket.AF_INET
    return socket.create_server((address, 0), family=family)


def _bind_address(coordinator: str | None) -> str | None:
    """Returns where process 0's coordinator of JAX listens; None: on all addresses."""
    if not coordinator or 'JAX_COORDINATOR_BIND_ADDRESS' in os.environ:
        return None
    # By its name, which may have several addresses.
    return coordinator if _own_address(_host(coordinator)) else None


@contextlib.contextmanager
def _startup_deadline(options: Options) -> Iterator[threading.Event]:
    """Ends this process with one line if the block takes longer than --start_timeout.

    The block sets the event once all processes have met.
    """
    met = threading.Event()

    def give_up():
        seconds = f'within --start_timeout={options.start_timeout:g} seconds'
        if met.is_set():
            _end(MISTAKE, _unconnected(seconds))
        who = (
            f'process {options.process_id} has not met all {options.num_processes} processes at '
            f'{options.coordinator}'
            if options.coordinator
            else 'this process has not met all those that the cluster names'
        )
        _end(MISTAKE, f'error: {who} {seconds}')

    timer = threading.Timer(options.start_timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield met
    finally:
        timer.cancel()


def _redirect_stdout() -> None:
    """Redirects the standard output of C++ libraries, like Gloo's messages, to standard error."""
    sys.stdout.flush()
    sys.stdout = output.open_stream(os.dup(1), template=sys.stdout)
    os.dup2(2, 1)


def _connect(options: Options) -> 'FailureDetector':
    """Connects every process to process 0; ends this one if another dies meanwhile."""
    try:
        return FailureDetector(_connections(options), options.peer_timeout)
    except Exception as error:  # From a collective operation without one of the processes.
        if jax.default_backend() == 'cpu' and (problem := _name_problem()):
            _end(MISTAKE, f'error: {problem}')
        if re.search('time(d |-)?out', str(error), re.IGNORECASE):
            _end(MISTAKE, _unconnected(f'({first_line(error)})'))
        _end(
            PEER_LOST,
            f'stopped: a process has died while all met ({first_line(error)}); start all again',
        )


def _unconnected(detail: str) -> str:
    return (
        f'error: the processes have met, but cannot connect to one another {detail}: firewalls '
        'must let the hosts of a run reach all ports of one another'
    )


def _connections(options: Options) -> dict[int, '_Connection']:
    """Returns the connections of `FailureDetector`; none anywhere if one process has none."""
    listener = None
    if parallel.is_primary():
        listener = _listen(_own_address(_host(options.coordinator)) if options.coordinator else '')
    port = listener.getsockname()[1] if listener else None
    hosts, port, token = parallel.broadcast_json([_hosts(options), port, secrets.token_hex(16)])
    if listener:
        with listener:
            connections = _accept(listener, token)
        complete = len(connections) == jax.process_count() - 1
    else:
        connections = _reach(hosts, port, token)
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


def _hosts(options: Options) -> list[str]:
    """Returns names and addresses at which other processes may reach this one."""
    if options.coordinator:
        return [_host(options.coordinator)]
    hosts = []
    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect(('192.0.2.1', 9))  # Sends nothing; selects the interface that leads outside.
        hosts.append(probe.getsockname()[0])
    with contextlib.suppress(OSError):
        hosts.append(socket.gethostbyname(socket.gethostname()))
    return list(dict.fromkeys(hosts)) or ['127.0.0.1']


def _accept(listener: socket.socket, token: str) -> dict[int, '_Connection']:
    """Returns the connections of the other processes that came in time, by process index.

    Another program that finds the port may connect, and send nothing or anything.
    """
    connections: dict[int, _Connection] = {}
    unknown: list[_Connection] = []  # They have not sent their token yet.
    deadline = time.monotonic() + _CONNECT_SECONDS
    listener.setblocking(False)
    while len(connections) < jax.process_count() - 1 and time.monotonic() < deadline:
        readable = _readable([listener, *(c.socket for c in unknown)], deadline - time.monotonic())
        with contextlib.suppress(OSError):  # The other end may be gone already.
            if listener in readable:
                unknown.append(_Connection(listener.accept()[0]))
        for connection in [c for c in unknown if c.socket in readable]:
            try:
                greetings = connection.receive()
                if not greetings:
                    continue
                if secrets.compare_digest(str(greetings[0]['token']).encode(), token.encode()):
                    connection.host = greetings[0]['host']
                    connections[int(greetings[0]['process'])] = connection
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                connection.socket.close()
            unknown.remove(connection)
    for connection in unknown:
        connection.socket.close()
    return connections


def _readable(sockets: Iterable[socket.socket], seconds: float) -> list[socket.socket]:
    """Returns the sockets with something to read, once there is one or the time is up."""
    with selectors.DefaultSelector() as selector:
        for each in sockets:
            selector.register(each, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(max(seconds, 0))]  # type: ignore[misc]


def _reach(hosts: Sequence[str], port: int, token: str) -> dict[int, '_Connection']:
    """Returns {0: the connection to process 0}; {} if it cannot be reached."""
    for host in hosts:
        with contextlib.suppress(OSError):
            seconds = _CONNECT_SECONDS / len(hosts)
            connection = _Connection(socket.create_connection((host, port), timeout=seconds))
            connection.host = host
            connection.send(
                {'token': token, 'process': jax.process_index(), 'host': socket.gethostname()}
            )
            return {0: connection}
    return {}


_CONNECT_SECONDS = 20.0
_MESSAGE_BYTES = 1 << 16


class _Connection:
    """One end of a connection; messages are JSON objects, one a line."""

    host = ''

    def __init__(self, end: socket.socket):
        self.socket = end
        end.settimeout(5)  # Nothing waits longer than that for the other end.
        self.last_message = time.monotonic()
        self._received, self._sending = b'', threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a message; `receive` reports if the other end is gone."""
        with contextlib.suppress(OSError), self._sending:
            self.socket.sendall(json.dumps(message).encode() + b'\n')

    def receive(self) -> list[dict]:
        """Returns the messages received.

        Raises:
          OSError: the other end is gone.
          ValueError: it sends something else than messages.
        """
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionResetError
        self.last_message = time.monotonic()
        *lines, self._received = (self._received + data).split(b'\n')
        if len(self._received) > _MESSAGE_BYTES:
            raise ValueError
        return [json.loads(line) for line in lines]


class FailureDetector:
    """Ends this process when another one has failed or died.

    Args:
      connections: connections to process 0, or from it to all others, by process index.
      timeout: seconds of silence after which a process counts as dead.
    """

    def __init__(self, connections: dict[int, _Connection], timeout: float):
        self._connections, self._timeout = connections, timeout
        self._failure: tuple[int, str] | None = None  # exit status and line of this process
        self._ended: set[int] = set()  # processes that have left
        self._left = False
        self._thread = threading.Thread(target=self._watch, name='failures', daemon=True)
        if connections:
            self._thread.start()

    def fail(self, status: int, line: str) -> NoReturn:
        """Ends all processes with this status; one of them prints the line."""
        self._failure = status, line
        self.wait_for_end(2 * _GRACE)
        _end(status, line)

    def wait_for_end(self, seconds: float) -> None:
        """Gives another process time to end this one, too."""
        if self._connections:
            self._thread.join(seconds)

    def leave(self) -> None:
        """Tells the other processes that this one is done."""
        self._left = True
        for connection in self._connections.values():
            connection.send({'left': True})

    def _watch(self) -> None:
        interval, heartbeat_due = min(0.5, self._timeout / 4), 0.0
        while not self._left:
            # Taken before reading all that has arrived: a pause of this process is no silence.
            now = time.monotonic()
            self._listen(heartbeat_due - now)
            if self._failure:
                self._end_all(*self._failure)
            if now >= heartbeat_due:
                # Not at each message: processes would answer one another without a pause.
                heartbeat_due = now + interval
                for connection in self._connections.values():
                    connection.send({})
            for index, connection in self._connections.items():
                if index in self._ended:
                    continue  # A process that has left may be silent.
                if now - connection.last_message > self._timeout:
                    line = _lost(index, connection, f'is silent for {self._timeout:g} s')
                    if not parallel.is_primary():
                        # No answer of process 0 to wait for. Its end would have JAX abort this
                        # process first, where a firewall passes JAX's port alone.
                        _end(PEER_LOST, line)
                    self._end_all(PEER_LOST, line)

    def _listen(self, seconds: float) -> None:
        here = [c.socket for i, c in self._connections.items() if i not in self._ended]
        readable = _readable(here, seconds)
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
                    self._end_after(index, message)

    def _end_after(self, index: int, message: Mapping[str, Any]) -> NoReturn:
        if not parallel.is_primary():
            _end(message['status'], '')  # Process 0 has printed why.
        # Often all processes fail alike; then this process reports its own failure.
        time.sleep(1)
        line = f'{message["line"]} (process {index})' if message['line'] else ''
        self._end_all(*(self._failure or (message['status'], line)))

    def _end_all(self, status: int, line: str) -> NoReturn:
        """Prints the line on process 0, and ends this process after the others."""
        printed = parallel.is_primary()
        if printed:
            _print(line)
        for connection in self._connections.values():
            connection.send({'status': status, 'line': line})
        deadline = time.monotonic() + _GRACE
        for connection in self._connections.values():
            connection.socket.settimeout(max(deadline - time.monotonic(), 0.01))
            with contextlib.suppress(OSError, ValueError):
                while not any('status' in message for message in connection.receive()):
                    pass
                if not printed:
                    _end(status, '')
        _end(status, '' if printed else line)


def _lost(index: int, connection: _Connection, what: str) -> str:
    return f'stopped: process {index} on {connection.host} {what}; {_RESTART}'


_RESTART = 'start all processes again, and training continues from the last checkpoint'


def _print(line: str) -> None:
    if line:
        # Below the progress bar, where there is one.
        print(f'\n{line}' if sys.stderr.isatty() else line, file=sys.stderr, flush=True)


def _end(status: int, line: str) -> NoReturn:
    """Ends this process at once, because its main thread may wait for a dead process forever."""
    try:
        _print(line)
        sys.stdout.flush()
    finally:
        os._exit(status)
