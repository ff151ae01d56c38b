"""Paths as users write them, and files that are there whole or not at all."""

import contextlib
import os
import pathlib

from nfnets_jax.errors import UsageError


def expand(path: str | os.PathLike) -> str:
    """Returns a path as a shell would have: with the home directory for a leading ~ or ~user.

    A shell leaves the ~ of --workdir=~/run alone, as does a config.

    Raises:
      UsageError: there is no such user.
    """
    path = os.fspath(path)
    expanded = os.path.expanduser(path)
    if expanded[:1] == '~' and not os.path.exists(expanded):
        user = path[1:].partition(os.sep)[0]
        raise UsageError(
            f'{path}: there is no user {user!r}; a name that begins with ~ is ./{path}'
        )
    return expanded


def write_whole(path: str | os.PathLike, data: bytes | str) -> None:
    """Writes a file beside its place and moves it there once it is on disk.

    Args:
      path: replaced if it is there.
      data: what it is to hold; text as UTF-8.

    Raises:
      UsageError: it cannot be written; what was there before still is.
    """
    path = pathlib.Path(path)
    beside = path.with_name(path.name + '.tmp')
    try:
        with open(beside, 'wb') as file:
            file.write(_utf8(data) if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())  # Else, after a power failure, the new name may hold nothing.
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise UsageError(f'{path} cannot be written: {error.strerror or error}') from error


def _utf8(text: str) -> bytes:
    """Encodes text; bytes of a file name that are no text become escapes."""
    return text.encode(errors='backslashreplace')
