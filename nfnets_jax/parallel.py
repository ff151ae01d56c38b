"""Data parallelism over devices and processes: the one module that knows `jax.pmap`.

The training state carries no leading device axis. It is placed once, replicated over the
process's own devices, and handed to a pmapped function with `in_axes=None` and
`out_axes=None`: host cost per call then no longer grows with a stack of per-device copies,
buffers can be donated, and checkpoints and metrics are plain arrays. Batches do carry the
leading device axis that pmap maps over.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nfnets_jax.errors import UsageError

AXIS = 'devices'


def _placement(spec: PartitionSpec) -> NamedSharding:
    return NamedSharding(Mesh(np.asarray(jax.local_devices()), (AXIS,)), spec)


def local_batch_size(global_batch: int, key: str = 'batch_size') -> int:
    """Returns the examples of a global batch that fall to this process.

    Raises:
      UsageError: the batch does not split evenly over all devices of all processes.
    """
    devices = jax.device_count()
    if global_batch % devices:
        below = global_batch - global_batch % devices
        nearby = ' or '.join(str(b) for b in (below, below + devices) if b > 0)
        raise UsageError(
            f'config.{key}={global_batch} is not divisible by the {devices} devices: use {nearby}'
        )
    return global_batch // jax.process_count()


def replicate(tree: Any) -> Any:
    """Copies a tree of arrays to every device of this process; shapes stay as they are."""
    return jax.device_put(tree, _placement(PartitionSpec()))


def shard(batch: Any) -> Any:
    """Splits host arrays [b, ...] over this process's devices: [devices, b / devices, ...]."""
    devices = jax.local_device_count()
    split = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
    return jax.device_put(split, _placement(PartitionSpec(AXIS)))


def parallelise(
    step: Callable[[Any, Any], Any], *, donate_replicated: bool = False
) -> Callable[[Any, Any], Any]:
    """Runs `step(replicated, batch)` on every device, each on its own rows of the batch.

    Args:
      step: a function of a replicated tree and the device's shard of the batch, which may
        use collectives over `AXIS`. What it returns must be equal on all devices (that is,
        reduced over `AXIS`), since one copy of it is kept.
      donate_replicated: whether the first argument's buffers are given up to the result.

    Returns:
      A compiled function of a tree placed by `replicate` and a batch placed by `shard`. It
      compiles once: a call that would compile it again, because a shape or dtype has changed
      between steps, raises RuntimeError instead of becoming slow in silence.
    """
    traces = 0

    @functools.wraps(step)
    def traced_once(replicated, batch):
        nonlocal traces
        traces += 1
        if traces > 1:
            shapes = jax.tree.map(lambda x: f'{x.dtype}{list(x.shape)}', batch)
            raise RuntimeError(f'{step.__name__} would be compiled again, for a batch of {shapes}')
        return step(replicated, batch)

    return jax.pmap(
        traced_once,
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=None,
        donate_argnums=(0,) if donate_replicated else (),
    )


def is_primary() -> bool:
    """Whether this process is the one that writes files and talks to the user."""
    return jax.process_index() == 0
