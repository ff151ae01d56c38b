"""correct.npz: which images of each split a trial classifies correctly, a bit for each.

The arrays of a split, 'test' or 'test_ema' for the moving average, are

    test          uint8 [ceil(N / 8)], packed as by np.packbits
    test_count    int64 [], N
    test_images   str [], the checksum of the split's images: equal for trials that saw the same
"""

import io
import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from nfnets_jax import files

PER_IMAGE_FILE = 'correct.npz'


class Correct(NamedTuple):
    """Whether each image of a split is classified correctly, in the order of the split."""

    is_correct: np.ndarray  # bool [N]
    images: str  # checksum of the images


def pack(correct: Mapping[str, Correct]) -> dict[str, np.ndarray]:
    """Returns the arrays of some splits."""
    arrays = {}
    for split, (is_correct, images) in correct.items():
        arrays[split] = np.packbits(is_correct)
        arrays[f'{split}_count'] = np.array(len(is_correct))
        arrays[f'{split}_images'] = np.array(images)
    return arrays


def unpack(arrays: Mapping[str, np.ndarray]) -> dict[str, Correct]:
    """Returns the splits that `pack` packed."""
    splits = [name.removesuffix('_count') for name in arrays if name.endswith('_count')]
    return {
        split: Correct(
            np.unpackbits(arrays[split], count=int(arrays[f'{split}_count'])).astype(bool),
            str(arrays[f'{split}_images']),
        )
        for split in splits
    }


def to_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Returns an .npz file with arrays, compressed."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # NumPy names an option there
    return buffer.getvalue()


def write(directory: str | os.PathLike, correct: Mapping[str, Correct]) -> None:
    """Writes the splits of a trial into its directory."""
    files.atomic_write(pathlib.Path(directory) / PER_IMAGE_FILE, to_bytes(pack(correct)))


def read(directory: str | os.PathLike) -> dict[str, Correct]:
    """Returns the splits of a trial, {} if there are none, as in studies of earlier versions."""
    path = pathlib.Path(directory) / PER_IMAGE_FILE
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as arrays:
        return unpack(dict(arrays))
