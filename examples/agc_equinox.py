"""Adaptive gradient clipping in an Equinox loop, whose kernels are OIHW.

Run: python examples/agc_equinox.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from nfnets_jax import adaptive_grad_clip, describe_clipping, unit_axes


class Network(eqx.Module):
    conv: eqx.nn.Conv2d
    head: eqx.nn.Linear

    def __call__(self, image):
        return self.head(jax.nn.relu(self.conv(image)).mean((1, 2)))


def clipping(path, leaf):
    return None if path == 'head/weight' else 0.04


def main(steps=60):
    labels = jnp.arange(64) % 3
    images = jax.random.normal(jax.random.key(0), (64, 3, 8, 8))
    images += jax.nn.one_hot(labels, 3)[:, :, None, None]
    model = Network(
        eqx.nn.Conv2d(3, 16, 3, key=jax.random.key(1)), eqx.nn.Linear(16, 3, key=jax.random.key(2))
    )
    params = eqx.filter(model, eqx.is_inexact_array)
    print(describe_clipping(params, clipping_by_leaf=clipping, axis=unit_axes.oihw))
    agc = adaptive_grad_clip(clipping_by_leaf=clipping, axis=unit_axes.oihw)
    tx = optax.chain(agc, optax.sgd(0.1, momentum=0.9, nesterov=True))

    @eqx.filter_value_and_grad
    def loss_fn(model):
        logits = jax.vmap(model)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @eqx.filter_jit
    def step(model, state):
        loss, grads = loss_fn(model)
        updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(steps):
        model, state, loss = step(model, state)
        losses.append(float(loss))
    clipped = float(optax.tree.get(state, 'clipped_fraction'))
    print(f'loss {losses[0]:.3f} -> {losses[-1]:.3f}, {clipped:.0%} of units clipped at the end')
    return losses


if __name__ == '__main__':
    main()
