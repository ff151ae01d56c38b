"""Expands paths from users, makes directories and writes files atomically."""

import contextlib
import errno
import os
import pathlib
import zipfile
import zlib

from nfnets_jax.errors import UsageError

# What reading an .npz file may raise, besides OSError, ValueError, KeyError and TypeError.
DAMAGED_ARCHIVE = (EOFError, zipfile.BadZipFile, zlib.error)


def expand(path: str | os.PathLike) -> str:
    """Returns the path with a leading ~ or ~user replaced by the home directory, as in a shell.

    A shell does not expand the ~ of --workdir=~/run, and nothing expands one in a config.

    Raises:
      UsageError: the user does not exist.
    """
    path = os.fspath(path)
    expanded = os.path.expanduser(path)
    if expanded[:1] == '~' and not os.path.exists(expanded):
        user = path[1:].partition(os.sep)[0]
        raise UsageError(
            f'{path}: there is no user {user!r}; a name that begins with ~ is ./{path}'
        )
    return expanded


def make_directory(path: str | os.PathLike) -> pathlib.Path:
    """Makes a directory to write into, unless it exists; returns its path.

    Raises:
      UsageError: there is a file, or the directory cannot be made or written.
    """
    path = pathlib.Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except FileExistsError as error:
        raise UsageError(f'{path} is a file: give a directory') from error
    except OSError as error:
        raise UsageError(f'{path} cannot be written: {error.strerror or error}') from error
    return path


def atomic_write(path: str | os.PathLike, data: bytes | str) -> None:
    """Writes a file atomically: to a temporary file beside it, which is synced, then renamed.

    Args:
      path: of the file; an existing file is replaced.
      data: new content; text is encoded as UTF-8.

    Raises:
      UsageError: the file cannot be written. An existing file is unchanged.
    """
    path = pathlib.Path(path)
    if not path.name:
        raise UsageError(f'{path} cannot be written: it is a directory')
    beside = path.with_name(path.name + '.tmp')
    try:
        with open(beside, 'wb') as file:
            file.write(_utf8(data) if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())  # Else the renamed file may be empty after a power failure.
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise UsageError(f'{path} cannot be written: {error.strerror or error}') from error


def _utf8(text: str) -> bytes:
    """Encodes text; undecodable bytes of file names become escapes."""
    return text.encode(errors='backslashreplace')
