"""The loss of each example, from its logits and soft targets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    weights: np.ndarray | None = None,
    *,
    multi_label: bool = False,
) -> jax.Array:
    """Returns the cross-entropy of each example, float32 [N].

    With one label for each image it is -sum_k w_k t_k log p_k, where p is the softmax. With several
    it is -mean_k [w_k t_k log p_k + (1 - t_k) log(1 - p_k)], where p is the sigmoid: weights are
    those of the labels that are there, as `pos_weight` in PyTorch.

    Args:
      logits: float32 [N, K].
      targets: float32 [N, K]; each row sums to 1 unless `multi_label`.
      weights: w, float32 [K]; None: all 1.
      multi_label: whether each class is a question of its own.
    """
    weighted = targets if weights is None else targets * weights
    if not multi_label:
        return optax.softmax_cross_entropy(logits, weighted)
    there, absent = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return -jnp.mean(weighted * there + (1 - targets) * absent, axis=-1)
