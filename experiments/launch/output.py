"""The standard output and error of a command: any text, closed readers and full disks.

All text of a command goes through `session`: print, a progress bar, a library's warning, a stack
trace.

* Any text can be written. File names may hold bytes that are not text, and a terminal may know only
  ASCII: such bytes are written unchanged, and characters that the terminal lacks as escapes.
* A reader that has closed the output (`| head -1`, a closed terminal) ends the command silently. A
  write that fails (a full disk) ends it with one line.
"""

import codecs
import contextlib
import errno
import io
import os
import select
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

READER_GONE = 141  # exit status: 128 + SIGPIPE, what a shell shows for `yes | head -1`
CANNOT_WRITE = 2

_ERRORS = 'bytes-or-escapes'

_exit_status: int | None = None  # set when output is lost
_on_loss: list[Callable[[], None]] = []


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Replaces sys.stdout and sys.stderr for the rest of the process.

    Raises:
      SystemExit: with code READER_GONE or CANNOT_WRITE, from the failed write, or at the end if
        `on_loss` has deferred it.
    """
    sys.stdout, sys.stderr = (
        open(os.devnull, 'w') if stream is None else open_stream(descriptor, template=stream)  # noqa: SIM115
        for descriptor, stream in ((1, sys.stdout), (2, sys.stderr))
    )
    try:
        yield
        _flush()
    except SystemExit as ending:
        _flush()
        raise SystemExit(_exit_status or ending.code) from None
    if _exit_status is not None:
        sys.exit(_exit_status)


@contextlib.contextmanager
def on_loss(action: Callable[[], None]) -> Iterator[None]:
    """Calls `action` when output is lost; the command ends after the block, not at the write.

    For a block that must end in its own way, for example by saving first.
    """
    _on_loss.append(action)
    try:
        yield
    finally:
        _on_loss.remove(action)


def open_stream(descriptor: int, *, template: TextIO) -> TextIO:
    """Returns a text stream on a file descriptor, with the encoding and buffering of another."""
    raw = _Descriptor(descriptor)
    write_through = template.write_through  # type: ignore[attr-defined]  # of a TextIOWrapper
    return io.TextIOWrapper(
        raw if write_through else io.BufferedWriter(raw),  # PYTHONUNBUFFERED: no buffer
        encoding=template.encoding,
        errors=_ERRORS,
        line_buffering=bool(template.line_buffering),
        write_through=write_through,
    )


class _Descriptor(io.FileIO):
    """A file descriptor that `session` writes to."""

    def __init__(self, descriptor: int):
        super().__init__(descriptor, 'wb', closefd=False)

    def write(self, data) -> int:
        rest = memoryview(data).cast('B')
        try:
            while rest:
                written = super().write(rest)
                if written is None:  # Another program has made the descriptor non-blocking.
                    select.select([], [self], [])
                else:
                    rest = rest[written:]
        except OSError as error:
            _lose(self.fileno(), error)
        return len(data)


def terminal_columns() -> int | None:
    """Returns the width of the terminal that shows standard output; None if that is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def fold(cells: Sequence[str], columns: int | None) -> str:
    """Returns a row of a table in one line, or in lines of so many columns, the later indented."""
    lines = [cells[0]]
    for cell in cells[1:]:
        if columns is None or len(lines[-1]) + 1 + len(cell) <= columns:
            lines[-1] += f' {cell}'
        else:
            lines.append(f'    {cell}')
    return '\n'.join(lines)


def _lose(descriptor: int, error: OSError) -> None:
    """Ends the command, now or later, because one of its streams cannot be written."""
    global _exit_status
    # Buffers and writes of libraries go nowhere from now on.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
    if error.errno in (errno.EPIPE, errno.EIO):  # EIO: a closed terminal
        _exit_status = _exit_status or READER_GONE
    else:
        _exit_status = _exit_status or CANNOT_WRITE
        if descriptor != 2:  # Else there is nowhere to print it.
            print(f'error: the output cannot be written: {error.strerror}', file=sys.stderr)
    for action in _on_loss:
        action()
    if not _on_loss:
        sys.exit(_exit_status)


def _flush() -> None:
    with contextlib.suppress(SystemExit):  # _exit_status holds its code.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()


def _encode(error: UnicodeError) -> tuple[bytes, int]:
    """Encodes text that an encoding lacks: bytes of file names unchanged, characters as escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    encoded = b''.join(
        bytes([ord(character) - 0xDC00])
        if '\udc80' <= character <= '\udcff'
        else character.encode('ascii', 'backslashreplace')
        for character in error.object[error.start : error.end]
    )
    return encoded, error.end


codecs.register_error(_ERRORS, _encode)
