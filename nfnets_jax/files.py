"""Files that are there whole or not at all, whatever happens while they are written."""

import contextlib
import os
import pathlib

from nfnets_jax.errors import UsageError


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
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())  # Else, after a power failure, the new name may hold nothing.
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise UsageError(f'{path} cannot be written: {error.strerror or error}') from error
