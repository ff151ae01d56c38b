"""Gives every test four fake CPU devices and a compilation cache that outlives the run.

Tests may be started by a job that ignores signals (`nohup make test &`), and must not leave a
process behind.
"""

import ctypes
import gc
import os
import pathlib
import signal
import sys
import time

import pytest

from tests import versions

# Tracing makes much garbage that counting references frees.
gc.set_threshold(100_000, 50, 100)

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# The programs of tests run for milliseconds, but compile for seconds: 3.6 s with XLA's emitters of
# fusions, 1.0 s with its older ones and one LLVM module, for the step of `tiny_config`.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
_FLAGS = ['--xla_force_host_platform_device_count=4']
if versions.JAXLIB < (0, 10, 2):
    # It writes an error of 2,000 characters for each program that it reads from a cache.
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
if versions.JAXLIB < (0, 11):
    # Later ones have one kind of emitters, and end at a flag that they do not know.
    _FLAGS += ['--xla_cpu_use_fusion_emitters=false', '--xla_cpu_parallel_codegen_split_count=1']
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *_FLAGS]).strip()
os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR', str(pathlib.Path(__file__).parent.parent / '.cache' / 'jax')
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')

for _number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(_number) == signal.SIG_IGN:
        # The tests still ignore it, but child processes do not inherit a Python handler.
        signal.signal(_number, lambda number, frame: None)

from tests import processes  # noqa: E402  # It keeps the environment of the tests.

if sys.platform == 'linux':
    _PR_SET_CHILD_SUBREAPER = 36  # Orphans of child processes become ours, and are found.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def running_children() -> dict[int, str]:
    """Returns {process ID: command line} of this process's children; {} without Linux.

    Multiprocessing's resource tracker and the server of `processes`, which live as long as their
    parent, are left out.
    """
    children = {}
    for file in pathlib.Path('/proc/self/task').glob('*/children'):
        try:
            numbers = file.read_text().split()
        except OSError:  # The thread has ended.
            continue
        for number in numbers:
            process = pathlib.Path('/proc', number)
            try:
                state = (process / 'stat').read_text().rpartition(')')[2].split()[0]
                command = (process / 'cmdline').read_text(errors='replace').replace('\0', ' ')
            except OSError:
                continue
            ours = 'multiprocessing.resource_tracker' in command
            if state != 'Z' and not ours and int(number) != processes.server_process():
                children[int(number)] = command
    return children


@pytest.fixture
def optimized():
    """Compiles as users do: unoptimized sums are less exact than some golden values need."""
    import jax  # after the environment is set

    before = jax.config.read('jax_disable_most_optimizations')
    jax.config.update('jax_disable_most_optimizations', False)
    yield
    jax.config.update('jax_disable_most_optimizations', before)


@pytest.fixture(autouse=True, scope='module')
def _no_program_is_kept():
    """Frees what a file of tests has compiled: garbage collection is slow in a large heap."""
    yield
    if jax := sys.modules.get('jax'):
        jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_process_is_left():
    """Fails a test that leaves processes running, and kills them."""
    before = running_children()
    yield
    left = {}
    grace = time.monotonic() + 5  # for processes that are about to end, like a notebook's kernel
    while new := {k: v for k, v in running_children().items() if k not in before}:
        if time.monotonic() > grace:
            left |= new
            for process in new:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
    assert not left, f'still running: {left}'
