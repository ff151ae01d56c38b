"""Reads pickles of arrays without executing anything in them.

A pickle is a program: it may name any function of any installed package and call it. This module
resolves the few names that numpy and PyTorch use to describe arrays to its own descriptions, and
refuses every other name. It runs none of the unpickling code of numpy or PyTorch, and does not need
PyTorch.
"""

import io
import math
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

_PYTORCH_MAGIC = 0x1950A86A20F9469CFC6C  # what a .pth file of before PyTorch 1.6 begins with
_PLAIN = (str, bytes, bool, int, float, type(None))


class RefusedError(ValueError):
    """The pickle is not a plain description of arrays; the message says what it asked for."""


def load_arrays(file: BinaryIO) -> Any:
    """Reads a pickle of numpy arrays in dicts, lists and tuples, as `pickle.dump` wrote it.

    Returns:
      The same structure, its arrays writable copies in native byte order.

    Raises:
      RefusedError: the pickle names anything else or is damaged.
    """
    return _finish(_Unpickler(file).load_checked(), read=None)


def load_torch(pickled: BinaryIO, read: Callable[[str, np.dtype, int], np.ndarray]) -> Any:
    """Reads `data.pkl` of a .pth file: tensors in dicts, lists and tuples.

    Args:
      pickled: the pickle itself.
      read: (key, dtype, number of elements) -> the flat storage of that key.

    Returns:
      The same structure, its tensors numpy arrays (bfloat16 ones float32).

    Raises:
      RefusedError: the pickle names anything else or is damaged.
    """
    return _finish(_Unpickler(pickled).load_checked(), read)


def load_legacy_torch(file: BinaryIO) -> Any:
    """Reads a .pth file of before PyTorch 1.6, as the weights that timm released are: see
    `load_torch`. Five pickles (a magic number, a version, the machine's sizes, the object, the
    keys of its storages) and then the storages, each after its number of elements.
    """
    magic, _version, machine = (_Unpickler(file).load_checked() for _ in range(3))
    if magic != _PYTORCH_MAGIC:
        raise RefusedError('it is not a PyTorch file')
    if not (isinstance(machine, dict) and machine.get('little_endian') is True):
        raise RefusedError('it was written on a big-endian machine')
    unpickler = _Unpickler(file)
    described, keys = unpickler.load_checked(), _Unpickler(file).load_checked()
    storages = {}
    for key in keys if isinstance(keys, list) else []:
        dtype = unpickler.storages.get(key) if isinstance(key, str) else None
        if dtype is None:
            raise RefusedError(f'nothing says what its storage {key!r} holds')
        size = int.from_bytes(_read_exactly(file, 8), 'little')
        storages[key] = np.frombuffer(_read_exactly(file, size * dtype.itemsize), dtype)

    def read(key: str, dtype: np.dtype, size: int) -> np.ndarray:
        storage = storages.get(key)
        if storage is None or storage.dtype != dtype or len(storage) < size:
            raise RefusedError(f'its storage {key!r} is not whole')
        return storage

    return _finish(described, read)


def is_legacy_torch(head: bytes) -> bool:
    """Returns whether `load_legacy_torch` reads a file that begins with these 64 or more bytes."""
    return _PYTORCH_MAGIC.to_bytes(10, 'little') in head


class _Storage(NamedTuple):
    """Reference to the memory of a tensor, which is elsewhere in the file."""

    dtype: np.dtype
    bfloat16: bool
    key: str
    size: int


class _Tensor(NamedTuple):
    """A view of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


class _Array:
    """Placeholder for a numpy array or dtype while the pickle is read; `value` is the result."""

    __slots__ = ('value',)

    def __init__(self, value=None):
        self.value = value

    def __setstate__(self, state):
        if isinstance(self.value, np.dtype):  # (version, byte order, ...): nothing of substance
            self.value = self.value.newbyteorder(state[1]) if state[1] in '<>' else self.value
        else:
            _, shape, dtype, is_fortran, data = state
            self.value = _array(data, dtype, shape, 'F' if is_fortran else 'C')


class _Name:
    """Result of a name lookup in a pickle. It supports calls and nothing else."""

    __slots__ = ('_call', '_name')
    _call: Callable | None
    _name: str

    def __init__(self, name: str, call: Callable | None):
        object.__setattr__(self, '_name', name)
        object.__setattr__(self, '_call', call)

    def __setattr__(self, name, value):
        raise RefusedError(f'it changes {self._name}')

    def __call__(self, *args):
        if self._call is None:
            raise RefusedError(f'it calls {self._name}')
        return self._call(*args)


class _Unpickler(pickle.Unpickler):
    """Resolves the names in `_NAMES` and `_STORAGES`, and refuses all others."""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.storages: dict[str, np.dtype] = {}  # those that tensors refer to

    def load_checked(self) -> Any:
        try:
            return self.load()
        except RefusedError:
            raise
        except Exception as error:  # A damaged pickle raises nearly anything.
            reason = ' '.join(str(error).split()) or type(error).__name__
            raise RefusedError(f'its pickle is truncated or damaged ({reason})') from error

    def find_class(self, module: str, name: str) -> Any:
        full_name = f'{module}.{name}'
        if full_name not in _NAMES and full_name not in _STORAGES:
            raise RefusedError(f'its pickle asks for {full_name}, which is not run')
        return _Name(full_name, _NAMES.get(full_name))

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _location, size, *_ = pid
        dtype = _STORAGES.get(storage_type._name) if isinstance(storage_type, _Name) else None
        if kind != 'storage' or dtype is None:
            raise RefusedError(f'its pickle refers to {pid!r}')
        bfloat16 = storage_type._name == 'torch.BFloat16Storage'
        self.storages[str(key)] = np.dtype(dtype)
        return _Storage(np.dtype(dtype), bfloat16, str(key), int(size))


def _dtype(code: Any, *_) -> _Array:
    if not isinstance(code, str) or not re.fullmatch(r'[fiu][1248]|b1', code):
        raise RefusedError(f'it holds an array of {code!r}, not of numbers')
    return _Array(np.dtype(code))


def _array(
    data: Any, dtype: Any, shape: Any, order: Literal['C', 'F', 'K'], axes: Any = None
) -> np.ndarray:
    """Returns the array that a numpy pickle describes; `data` are the bytes of the elements.

    With the order 'K', of NumPy from 2.3 on, the shape is that in memory, and `axes` permutes it.
    """
    if not isinstance(data, bytes | bytearray) or not isinstance(dtype.value, np.dtype):
        raise RefusedError('it holds an array of objects, not of numbers')
    if not isinstance(shape, tuple) or any(not isinstance(n, int) or n < 0 for n in shape):
        raise RefusedError(f'it holds an array of shape {shape!r}')
    if len(data) != math.prod(shape) * dtype.value.itemsize:
        raise RefusedError(f'it holds an array of shape {shape} in {len(data)} bytes')
    array = np.frombuffer(data, dtype.value).reshape(shape, order='F' if order == 'F' else 'C')
    if order == 'K' and axes is not None:
        if not isinstance(axes, tuple) or sorted(axes) != list(range(len(shape))):
            raise RefusedError(f'it holds an array of shape {shape} with its axes in order {axes}')
        array = array.transpose(axes)
    return array.astype(dtype.value.newbyteorder('='), order='C')


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_) -> _Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or any(not isinstance(n, int) or n < 0 for n in numbers):
        raise RefusedError('it holds an invalid tensor')
    if len(shape) != len(strides):
        raise RefusedError(f'it holds a tensor of shape {shape} with strides {strides}')
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _OrderedDict(dict):
    """A state dict. It ignores the attribute with the versions of the modules."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


def _encode(text: Any, encoding: Any) -> bytes:
    """Returns the bytes that a pickle of protocol 2 or below encodes as text."""
    if not isinstance(text, str) or encoding != 'latin1':
        raise RefusedError('its pickle asks for _codecs.encode of something that is not bytes')
    return text.encode('latin1')


_NAMES: dict[str, Callable | None] = {
    'numpy.ndarray': None,
    'numpy.dtype': _dtype,
    '_codecs.encode': _encode,
    '__builtin__.bytes': lambda: b'',  # no bytes, in protocol 2
    'collections.OrderedDict': _OrderedDict,
    'torch._utils._rebuild_tensor': _tensor,  # in the oldest files
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_parameter': lambda tensor, *_: tensor,
}
for _core in ('numpy.core', 'numpy._core'):  # before and since numpy 2
    _NAMES |= {
        f'{_core}.multiarray._reconstruct': lambda *_: _Array(),
        f'{_core}.multiarray.scalar': lambda dtype, data: _Array(_array(data, dtype, (), 'C')),
        f'{_core}.numeric._frombuffer': lambda data, dtype, shape, order, axes=None: _Array(
            _array(data, dtype, shape, order, axes)
        ),
    }
_STORAGES: Mapping[str, str] = {
    'torch.DoubleStorage': '<f8',
    'torch.FloatStorage': '<f4',
    'torch.HalfStorage': '<f2',
    'torch.BFloat16Storage': '<u2',  # the upper half of a float32
    'torch.LongStorage': '<i8',
    'torch.IntStorage': '<i4',
    'torch.ShortStorage': '<i2',
    'torch.CharStorage': 'i1',
    'torch.ByteStorage': 'u1',
    'torch.BoolStorage': '?',
}


def _finish(described: Any, read: Callable | None) -> Any:
    """Replaces placeholders by arrays; refuses everything that is not data."""
    finished: dict[int, Any] = {}  # Shared objects are read once.

    def finish(x: Any, depth: int = 0) -> Any:
        if id(x) not in finished:
            finished[id(x)] = convert(x, depth)
        return finished[id(x)]

    def convert(x: Any, depth: int) -> Any:
        if depth > 20:
            raise RefusedError('it is nested more than 20 levels deep')
        if isinstance(x, dict):
            if any(not isinstance(key, str | int) for key in x):
                raise RefusedError('it holds a dict with keys that are not strings')
            return {key: finish(value, depth + 1) for key, value in x.items()}
        if isinstance(x, _Tensor):
            return _read_tensor(x, read)
        if isinstance(x, _Array) and isinstance(x.value, np.ndarray):
            return x.value
        if type(x) in (list, tuple):
            return type(x)(finish(value, depth + 1) for value in x)
        if isinstance(x, _PLAIN):
            return x
        raise RefusedError(f'it holds a {type(x).__name__.strip("_").lower()}, not an array')

    return finish(described)


def _read_tensor(tensor: _Tensor, read: Callable | None) -> np.ndarray:
    if read is None:
        raise RefusedError('it holds tensors of PyTorch, but no storage for them')
    storage, offset, shape, strides = tensor
    flat = read(storage.key, storage.dtype, storage.size)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if 0 not in shape and max(last + 1, math.prod(shape)) > len(flat):
        raise RefusedError(f'it holds a tensor of shape {shape} beyond the end of its storage')
    steps = [stride * flat.itemsize for stride in strides]
    view = np.lib.stride_tricks.as_strided(flat[offset:], shape, steps, writeable=False)
    if storage.bfloat16:
        return (view.astype(np.uint32) << 16).view(np.float32)
    return np.array(view, storage.dtype.newbyteorder('='), order='C')


def _read_exactly(file: BinaryIO, size: int) -> bytes:
    here = file.tell()
    left = file.seek(0, io.SEEK_END) - here
    file.seek(here)
    if size > left:
        raise RefusedError('it is truncated')
    return file.read(size)
