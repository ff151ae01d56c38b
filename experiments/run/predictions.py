"""The logits of every example of a split, for reports and for comparisons image by image."""

import dataclasses
import functools
from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from experiments.experiment import Experiment
from experiments.run import parallel
from experiments.run.evaluation import open_eval_batches

# (params, state, images [n, H, W, C]) -> logits [n, classes]
LogitsFn = Callable[[hk.Params, hk.State, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a network says about the examples of a split that can be read, in the source's order.

    Attributes:
      logits: float32 [N, classes].
      labels: int32 [N].
      indices: int32 [N], the index of each example in the source.
    """

    logits: np.ndarray
    labels: np.ndarray
    indices: np.ndarray

    @functools.cached_property
    def log_probabilities(self) -> np.ndarray:
        """Float64 [N, classes]."""
        import scipy.special  # here: a slow import that only reports need

        return scipy.special.log_softmax(self.logits.astype(np.float64), axis=1)

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        """The most probable class of each example, int64 [N]."""
        return np.argmax(self.logits, axis=1)

    @property
    def is_correct(self) -> np.ndarray:
        """Whether the most probable class is the label, bool [N]."""
        return self.predicted == self.labels


def make_predict_step(logits_fn: LogitsFn) -> jax.stages.Wrapped:
    """Returns a parallel function ((params, state), batch) -> logits and labels of all examples."""

    def predict_step(variables: tuple[hk.Params, hk.State], batch: dict) -> dict[str, jax.Array]:
        logits = logits_fn(*variables, batch['image']).astype(jnp.float32)
        rest = {name: batch[name] for name in ('label', 'index', 'mask')}
        return jax.lax.all_gather({'logits': logits} | rest, parallel.AXIS, tiled=True)

    return parallel.parallelize(predict_step)


def predict(
    experiment: Experiment,
    predict_step: Callable,
    variables: tuple[hk.Params, hk.State],
    split: str,
) -> Predictions:
    """Returns the predictions on every readable example of a split, in every process.

    Args:
      experiment: the experiment with the data.
      predict_step: from `make_predict_step`.
      variables: parameters and state, placed by `parallel.replicate`.
      split: one of `experiment.splits`.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    with open_eval_batches(experiment, split) as batches:
        for batch in batches:
            found = jax.device_get(predict_step(variables, batch))
            real = found['mask'] == 1
            parts.append(tuple(found[name][real] for name in ('logits', 'label', 'index')))
    logits, labels, indices = map(np.concatenate, zip(*parts, strict=True))
    order = np.argsort(indices)  # devices may stand in another order than their processes
    return Predictions(logits[order], labels[order], indices[order])
