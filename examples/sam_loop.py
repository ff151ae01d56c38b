"""Sharpness-aware minimization in a plain loop, with the ascent on a fifth of the batch.

Run: python examples/sam_loop.py
"""

import jax
import jax.numpy as jnp
import optax

from nfnets_jax import adaptive_grad_clip, sam_value_and_grad


def loss_fn(params, batch, dropout_key):
    hidden = jax.nn.relu(batch['x'] @ params['w1'])
    hidden *= jax.random.bernoulli(dropout_key, 0.9, hidden.shape[-1:]) / 0.9
    logits = hidden @ params['w2']
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch['y']).mean()
    return loss, logits


def main(steps=100):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (100, 16))
    batch = {'x': x, 'y': jnp.argmax(x[:, :4], axis=1)}
    params = {
        'w1': jax.random.normal(keys[1], (16, 64)) / 4,
        'w2': jax.random.normal(keys[2], (64, 4)) / 8,
    }
    # The radius grows over the first steps; clipping and momentum see only the final gradient.
    grad_fn = sam_value_and_grad(
        loss_fn,
        optax.linear_schedule(0.0, 0.05, 20),
        ascent_fraction=0.2,
        has_aux=True,
        both_aux=True,
    )
    tx = optax.chain(adaptive_grad_clip(0.04), optax.sgd(0.5, momentum=0.9, nesterov=True))
    state = tx.init(params)

    @jax.jit
    def step(params, state, i):
        key = jax.random.fold_in(jax.random.key(1), i)
        (loss, (_, logits)), grads = grad_fn(params, batch, key, step=i)
        updates, state = tx.update(grads, state, params)
        accuracy = jnp.mean(jnp.argmax(logits, axis=1) == batch['y'])
        return optax.apply_updates(params, updates), state, loss, accuracy

    losses = []
    for i in range(steps):
        params, state, loss, accuracy = step(params, state, i)
        losses.append(float(loss))
        if i % 20 == 0:
            print(f'step {i}: loss {losses[-1]:.3f}, accuracy {float(accuracy):.0%}')
    return losses


if __name__ == '__main__':
    main()
