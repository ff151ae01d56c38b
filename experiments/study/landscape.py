"""The loss around some parameters: along its gradient, and along random directions."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Params = Any  # a tree of arrays, whose weights have their output units along the last axis


def along_gradient(
    value_and_grad: Callable[[Params], tuple[jax.Array, Params]],
    params: Params,
    step_sizes: Sequence[float],
) -> dict[str, float]:
    """Returns how much loss and gradient change along the gradient (arXiv 1805.11604, section 3.1).

    Args:
      value_and_grad: of the loss.
      params: where the gradient g is taken.
      step_sizes: each s leads to `params` - s * g.

    Returns:
      'loss_min', 'loss_max': of the losses at the steps; 'loss_range': the latter less the former.
      'gradient_change': greatest norm of the gradient there less g.
      'beta': greatest ratio of that to the distance, the effective smoothness.
    """
    _, gradient = value_and_grad(params)
    norm = float(optax.tree.norm(gradient))
    losses, changes = [], []
    for size in step_sizes:
        loss, there = value_and_grad(optax.tree.add_scale(params, -size, gradient))
        losses.append(float(loss))
        changes.append(float(optax.tree.norm(optax.tree.sub(there, gradient))))
    return {
        'loss_min': min(losses),
        'loss_max': max(losses),
        'loss_range': max(losses) - min(losses),
        'gradient_change': max(changes),
        'beta': max(
            change / (size * norm) for change, size in zip(changes, step_sizes, strict=True)
        ),
    }


def along_random(
    loss: Callable[[Params], jax.Array],
    params: Params,
    distances: Sequence[float],
    keys: jax.Array,
) -> np.ndarray:
    """Returns the mean loss at each distance along one random direction for each key."""
    directions = [random_direction(key, params) for key in keys]
    return np.array(
        [
            np.mean([float(loss(optax.tree.add_scale(params, far, way))) for way in directions])
            for far in distances
        ]
    )


def random_direction(key: jax.Array, params: Params) -> Params:
    """Returns a Gaussian direction, each filter as long as that of `params` (arXiv 1712.09913).

    A filter is the weights of one output unit. Vectors and scalars do not move.
    """
    leaves, structure = jax.tree.flatten(params)

    def leaf(key: jax.Array, weights: jax.Array) -> jax.Array:
        if weights.ndim < 2:
            return jnp.zeros_like(weights)
        drawn, axes = jax.random.normal(key, weights.shape), tuple(range(weights.ndim - 1))
        norms = [jnp.sqrt(jnp.sum(x**2, axis=axes, keepdims=True)) for x in (weights, drawn)]
        return drawn * norms[0] / norms[1]

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, map(leaf, keys, leaves))
