"""Compiles programs for TPUs and GPUs that this machine need not have.

The compilers work on a CPU: libtpu for TPUs, JAX's CUDA plugin for GPUs. Compiled programs are kept
in the cache directory, beside downloaded weights.
"""

import gzip
import hashlib
import importlib.metadata
import json
import math
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from experiments.run import accelerators
from nfnets_jax import extras, files
from nfnets_jax.errors import UsageError, first_line, nearest
from nfnets_jax.weights.downloads import cache_directory

# Operations a cycle: matrix units x 128 x 128 x 2 (v6e: 256 x 256). The published peak over that is
# the clock, such as 0.94 GHz for a v3. The compiler's estimate of a product of 8192 x 8192 matrices
# reaches 70 % (v6e) to 97 % (v3) of them. HBM, in GiB, is what the compiler gives programs.
#   dimensions of a topology, devices a chip, operations a cycle, HBM
_TPUS = {
    'v3': (2, 2, 2 * 128 * 128 * 2, 15.48),
    'v4': (3, 1, 8 * 128 * 128 * 2, 30.75),
    'v5e': (2, 1, 4 * 128 * 128 * 2, 15.75),
    'v5p': (3, 1, 8 * 128 * 128 * 2, 95.74),
    'v6e': (2, 1, 4 * 256 * 256 * 2, 31.25),
}
# The SXM cards, as XLA describes them: cores, compute capability, units a core, shared memory of
# a core, clock in GHz, cache and memory in bytes, memory bandwidth.
_GPUS = {
    'A100': (108, 8, 64, 167936, 1.41, 41943040, 42331013120, 1555200000000),
    'H100': (132, 9, 128, 233472, 1.98, 52428800, 84978434048, 3352320000000),
    'H200': (132, 9, 128, 233472, 1.98, 52428800, 150754820096, 4800000000000),
}
_GPUS_IN_A_BOX = 8
_MEMORY_FRACTION = 'XLA_PYTHON_CLIENT_MEM_FRACTION'  # of a GPU, that JAX takes; 0.75 by default


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
      name: 'v5e:16x16' or 'H100:8'.
      device: what one of them can do.
      devices: all of them, in the order of `jax.devices()` there.
      chips: how many chips they are.
      memory: bytes of one that programs can have.
      clock: cycles a second of a TPU; None for a GPU.
      versions: of JAX and the compiler.
    """

    name: str
    device: accelerators.Device
    devices: Sequence[jax.Device]
    chips: int
    memory: float
    clock: float | None
    versions: dict[str, str]


class Compiled(NamedTuple):
    """A compiled program.

    Attributes:
      text: `jax.stages.Compiled.as_text()`; '' where it does not fit the memory of the device.
      memory: bytes on a device, by 'arguments' (with results that are none), 'temporaries', 'code';
        where the compiler found that they do not fit, all together are 'temporaries'.
      seconds: that compiling it took.
    """

    text: str
    memory: dict[str, float]
    seconds: float


def count_devices(name: str) -> tuple[accelerators.Device, int, int]:
    """Returns what one device of a target is, how many chips it has, and how many devices.

    Raises:
      UsageError: there is no such target.
    """
    kind, shape = _parse(name)
    device = next(device for device in accelerators.DEVICES if device.name == kind)
    chips = math.prod(shape)
    devices = chips * (_TPUS[kind][1] if kind in _TPUS else 1)
    if kind in _TPUS and devices > device.linked:
        raise UsageError(f'--target={name}: a pod has {device.linked * chips // devices} chips')
    return device, chips, devices


def _parse(name: str) -> tuple[str, list[int]]:
    """Returns the kind of device, and the chips along each axis; of GPUs their number."""
    kind, _, size = name.partition(':')
    shape = [int(side) for side in size.split('x')] if re.fullmatch(r'\d+(x\d+)*', size) else []
    if kind not in _TPUS and kind not in _GPUS:
        raise UsageError(f'--target={name}: unknown {kind!r}{nearest(kind, [*_TPUS, *_GPUS])}')
    axes = _TPUS[kind][0] if kind in _TPUS else 1
    if len(shape) != axes or not all(shape):
        example = 'x'.join(('2', '2', '1')[:axes]) if kind in _TPUS else _GPUS_IN_A_BOX
        raise UsageError(f'--target={name}: give the chips along {axes} axes, as {kind}:{example}')
    if kind in _TPUS and any(side % 2 for side in shape[:2]) and math.prod(shape) > 1:
        raise UsageError(
            f'--target={name}: the first two axes must be even, or the chip a single one'
        )
    if kind in _GPUS and shape[0] > _GPUS_IN_A_BOX and shape[0] % _GPUS_IN_A_BOX:
        raise UsageError(
            f'--target={name}: must be up to {_GPUS_IN_A_BOX}, one machine, or a multiple of it'
        )
    return kind, shape


def open_target(name: str) -> Target:
    """Returns the devices that a name describes, such as 'v5e:16x16', 'v4:2x2x4' or 'H100:8'.

    Raises:
      UsageError: there is no such target, or its compiler is not installed.
    """
    device, chips, devices = count_devices(name)
    if device.name in _GPUS:
        return _open_gpus(name, device, devices)
    _assert_installed('libtpu')
    # No TPU is looked for, and several processes may compile at once.
    os.environ.update(
        TPU_SKIP_MDS_QUERY='1',
        TPU_ACCELERATOR_TYPE='v5litepod-4',
        TPU_WORKER_HOSTNAMES='localhost',
        ALLOW_MULTIPLE_LIBTPU_LOAD='1',
    )
    # A machine has 2 x 2 chips, or a single one.
    options: dict[str, Any] = {'chips_per_host_bounds': (1, 1, 1) if chips == 1 else (2, 2, 1)}
    if device.name == 'v4':
        options['chip_config_name'] = 'megacore'  # Its two cores are one device.
    topology = _topology(name, 'tpu', name, **options)
    _, _, operations, memory = _TPUS[device.name]
    clock = device.peak_flops / operations
    versions = _versions('libtpu')
    return Target(name, device, topology.devices, chips, memory * 2**30, clock, versions)


def _open_gpus(name: str, device: accelerators.Device, count: int) -> Target:
    _assert_installed('jax_cuda12_plugin')
    cores, capability, units, shared, clock, cache, memory, bandwidth = _GPUS[device.name]
    config = f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {capability} }}
          core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
          threads_per_block_limit: 1024 threads_per_core_limit: 2048 threads_per_warp: 32
          registers_per_block_limit: 65536 registers_per_core_limit: 65536
          shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared - 1024}
          shared_memory_per_core: {shared} l2_cache_size: {cache}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          device_memory_size: {memory} memory_bandwidth: {bandwidth}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
        device_description_str: "{device.kinds[0]}"
    """
    in_a_box = min(count, _GPUS_IN_A_BOX)
    shape = f'1x{count // in_a_box}x{in_a_box}'  # one process for each box
    topology = _topology(name, 'cuda', 'gpus', target_config=config, topology=shape)
    fraction = float(os.environ.get(_MEMORY_FRACTION, 0.75))
    versions = _versions('jax-cuda12-plugin', 'nvidia-cudnn-cu12')
    return Target(name, device, topology.devices, count, memory * fraction, None, versions)


def _topology(target: str, platform: str, name: str, **options: Any):
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform=platform, topology_name=name, **options)
    except Exception as error:  # A RuntimeError or another, by platform and version.
        raise UsageError(f'--target={target}: {first_line(error)}') from error


def _assert_installed(module: str) -> None:
    if line := extras.how_to_install(module):
        raise UsageError(f'the compiler is missing: {line}')


def _versions(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ('jax', *packages)}


def compile_program(
    lowered: jax.stages.Lowered, target: Target, waiting: Callable[[float], None] = lambda _: None
) -> Compiled:
    """Returns the program as compiled for the target, from the cache if it was compiled before.

    Args:
      lowered: for the devices of the target.
      target: from `open_target`.
      waiting: called every second of compiling with the seconds so far.
    """
    path = cache_directory() / 'compiled' / f'{_digest(lowered, target)}.json.gz'
    try:
        return Compiled(**json.loads(gzip.decompress(path.read_bytes())))
    except (OSError, EOFError, ValueError, TypeError):
        pass  # It is not there, or damaged.
    # There is no device to time kernels on.
    options = {} if target.clock else {'xla_gpu_autotune_level': '0'}
    compiled = _in_background(lambda: _compile(lowered, options), waiting)
    try:
        files.make_directory(path.parent)
        files.atomic_write(path, gzip.compress(json.dumps(compiled._asdict()).encode()))
    except UsageError as error:
        print(f'the compiled program is not kept: {error}', file=sys.stderr, flush=True)
    return compiled


def _digest(lowered: jax.stages.Lowered, target: Target) -> str:
    """Returns a key of everything that the compiled program depends on."""
    # The names of operations have slashes; those of functions on the stack, which do not matter,
    # have none.
    located = lowered.as_text(debug_info=True)
    names = re.findall(r'^#loc\d+ = loc\("([^"]*/[^"]*)"\(#loc', located, re.M)
    flags = {name: os.environ.get(name, '') for name in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')}
    parts = (target.name, target.versions, flags, sorted(set(names)), lowered.as_text())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _compile(lowered: jax.stages.Lowered, options: Mapping[str, str]) -> Compiled:
    start = time.monotonic()
    try:
        with warnings.catch_warnings():
            # JAX's own cache cannot read programs of devices that are not here.
            warnings.filterwarnings('ignore', 'Error reading persistent compilation cache')
            program = lowered.compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        if (needed := memory_needed(str(error))) is None:
            raise
        memory: dict[str, float] = {'arguments': 0, 'temporaries': needed, 'code': 0}
        return Compiled('', memory, time.monotonic() - start)
    stats, text = program.memory_analysis(), program.as_text()
    assert stats is not None
    assert text is not None
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    memory = {
        'arguments': stats.argument_size_in_bytes + results,
        'temporaries': stats.temp_size_in_bytes,
        'code': stats.generated_code_size_in_bytes,
    }
    return Compiled(text, memory, time.monotonic() - start)


def memory_needed(message: str) -> float | None:
    """Returns the bytes that a program would need, by the compiler's error that it has fewer.

    None if the error is another one.
    """
    found = re.search(r'(?:Used|temporaries \()\s*([\d.]+)([KMGT]?)', message)
    if 'RESOURCE_EXHAUSTED' not in message or found is None:
        return None
    return float(found[1]) * 2 ** (10 * ' KMGT'.index(found[2] or ' '))


def _in_background(work: Callable[[], Compiled], waiting: Callable[[float], None]) -> Compiled:
    """Returns what `work` returns; the main thread stays free for Ctrl-C."""
    results: list[Compiled] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    start = time.monotonic()
    thread.start()
    while thread.is_alive():
        thread.join(timeout=1)
        waiting(time.monotonic() - start)
    if errors:
        raise errors[0]
    return results[0]
