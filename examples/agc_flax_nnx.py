"""Adaptive gradient clipping in a Flax NNX loop.

Run: python examples/agc_flax_nnx.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from nfnets_jax import adaptive_grad_clip, describe_clipping, unit_axes


class Network(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, images):
        return self.head(nnx.relu(self.conv(images)).mean((1, 2)))


def clipping(path, leaf):
    return None if path.startswith('head/kernel') else 0.04


def main(steps=60):
    labels = jnp.arange(64) % 3
    images = jax.random.normal(jax.random.key(0), (64, 8, 8, 3))
    images += jax.nn.one_hot(labels, 3)[:, None, None, :]
    model = Network(nnx.Rngs(0))
    rules = {'clipping_by_leaf': clipping, 'axis': unit_axes.hwio}
    print(describe_clipping(nnx.state(model, nnx.Param), **rules))
    tx = optax.chain(
        adaptive_grad_clip(**rules),
        optax.sgd(0.1, momentum=0.9, nesterov=True),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss_fn(model):
            logits = model(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(steps)]
    clipped = float(optax.tree.get(optimizer.opt_state, 'clipped_fraction')[...])
    print(f'loss {losses[0]:.3f} -> {losses[-1]:.3f}, {clipped:.0%} of units clipped at the end')
    return losses


if __name__ == '__main__':
    main()
