"""Pickles are read for their arrays, and whatever else they ask for is refused and named."""

import collections
import contextlib
import io
import os
import pickle
import pickletools
import struct

import chex
import numpy as np
import pytest

from nfnets_jax.weights import safe_pickle

TREE = {
    'NFNet/~/conv': {
        'w': np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        'fortran': np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        'transposed': np.arange(24.0).reshape(2, 3, 4).transpose(1, 2, 0),
        'swapped': np.arange(3, dtype='>i4'),
        'flags': np.array([True, False]),
        'empty': np.zeros((0, 2), np.float16),
    },
    'NFNet/~/block': {'skip_gain': np.float32(0.5), 'scalar': np.array(7)},
}


def read(data: bytes):
    return safe_pickle.load_arrays(io.BytesIO(data))


@pytest.mark.parametrize('protocol', range(2, 6))
def test_arrays_come_back_as_they_were(protocol):
    tree = read(pickle.dumps(TREE, protocol=protocol))
    chex.assert_trees_all_equal(tree, TREE)
    for array in tree['NFNet/~/conv'].values():
        assert array.dtype.isnative
        assert array.flags.writeable


def test_the_names_of_numpy_1_are_known_too():
    old = pickle.dumps(TREE, protocol=2).replace(b'numpy._core', b'numpy.core')
    assert b'numpy.core.multiarray' in old
    chex.assert_trees_all_equal(read(old), TREE)


class Calls:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ('function', 'arguments', 'named'),
    [
        (os.system, ('touch executed',), 'system'),
        (eval, ('open("executed", "w")',), 'builtins.eval'),
        (open, ('executed', 'w'), 'open'),
        (os.mkdir, ('executed',), 'mkdir'),
        (getattr, ({}, 'clear'), 'builtins.getattr'),
        (np.save, ('executed', 1), 'numpy.save'),
        (collections.deque, (), 'collections.deque'),
    ],
)
def test_what_it_asks_for_is_named_and_not_run(function, arguments, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for hostile in (Calls(function, *arguments), {'a': [1, {'b': Calls(function, *arguments)}]}):
        with pytest.raises(safe_pickle.RefusedError, match=named):
            read(pickle.dumps(hostile))
    assert not list(tmp_path.iterdir())


def opcodes(*parts: bytes) -> bytes:
    return b'\x80\x04' + b''.join(parts) + b'.'


def string(text: str) -> bytes:
    return b'\x8c' + bytes([len(text)]) + text.encode()


def name(module: str, attribute: str) -> bytes:
    return string(module) + string(attribute) + b'\x93'


@pytest.mark.parametrize(
    'data',
    [
        opcodes(name('numpy', 'ndarray'), b')R'),  # calls what is only a name
        opcodes(name('numpy', 'dtype'), string('O'), b'\x85R'),  # objects
        opcodes(name('numpy', 'dtype'), b'N}', string('_call'), b'K\x01s\x86b'),  # changes us
        opcodes(name('numpy._core.multiarray', '_reconstruct')),  # a function for an array
        opcodes(name('numpy._core.multiarray', '_reconstruct'), b')R'),  # an array without data
        opcodes(name('numpy', 'dtype.__init__')),  # attributes of what is allowed
        opcodes(name('_codecs', 'encode'), string('x'), string('rot13'), b'\x86R'),
        opcodes(string('key'), b'Q'),  # a storage where there are none
        opcodes(b'}', b')N', b's'),  # a dict with a tuple for a key
        opcodes(b']', b'\x94h\x00a'),  # a list within itself
        b'',
        b'\x80\x04}',
        b'\x80\x04\x8e' + struct.pack('<Q', 1 << 60),  # a string longer than any memory
    ],
)
def test_pickles_written_by_hand_are_refused(data):
    with pytest.raises(safe_pickle.RefusedError):
        read(data)


class ArrayOf:
    """Pickles as a numpy array with this state."""

    def __init__(self, shape, data):
        self.state = (1, shape, np.dtype(np.int32), False, data)

    def __reduce__(self):
        function, arguments = np.zeros(1).__reduce__()[:2]
        return function, arguments, self.state


def test_an_array_is_a_shape_and_bytes():
    np.testing.assert_array_equal(read(pickle.dumps(ArrayOf((2,), bytes(8)))), [0, 0])
    for shape, data in [((2,), 'textual!'), ((2,), [0] * 8), ([2], bytes(8)), ((-2, -1), bytes(8))]:
        with pytest.raises(safe_pickle.RefusedError, match='it holds an array of'):
            read(pickle.dumps(ArrayOf(shape, data)))


def test_a_pickle_cut_anywhere_is_refused():
    data = pickle.dumps(TREE, protocol=4)
    for end in range(0, len(data) - 1, 37):
        with pytest.raises(safe_pickle.RefusedError):
            read(data[:end])


def test_a_flipped_bit_never_does_anything_but_fail_or_change_numbers():
    data = bytearray(pickle.dumps(TREE, protocol=4))
    for position in range(0, len(data), 11):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with contextlib.suppress(safe_pickle.RefusedError):
            read(bytes(damaged))


def test_an_array_must_hold_what_its_shape_says():
    data = pickle.dumps({'a': np.zeros((3, 5), np.float32)}, protocol=4)
    ops = [(op.name, argument) for op, argument, _ in pickletools.genops(data)]
    assert ('BININT1', 3) in ops
    longer = data.replace(b'K\x03K\x05', b'K\x04K\x05')
    assert longer != data
    with pytest.raises(safe_pickle.RefusedError, match='60 bytes'):
        read(longer)


def test_shared_parts_do_not_multiply():
    tree = np.zeros(1000)
    for _ in range(15):
        tree = [tree] * 15  # 15^15 arrays, were each of them read
    result = read(pickle.dumps(tree))
    assert len(result) == 15
