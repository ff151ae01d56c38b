"""Adaptive gradient clipping in plain JAX and optax: two layers, no framework.

Run: python examples/agc_optax.py
"""

import jax
import jax.numpy as jnp
import optax

import nfnets_jax


def loss_fn(params, x, y):
    hidden = jax.nn.relu(x @ params['hidden']['w'] + params['hidden']['b'])
    logits = hidden @ params['head']['w'] + params['head']['b']
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def main(steps=100):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (256, 16))
    y = jnp.argmax(x[:, :4], axis=1)
    params = {
        'hidden': {'w': jax.random.normal(keys[1], (16, 64)) / 4, 'b': jnp.zeros(64)},
        'head': {'w': jax.random.normal(keys[2], (64, 4)) / 8, 'b': jnp.zeros(4)},
    }

    # As in the paper: clip every leaf but the weight of the last layer, before anything else.
    mask = {'hidden': True, 'head': {'w': False, 'b': True}}
    print(nfnets_jax.describe_clipping(params, 0.04, mask=mask))
    tx = optax.chain(
        nfnets_jax.adaptive_grad_clip(0.04, mask=mask),
        optax.sgd(0.5, momentum=0.9, nesterov=True),
    )
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for i in range(steps):
        params, state, loss = step(params, state)
        losses.append(float(loss))
        if i % 20 == 0:
            clipped = float(optax.tree.get(state, 'clipped_fraction'))
            print(f'step {i}: loss {losses[-1]:.3f}, {clipped:.0%} of units clipped')
    return losses


if __name__ == '__main__':
    main()
