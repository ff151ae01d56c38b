"""Starts Python programs at once: as forks of a server that has done their imports.

A command imports JAX, Grain and Orbax for two seconds of processor time and often works for
milliseconds, and tests start hundreds of them. The forked program has its own arguments, directory,
environment, streams and status, and the test is its parent, so signals and waiting are as with
`subprocess`. JAX has no threads before its first use, so the fork is as good as a new process.
Where a program ends by itself, its exit handlers run and its streams are flushed, but its modules
are not taken down: that would take 0.2 seconds, and the program is 0.02.
It finds the packages of this repository whatever PYTHONPATH says; tests of that use `subprocess`.
"""

import atexit
import gc
import inspect
import json
import os
import pathlib
import re
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import NoReturn

ROOT = pathlib.Path(__file__).parent.parent
IMPORTS = (
    'experiments.evaluate',
    'experiments.study.command',
    'experiments.train',
    'grain.python',
    'matplotlib.pyplot',
    'optuna',
    'orbax.checkpoint',
    'sklearn.datasets',
    'tensorboard.summary',
)
# Python and the imported modules read these when they start.
READ_AT_START = re.compile(r'JAX_|PYTHON(?!PATH)|LC_|LANG|MALLOC_')

_server: tuple[socket.socket, subprocess.Popen] | None = None


def start(arguments: Sequence, **options) -> subprocess.Popen:
    """Returns `subprocess.Popen` of Python with these arguments: '-m' and a module, or a file.

    Its streams are text unless `options` say otherwise.
    """
    arguments = [sys.executable, *map(str, arguments)]
    return _Popen(arguments, **{'text': True, **options})


def run(arguments: Sequence, *, timeout: float | None = None, **options):
    """Returns `subprocess.CompletedProcess` of a program that `start` started, with its output."""
    streams = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
    with start(arguments, **{**streams, **options}) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def server_process() -> int | None:
    """Returns the process ID of the server, which lives as long as the tests do."""
    return _server[1].pid if _server else None


class _Popen(subprocess.Popen):
    """A process that the server forks, or a new one where a fork would differ from it."""

    def _execute_child(self, *given):
        method = super()._execute_child
        values = inspect.signature(method).bind(*given).arguments
        special = ('executable', 'preexec_fn', 'pass_fds', 'shell', 'start_new_session')
        environment = dict(os.environ if values['env'] is None else values['env'])
        if (
            sys.platform != 'linux'
            or any(values[name] for name in special)
            or values['args'][1] not in ('-m', '-c')
            and values['args'][1].startswith('-')
            or _at_start(environment) != _ENVIRONMENT
        ):
            method(*given)
            return
        streams = [values[name] for name in ('p2cread', 'c2pwrite', 'errwrite')]
        program = {
            'arguments': values['args'][1:],
            'cwd': os.fspath(values['cwd'] or os.getcwd()),
            'environment': {os.fsdecode(k): os.fsdecode(v) for k, v in environment.items()},
        }
        self.pid = _fork(program, [i if fd == -1 else fd for i, fd in enumerate(streams)])
        self._child_created = True
        pipes = ('p2cread', 'p2cwrite', 'c2pread', 'c2pwrite', 'errread', 'errwrite')
        self._close_pipe_fds(*(values[name] for name in pipes))


def _at_start(environment: Mapping) -> dict:
    return {k: v for k, v in environment.items() if READ_AT_START.match(os.fsdecode(k))}


_ENVIRONMENT = _at_start(os.environ)


def _fork(program: Mapping, streams: Sequence[int]) -> int:
    """Has the server start a program; returns its process ID."""
    global _server
    if _server is None:
        ours, theirs = socket.socketpair()
        _server = (
            ours,
            subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, 'PYTHONPATH': str(ROOT)},
            ),
        )
        theirs.close()
        atexit.register(_stop, *_server)
    connection = _server[0]
    data = json.dumps(program).encode()
    socket.send_fds(connection, [len(data).to_bytes(8, 'big')], streams)
    connection.sendall(data)
    answer = connection.recv(8, socket.MSG_WAITALL)
    if not answer:
        raise RuntimeError('the server of programs has ended; its standard error says why')
    return int.from_bytes(answer, 'big')


def _stop(connection: socket.socket, server: subprocess.Popen) -> None:
    connection.close()
    server.wait()


# ------------------------------------------------------------------------------------- the server


def _serve(connection: socket.socket) -> None:
    """Forks programs until the tests end."""
    for name in IMPORTS:
        __import__(name)
    gc.freeze()
    while True:
        size, streams, _, _ = socket.recv_fds(connection, 8, 3)
        if not size:
            return
        program = json.loads(connection.recv(int.from_bytes(size, 'big'), socket.MSG_WAITALL))
        # The child ends, so that its own child becomes one of the tests, which adopt orphans.
        readable, writable = os.pipe()
        child = os.fork()
        if not child:
            grandchild = os.fork()
            if not grandchild:
                connection.close()
                os.close(readable)
                os.close(writable)
                _become(program, streams)
            os.write(writable, grandchild.to_bytes(8, 'big'))
            os._exit(0)
        for stream in (*streams, writable):
            os.close(stream)
        os.waitpid(child, 0)
        connection.sendall(os.read(readable, 8))
        os.close(readable)


def _become(program: Mapping, streams: Sequence[int]) -> None:
    """Runs the program in this process, as Python itself would."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, buffering, errors=errors, closefd=False)  # noqa: SIM115
        for number, mode, errors, buffering in (
            (0, 'r', 'strict', -1),
            (1, 'w', 'strict', 1 if os.isatty(1) else -1),
            (2, 'w', 'backslashreplace', 1),
        )
    )
    os.chdir(program['cwd'])
    os.environ.clear()
    os.environ.update(program['environment'])
    try:
        _run(*program['arguments'], cwd=program['cwd'])
    except SystemExit as ending:
        if not isinstance(ending.code, int | None):
            raise
        _end(ending.code or 0)
    _end(0)


def _run(first: str, *rest: str, cwd: str) -> None:
    sys.path[0] = cwd if first in ('-m', '-c') else os.path.dirname(os.path.abspath(first))
    match first:
        case '-m':
            if not hasattr(sys.modules.get(rest[0]), '__path__'):
                sys.modules.pop(rest[0], None)  # It is not a package, and runs anew.
            sys.argv = list(rest)
            runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
        case '-c':
            sys.argv = ['-c', *rest[1:]]
            exec(compile(rest[0], '<string>', 'exec'), {'__name__': '__main__'})
        case _:
            sys.argv = [first, *rest]
            runpy.run_path(first, run_name='__main__')


def _end(status: int) -> NoReturn:
    """Ends this process as Python does, but for its memory."""
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if not (stream is None or stream.closed):
                stream.flush()
    except Exception:
        sys.exit(status)  # Python says what it says of such a stream.
    os._exit(status & 0xFF)


if __name__ == '__main__':
    _serve(socket.socket(fileno=int(sys.argv[1])))
