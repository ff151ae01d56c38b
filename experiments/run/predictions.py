"""The logits of every example of a split, for reports and for comparisons image by image."""

from collections.abc import Callable
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from experiments.run import parallel


class Predictions(NamedTuple):
    """What a network says about the examples of a split that can be read, in the source's order.

    Attributes:
      logits: float32 [N, classes].
      labels: int32 [N].
      indices: int32 [N], the index of each example in the source.
    """

    logits: np.ndarray
    labels: np.ndarray
    indices: np.ndarray

    @property
    def log_probabilities(self) -> np.ndarray:
        """Float64 [N, classes]."""
        return scipy.special.log_softmax(self.logits.astype(np.float64), axis=1)

    @property
    def predicted(self) -> np.ndarray:
        """The most probable class of each example, int64 [N]."""
        return np.argmax(self.logits, axis=1)

    @property
    def is_correct(self) -> np.ndarray:
        """Whether the most probable class is the label, bool [N]."""
        return self.predicted == self.labels


def make_predict_step(
    logits: Callable[[hk.Params, hk.State, jax.Array], jax.Array],
) -> jax.stages.Wrapped:
    """Returns a parallel function ((params, state), batch) -> the batch with logits for its images.

    Args:
      logits: (params, state, uint8 or float images [n, H, W, 3]) -> logits [n, classes].
    """

    def predict_step(variables: tuple[hk.Params, hk.State], batch: dict) -> dict:
        found = logits(*variables, batch['image']).astype(jnp.float32)
        rest = {name: batch[name] for name in ('label', 'mask', 'position')}
        return jax.lax.all_gather({'logits': found} | rest, parallel.AXIS, tiled=True)

    return parallel.parallelize(predict_step)
