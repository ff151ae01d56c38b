"""Reads and writes files of arrays. The format is detected from the content, not the suffix."""

import io
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from nfnets_jax import extras, files
from nfnets_jax.errors import UsageError, first_line
from nfnets_jax.weights import safe_pickle

with extras.optional():
    import safetensors
    import safetensors.numpy


class Contents(NamedTuple):
    """Named arrays and the metadata of a file."""

    arrays: dict[str, np.ndarray]  # 'module/name' for Haiku's trees, PyTorch's own names
    metadata: dict[str, str]  # of .safetensors; else empty


def read(path: str | os.PathLike) -> Contents:
    """Reads .safetensors, .npz, a pickle of {module: {name: array}} or PyTorch's .pth.

    Nothing in the file is executed, see `safe_pickle`; PyTorch is not needed.

    Raises:
      UsageError: the file does not exist, is damaged, or holds anything but arrays.
    """
    path = pathlib.Path(path)
    try:
        with open(path, 'rb') as file:
            head = file.read(64)
            file.seek(0)
            # Test this first: a .safetensors starts with a length, whose first byte may be 0x80,
            # the first byte of a pickle.
            if head[8:9] == b'{':
                return _read_safetensors(path)
            if head[:4] == b'PK\x03\x04':
                return Contents(_read_zip(file), {})
            if head[:1] == b'\x80':
                if safe_pickle.is_legacy_torch(head):
                    return Contents(_flatten(_state_dict(safe_pickle.load_legacy_torch(file))), {})
                return Contents(_flatten(safe_pickle.load_arrays(file)), {})
        raise safe_pickle.RefusedError('neither .safetensors, .npz, .pth nor a pickle of arrays')
    except OSError as error:
        raise UsageError(f'{path}: {error.strerror or error}') from error
    except safe_pickle.RefusedError as error:
        raise UsageError(f'{path} cannot be read: {error}') from error


def read_header(path: str | os.PathLike) -> dict[str, str]:
    """Returns the metadata of a .safetensors file without reading its arrays; {} for other files.

    Raises:
      UsageError: the file does not exist or is a damaged .safetensors.
    """
    path = pathlib.Path(path)
    try:
        with open(path, 'rb') as file:
            if file.read(9)[8:] != b'{':
                return {}
        with safetensors.safe_open(path, framework='numpy') as opened:
            return opened.metadata() or {}
    except OSError as error:
        raise UsageError(f'{path}: {error.strerror or error}') from error
    except (safetensors.SafetensorError, TypeError, ValueError) as error:
        raise UsageError(
            f'{path} cannot be read: damaged .safetensors ({first_line(error)})'
        ) from error


def write_safetensors(
    path: str | os.PathLike, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a .safetensors file atomically.

    Raises:
      UsageError: the file cannot be written.
    """
    contiguous = {name: np.ascontiguousarray(x).reshape(np.shape(x)) for name, x in arrays.items()}
    files.atomic_write(path, safetensors.numpy.save(contiguous, dict(metadata)))


def _read_safetensors(path: pathlib.Path) -> Contents:
    try:
        with safetensors.safe_open(path, framework='numpy') as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Contents(arrays, file.metadata() or {})
    except (safetensors.SafetensorError, TypeError, ValueError) as error:
        raise safe_pickle.RefusedError(f'damaged .safetensors ({first_line(error)})') from error


def _read_zip(file: BinaryIO) -> dict[str, np.ndarray]:
    """Reads .npz or .pth, both zip archives."""
    try:
        with zipfile.ZipFile(file) as archive:
            pickled = [name for name in archive.namelist() if name.endswith('/data.pkl')]
            if pickled:
                tree = _read_torch(archive, pickled[0].removesuffix('data.pkl'))
                return _flatten(_state_dict(tree))
        file.seek(0)
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive}
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):
                raise safe_pickle.RefusedError(f'it holds {name!r}, which is no array')
        return arrays
    except safe_pickle.RefusedError:
        raise
    except Exception as error:  # Damaged archives raise nearly anything.
        reason = first_line(error)
        if 'allow_pickle' in reason:
            reason = 'it holds pickled objects, which are not run'
        raise safe_pickle.RefusedError(f'damaged archive ({reason})') from error


def _read_torch(archive: zipfile.ZipFile, folder: str) -> Any:
    names = set(archive.namelist())
    byteorder = f'{folder}byteorder'
    if byteorder in names and archive.read(byteorder) != b'little':
        raise safe_pickle.RefusedError('it was written on a big-endian machine')

    def read_storage(key: str, dtype: np.dtype, size: int) -> np.ndarray:
        name = f'{folder}data/{key}'
        if name not in names or archive.getinfo(name).file_size < size * dtype.itemsize:
            raise safe_pickle.RefusedError(f'its storage {key!r} is not whole')
        return np.frombuffer(archive.read(name), dtype)

    return safe_pickle.load_torch(io.BytesIO(archive.read(f'{folder}data.pkl')), read_storage)


def _state_dict(tree: Any) -> Any:
    """Returns the state dict in the file of a training script, which also holds the epoch etc."""
    return tree.get('state_dict', tree) if isinstance(tree, dict) else tree


def _flatten(tree: Any, prefix: str = '', seen: set[int] | None = None) -> dict[str, np.ndarray]:
    """Returns {'module/name': array} for {'module': {'name': array}}; refuses all other leaves."""
    if not isinstance(tree, dict):
        raise safe_pickle.RefusedError(f'it holds a {type(tree).__name__}, not a dict of arrays')
    seen = set() if seen is None else seen
    if id(tree) in seen:  # A few nested shared dicts could expand beyond the memory.
        raise safe_pickle.RefusedError('it holds one dict in two places')
    seen.add(id(tree))
    flat = {}
    for key, value in tree.items():
        if isinstance(value, np.ndarray):
            flat[f'{prefix}{key}'] = value
        elif isinstance(value, dict):
            flat |= _flatten(value, f'{prefix}{key}/', seen)
        else:
            raise safe_pickle.RefusedError(
                f'{prefix}{key} is a {type(value).__name__}, not an array'
            )
    return flat
