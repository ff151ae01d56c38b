"""The standard output and error of a command: what can be written there, and who still reads it.

All text of a command goes through `session`, whoever writes it: print, a progress bar, a library's
warning, a stack trace.

* Any text can be written. File names may hold bytes that are no text, and a terminal may know ASCII
  only: such bytes are written as they are, and characters that the terminal lacks as escapes.
* Output that nobody reads any more (`| head -1`, a terminal that was closed) ends the command
  without a word. Output that cannot be written (a full disk) ends it with one line.
"""

import codecs
import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

READER_GONE = 141  # exit status: 128 + SIGPIPE, what a shell shows for `yes | head -1`
CANNOT_WRITE = 2

_ERRORS = 'bytes-or-escapes'

_exit_status: int | None = None  # once output was lost
_on_loss: list[Callable[[], None]] = []


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Replaces sys.stdout and sys.stderr for the rest of the process.

    Raises:
      SystemExit: with READER_GONE or CANNOT_WRITE as its code, from the write that failed, or at
        the end where `on_loss` put it off.
    """
    sys.stdout, sys.stderr = (
        open(os.devnull, 'w') if stream is None else open_stream(descriptor, like=stream)  # noqa: SIM115
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
    """Calls `action` when output is lost; the command does not end before the block does.

    For a block that must end in its own way, such as by saving first.
    """
    _on_loss.append(action)
    try:
        yield
    finally:
        _on_loss.remove(action)


def open_stream(descriptor: int, *, like: TextIO) -> TextIO:
    """Returns a text stream on a file descriptor, with the encoding and buffering of another."""
    raw = _Descriptor(descriptor)
    write_through = like.write_through  # type: ignore[attr-defined]  # of a TextIOWrapper
    return io.TextIOWrapper(
        raw if write_through else io.BufferedWriter(raw),  # With PYTHONUNBUFFERED no buffer.
        encoding=like.encoding,
        errors=_ERRORS,
        line_buffering=bool(like.line_buffering),
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
                if written is None:  # It does not block: somebody who shares it has set so.
                    select.select([], [self], [])
                else:
                    rest = rest[written:]
        except OSError as error:
            _lose(self.fileno(), error)
        return len(data)


def _lose(descriptor: int, error: OSError) -> None:
    """Ends the command, now or later, as one of its streams cannot be written."""
    global _exit_status
    # What is still in buffers, and what libraries write there, goes nowhere from now on.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
    if error.errno in (errno.EPIPE, errno.EIO):  # EIO: of a terminal that was closed.
        _exit_status = _exit_status or READER_GONE
    else:
        _exit_status = _exit_status or CANNOT_WRITE
        if descriptor != 2:  # Else there is nowhere to say it.
            print(f'error: the output cannot be written: {error.strerror}', file=sys.stderr)
    for action in _on_loss:
        action()
    if not _on_loss:
        sys.exit(_exit_status)


def _flush() -> None:
    with contextlib.suppress(SystemExit):  # _exit_status has it.
        for stream in (sys.stdout, sys.stderr):
            stream.flush()


def _encode(error: UnicodeError) -> tuple[bytes, int]:
    """Encodes what an encoding lacks: a byte of a file name as it is, a character as an escape."""
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
