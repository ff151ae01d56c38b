"""Settings of the allocator of the C library, for training on a CPU."""

import ctypes

from absl import flags

from nfnets_jax.errors import UsageError

# Numbers of malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_LARGEST = 2**31 - 1


def define_flag() -> None:
    """Defines --keep_memory."""
    flags.DEFINE_bool('keep_memory', False, 'Faster steps on a CPU, slower compilation (glibc).')


def keep_memory() -> None:
    """Makes glibc keep memory that is freed; before JAX starts its threads.

    XLA's CPU backend allocates the scratch of a step and frees it at the end. By default glibc
    gives large blocks back to the system, which hands them out zeroed, page by page.

    Raises:
      UsageError: the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    wanted = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _LARGEST, _ARENA_MAX: 1}
    if mallopt is None or not all(mallopt(option, value) for option, value in wanted.items()):
        raise UsageError('--keep_memory: needs Linux with glibc; leave it out')
