"""Adaptive gradient clipping of sharded parameters: under jit, and by hand in shard_map.

Run on a CPU that is split into four devices:
    XLA_FLAGS=--xla_force_host_platform_device_count=4 python examples/agc_sharded.py
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nfnets_jax import adaptive_grad_clip


def main():
    mesh = jax.make_mesh((jax.device_count(),), ('model',))
    # The first weight is sharded by inputs, so that every unit has a part on every device.
    specs = {'up': P('model', None), 'down': P(None, 'model'), 'bias': P()}
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        'up': jax.random.normal(keys[0], (8, 16)),
        'down': jax.random.normal(keys[1], (16, 8)),
        'bias': jnp.zeros(8),
    }
    grads = jax.tree.map(lambda p: jax.random.normal(keys[2], p.shape), params)
    expected, _ = clip(adaptive_grad_clip(0.01), grads, params)  # On one device.

    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    grads, params = jax.device_put((grads, params), (shardings, shardings))

    # Under jit `specs` is not needed: XLA sums over devices where an axis is sharded.
    by_jit, state = clip(adaptive_grad_clip(0.01), grads, params)
    print('jit:', *(f'{name} {leaf.sharding.spec}' for name, leaf in by_jit.items()))

    # In shard_map a device sees only its shard; `specs` says which norms span devices.
    tx = adaptive_grad_clip(0.01, specs=specs)
    mapped = jax.shard_map(
        lambda grads, params: clip(tx, grads, params),
        mesh=mesh, in_specs=(specs, specs), out_specs=(specs, P()),
    )  # fmt: skip
    by_hand, _ = jax.jit(mapped)(grads, params)
    print(f'{float(optax.tree.get(state, "clipped_fraction")):.0%} of units clipped')
    return expected, by_jit, by_hand


@jax.jit(static_argnums=0)
def clip(tx, grads, params):
    return tx.update(grads, tx.init(params), params)


if __name__ == '__main__':
    main()
