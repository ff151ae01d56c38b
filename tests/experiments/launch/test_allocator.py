import ctypes
import subprocess
import sys

import pytest

from experiments.launch import allocator
from nfnets_jax.errors import UsageError

# Prints the page faults of using 64 MB again and again.
PROGRAM = """
import resource, sys
import numpy as np
from experiments.launch import allocator

if sys.argv[1] == 'keep':
    allocator.keep_memory()
np.ones(8_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    np.ones(8_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(argument):
    command = [sys.executable, '-c', PROGRAM, argument]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), 'mallopt'), reason='needs glibc')
def test_freed_memory_is_used_again_without_page_faults():
    assert faults('keep') < faults('give back') / 10


def test_another_c_library_is_one_line(monkeypatch):
    monkeypatch.setattr(ctypes, 'CDLL', lambda name: object())
    with pytest.raises(UsageError, match='--keep_memory: needs Linux with glibc'):
        allocator.keep_memory()
