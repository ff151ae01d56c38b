"""Data parallelism over devices and processes. Only this module uses `jax.pmap`.

The training state has no leading device axis. It is placed once, replicated over the devices of the
process, and passed to a pmapped function with `in_axes=None` and `out_axes=None`. So the host cost
of a call does not grow with a stack of copies, buffers can be donated, and checkpoints and metrics
are plain arrays. Batches do have the leading device axis that pmap maps over.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nfnets_jax.errors import UsageError

AXIS = 'devices'
_chosen: Sequence[jax.Device] = ()
_cpu_is_split = False


@contextlib.contextmanager
def using(devices: Sequence[jax.Device]) -> Iterator[None]:
    """Builds and runs programs on these devices instead of all; () changes nothing.

    Args:
      devices: of this process; or all of a topology of `jax.experimental.topologies`, which this
        machine need not have: programs for them compile, but do not run.
    """
    global _chosen
    before, _chosen = _chosen, devices or _chosen
    try:
        yield
    finally:
        _chosen = before


def split_cpu(most: int | None = None) -> None:
    """Makes a device of each core of a CPU, for `using`; before JAX starts.

    Changes nothing where several processes train together, where XLA_FLAGS says how many devices a
    CPU is, and where JAX has started, as by a config file that counts devices.

    Args:
      most: how many at most; None: as many as there are cores.
    """
    global _cpu_is_split
    if jax.distributed.is_initialized() or _CPU_DEVICES in os.environ.get('XLA_FLAGS', ''):
        return
    if hasattr(os, 'sched_getaffinity'):
        cores = len(os.sched_getaffinity(0))  # A container may have fewer than the machine.
    else:
        cores = os.cpu_count() or 1
    try:
        jax.config.update('jax_num_cpu_devices', min(cores, most or cores))
    except RuntimeError:  # JAX has started.
        return
    _cpu_is_split = jax.default_backend() == 'cpu'


_CPU_DEVICES = 'xla_force_host_platform_device_count'


def cpu_is_split() -> bool:
    """Returns whether the devices are the cores of one CPU, made by `split_cpu`."""
    return _cpu_is_split


def local_devices() -> Sequence[jax.Device]:
    """Returns the devices of this process that a step runs on."""
    return _chosen or jax.local_devices()


def device_count() -> int:
    """Returns how many devices a step runs on, those of all processes together."""
    return len(_chosen) or jax.device_count()


def process_count() -> int:
    """Returns how many processes a step runs in."""
    return len({device.process_index for device in _chosen}) or jax.process_count()


def _placement(spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(Mesh(np.asarray(local_devices()), (AXIS,)), spec)


def local_batch_size(global_batch: int, key: str = 'batch_size') -> int:
    """Returns this process's number of examples of a global batch.

    Raises:
      UsageError: the batch does not split evenly over all devices of all processes.
    """
    devices = device_count()
    if global_batch % devices:
        below = global_batch - global_batch % devices
        nearby = ' or '.join(str(b) for b in (below, below + devices) if b > 0)
        raise UsageError(
            f'config.{key}={global_batch} is not divisible by the {devices} devices: use {nearby}',
            f'config.{key}',
        )
    return global_batch // process_count()


def replicate(tree: Any) -> Any:
    """Copies a tree of arrays to every device of this process; shapes stay as they are."""
    return jax.device_put(tree, _placement(PartitionSpec()))


def shard(batch: Any) -> Any:
    """Splits host arrays [b, ...] over this process's devices: [devices, b / devices, ...]."""
    devices = len(local_devices())
    split = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
    return jax.device_put(split, _placement(PartitionSpec(AXIS)))


def parallelize(
    step: Callable[[Any, Any], Any], *, donate_replicated: bool = False
) -> jax.stages.Wrapped:
    """Runs `step(replicated, batch)` on every device, each on its own rows of the batch.

    Args:
      step: a function of a replicated tree and the device's shard of the batch, which may use
        collectives over `AXIS`. Its result must be equal on all devices (that is, reduced over
        `AXIS`), because one copy of it is kept.
      donate_replicated: whether the result may reuse the buffers of the first argument.

    Returns:
      A compiled function of a tree placed by `replicate` and a batch placed by `shard`. It compiles
      once: a call with another shape or dtype raises RuntimeError instead of silently recompiling.
    """
    traces = 0

    @functools.wraps(step)
    def traced_once(replicated, batch):
        nonlocal traces
        traces += 1
        jitted = not jax.config.jax_disable_jit  # type: ignore[attr-defined]  # JAX adds it
        if traces > 1 and jitted:  # Without jit each call is traced.
            shapes = jax.tree.map(lambda x: f'{x.dtype}{list(x.shape)}', batch)
            raise RuntimeError(f'{step.__name__} would be compiled again, for a batch of {shapes}')
        return step(replicated, batch)

    return jax.pmap(
        traced_once,
        axis_name=AXIS,
        devices=_chosen or None,
        in_axes=(None, 0),
        out_axes=None,
        donate_argnums=(0,) if donate_replicated else (),
    )


def transfer_guard() -> contextlib.AbstractContextManager:
    """Forbids implicit transfers between host and devices inside a training step."""
    # With jax_disable_jit each operation of a step transfers its own constants.
    jitted = not jax.config.jax_disable_jit  # type: ignore[attr-defined]  # JAX adds it
    return jax.transfer_guard('disallow' if jitted else 'allow')


def is_primary() -> bool:
    """Returns whether this is process 0, the one that writes files and talks to the user."""
    return jax.process_index() == 0


def describe_devices() -> str:
    """Returns a text like '8 devices in 2 processes'."""
    devices, processes = device_count(), process_count()
    among = f' in {processes} processes' if processes > 1 else ''
    return f'{devices} device{"s" if devices > 1 else ""}{among}'


# The functions below are for the start and the end of a run. Every process must call them in the
# same order, and waits in them for the others.


def gather(words: np.ndarray) -> np.ndarray:
    """Returns the words of every process, in the order of the processes.

    Args:
      words: uint32 [n], with the same n in every process.

    Returns:
      uint32 [processes, n].
    """
    return multihost_utils.process_allgather(words).reshape(-1, *words.shape)


def gather_text(text: str) -> list[str]:
    """Returns the text of every process, in their order; at most 400 bytes of each."""
    words = np.zeros(100, np.uint32)
    encoded = np.frombuffer(text.encode()[: words.nbytes], np.uint8)
    words.view(np.uint8)[: len(encoded)] = encoded
    return [row.tobytes().rstrip(b'\0').decode(errors='ignore') for row in gather(words)]


def broadcast(tree: Any) -> Any:
    """Returns process 0's tree of arrays, bit for bit.

    Args:
      tree: arrays; in the other processes only their shapes and dtypes are used.

    Returns:
      NumPy arrays; with one process `tree` itself.
    """
    if jax.process_count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    ends = np.cumsum([0] + [leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves])
    size = -(-int(ends[-1]) // 4)  # in words
    chunk = min(size, _BROADCAST_WORDS)
    # Whole chunks, so that one program of one shape sends them all.
    words = np.zeros(-(-size // chunk) * chunk if size else 0, np.uint32)
    places = [words.view(np.uint8)[start:end] for start, end in zip(ends, ends[1:], strict=False)]
    if is_primary():
        for place, leaf in zip(places, leaves, strict=True):
            place[:] = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
    for start in range(0, len(words), chunk or 1):
        sent = words[start : start + chunk]
        words[start : start + chunk] = multihost_utils.broadcast_one_to_all(sent)
    received = [
        place.view(leaf.dtype).reshape(leaf.shape)
        for place, leaf in zip(places, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, received)


def broadcast_json(value: Any) -> Any:
    """Returns process 0's value, which JSON can express; NaN and infinity are allowed."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(gather(np.array([len(text)], np.uint32))[0, 0])
    sent = text if is_primary() else np.zeros(size, np.uint8)
    return json.loads(broadcast(sent).tobytes())


def from_primary(function: Callable[..., Any], *args: Any) -> Any:
    """Returns function(*args) of process 0, a JSON value. Other processes do not call it."""
    return broadcast_json(function(*args) if is_primary() else None)


_BROADCAST_WORDS = 1 << 22  # 16 MiB at a time
