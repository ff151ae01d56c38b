"""Every container is told by its content, and a damaged one ends in one line that names it."""

import collections
import io
import pickle
import sys
import types
import zipfile

import chex
import numpy as np
import pytest

from nfnets_jax.errors import UsageError
from nfnets_jax.weights import weight_files

ARRAYS = {
    'stem.weight': np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    'stem.gain': np.float64([0.5, 2]),
    'half': np.float16([[1, 2], [3, 4]]),
    'count': np.array(7),
    'empty': np.zeros((0, 3), np.float32),
}


class Tensor:
    """Pickles as a PyTorch tensor does; every second one begins one element into its storage."""

    def __init__(self, key: str, array: np.ndarray):
        self.key, self.array, self.offset = key, np.asarray(array), int(key) % 2
        unused = np.zeros(self.offset, self.array.dtype)
        self.storage = np.concatenate([unused, self.array.ravel()])

    def __reduce__(self):
        strides = tuple(n // self.array.itemsize for n in self.array.strides)
        arguments = (self, self.offset, self.array.shape, strides, False, {})
        return sys.modules['torch._utils']._rebuild_tensor_v2, arguments


STORAGES = {'f4': 'FloatStorage', 'f8': 'DoubleStorage', 'f2': 'HalfStorage', 'i8': 'LongStorage'}


@pytest.fixture
def torch(monkeypatch):
    """A module of that name with the names a .pth file mentions, so that pickle writes them."""
    module, utils = types.ModuleType('torch'), types.ModuleType('torch._utils')
    for name in STORAGES.values():
        setattr(module, name, type(name, (), {'__module__': 'torch', '__qualname__': name}))

    def _rebuild_tensor_v2(*_):
        raise AssertionError('it was called')

    _rebuild_tensor_v2.__module__ = 'torch._utils'
    _rebuild_tensor_v2.__qualname__ = '_rebuild_tensor_v2'
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    monkeypatch.setitem(sys.modules, 'torch', module)
    monkeypatch.setitem(sys.modules, 'torch._utils', utils)
    return module


def dump(torch, tree, *legacy) -> bytes:
    class Pickler(pickle.Pickler):
        busy = False

        def persistent_id(self, value):
            # The tensor itself is reduced; the first argument of that is its storage.
            if not isinstance(value, Tensor):
                return None
            self.busy = not self.busy
            if self.busy:
                return None
            dtype = value.array.dtype.str[1:]
            size = value.storage.size
            return 'storage', getattr(torch, STORAGES[dtype]), value.key, 'cpu', size, *legacy

    file = io.BytesIO()
    Pickler(file, protocol=2).dump(tree)
    return file.getvalue()


def save_pth(torch, path, arrays, wrap=lambda tensors: tensors):
    """Writes the zip archive of PyTorch since 1.6."""
    tensors = {name: Tensor(str(i), array) for i, (name, array) in enumerate(arrays.items())}
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', dump(torch, wrap(tensors)))
        archive.writestr('archive/byteorder', 'little')
        for tensor in tensors.values():
            archive.writestr(f'archive/data/{tensor.key}', tensor.storage.tobytes())
        archive.writestr('archive/version', '3\n')


def state_dict(tensors):
    """What `model.state_dict()` returns: with an attribute besides its items."""
    tensors = collections.OrderedDict(tensors)
    tensors._metadata = collections.OrderedDict({'': {'version': 1}})
    return tensors


MACHINE = {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {'long': 4}}


def save_legacy_pth(torch, path, arrays, machine=MACHINE):
    """Writes the stream of pickles of PyTorch before 1.6."""
    tensors = {name: Tensor(str(i), array) for i, (name, array) in enumerate(arrays.items())}
    with open(path, 'wb') as file:
        for head in (0x1950A86A20F9469CFC6C, 1001, machine):
            pickle.dump(head, file, protocol=2)
        file.write(dump(torch, tensors, None))
        pickle.dump([tensor.key for tensor in tensors.values()], file, protocol=2)
        for tensor in tensors.values():
            file.write(tensor.storage.size.to_bytes(8, 'little') + tensor.storage.tobytes())


@pytest.fixture(params=['safetensors', 'npz', 'pth', 'legacy.pth', 'wrapped.pth', 'pickle'])
def file(request, tmp_path, torch):
    path = tmp_path / 'weights'  # no suffix, which would not matter
    match request.param:
        case 'safetensors':
            weight_files.write_safetensors(path, ARRAYS, {'model': 'NFNet-F0'})
        case 'npz':
            with open(path, 'wb') as file:
                np.savez(file, **ARRAYS)
        case 'pth':
            save_pth(torch, path, ARRAYS, state_dict)
        case 'legacy.pth':
            save_legacy_pth(torch, path, ARRAYS)
        case 'wrapped.pth':
            save_pth(torch, path, ARRAYS, lambda tensors: {'epoch': 3, 'state_dict': tensors})
        case 'pickle':
            path.write_bytes(pickle.dumps(ARRAYS))
    return path


def test_all_containers_give_the_same_arrays(file):
    arrays = weight_files.read(file).arrays
    chex.assert_trees_all_equal(arrays, ARRAYS)
    chex.assert_trees_all_equal_dtypes(arrays, ARRAYS)


def test_a_truncated_file_is_named_in_one_line(file):
    data = file.read_bytes()
    for end in (9, len(data) // 3, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:end])
        with pytest.raises(UsageError) as error:
            weight_files.read(file)
        assert str(file) in str(error.value)
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('machine', [MACHINE | {'little_endian': False}, {}, 7])
def test_a_legacy_file_of_another_machine_is_refused(machine, tmp_path, torch):
    save_legacy_pth(torch, tmp_path / 'weights', ARRAYS, machine)
    with pytest.raises(UsageError, match='weights .*big-endian machine'):
        weight_files.read(tmp_path / 'weights')


def test_an_archive_of_other_files_is_refused(tmp_path):
    np.savez(tmp_path / 'weights', **ARRAYS)
    with zipfile.ZipFile(tmp_path / 'weights.npz', 'a') as archive:
        archive.writestr('note.txt', 'of last week')
    with pytest.raises(UsageError, match=r"weights\.npz .*'note\.txt', which is no array"):
        weight_files.read(tmp_path / 'weights.npz')


def test_metadata_travel_with_safetensors(tmp_path):
    weight_files.write_safetensors(tmp_path / 'w', ARRAYS, {'model': 'NFNet-F0'})
    assert weight_files.read(tmp_path / 'w').metadata == {'model': 'NFNet-F0'}
    assert [path.name for path in tmp_path.iterdir()] == ['w']


def test_a_header_of_any_length_is_told_from_a_pickle(tmp_path):
    for length in range(0, 256, 8):  # One of these lengths begins with the byte of a pickle.
        path = tmp_path / f'{length}.safetensors'
        metadata = {'note': 'x' * length}
        weight_files.write_safetensors(path, {'a': np.zeros(2, np.float32)}, metadata)
        assert weight_files.read(path).metadata == metadata


def test_nested_dicts_are_joined_by_slashes(tmp_path):
    (tmp_path / 'w').write_bytes(pickle.dumps({'NFNet/~/conv': {'w': np.ones(2)}}))
    assert list(weight_files.read(tmp_path / 'w').arrays) == ['NFNet/~/conv/w']


@pytest.mark.parametrize(
    ('content', 'problem'),
    [
        (b'', 'neither'),
        (b'hello, this is no file of weights at all', 'neither'),
        (pickle.dumps([1, 2]), 'holds a list'),
        (pickle.dumps({'epoch': 3}), 'epoch is a int'),
        (pickle.dumps({'a': len}), 'builtins.len'),
        ((1 << 60).to_bytes(8, 'little') + b'{"a":', 'safetensors'),
    ],
)
def test_other_content_is_refused(content, problem, tmp_path):
    path = tmp_path / 'w'
    path.write_bytes(content)
    with pytest.raises(UsageError, match=problem):
        weight_files.read(path)


def test_shared_dicts_do_not_multiply(tmp_path):
    tree = {'a': np.zeros(1)}
    for _ in range(15):
        tree = {str(i): tree for i in range(10)}  # 10^15 arrays in 1 kB
    (tmp_path / 'w').write_bytes(pickle.dumps(tree))
    with pytest.raises(UsageError, match='one dict in two places'):
        weight_files.read(tmp_path / 'w')


def test_an_npz_of_objects_is_not_unpickled(tmp_path):
    with open(tmp_path / 'w', 'wb') as file:
        np.savez(file, a=np.array([{'x': 1}], object))
    with pytest.raises(UsageError, match='pickled objects'):
        weight_files.read(tmp_path / 'w')


def test_tensors_must_lie_within_their_storage(torch, tmp_path):
    path = tmp_path / 'w'
    tensor = Tensor('1', np.ones(1000, np.float32))  # begins at 1
    pickled = dump(torch, {'a': tensor})
    for shape in (b'M\xe8\x03', b'M\xe9\x03'):  # 1000, 1001
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr(
                'x/data.pkl', pickled.replace(b'K\x01M\xe8\x03\x85', b'K\x01' + shape + b'\x85')
            )
            archive.writestr('x/data/1', tensor.storage.tobytes())
        if shape == b'M\xe8\x03':
            assert weight_files.read(path).arrays['a'].shape == (1000,)
    with pytest.raises(UsageError, match='beyond the end'):
        weight_files.read(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r'nothing\.npz: No such file'):
        weight_files.read(tmp_path / 'nothing.npz')


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UsageError, match='cannot be written'):
        weight_files.write_safetensors(tmp_path / 'no' / 'w', ARRAYS, {})
