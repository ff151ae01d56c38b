"""The logits of every example of a split, for what sums over the examples cannot tell."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from experiments.experiment import Experiment
from experiments.run import parallel
from experiments.run.batches import open_eval_batches

# (params, state, images [n, H, W, C]) -> logits [n, classes]
LogitsFn = Callable[[hk.Params, hk.State, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a network says about the examples of a split that can be read, in the source's order.

    Attributes:
      logits: float32 [N, classes].
      labels: int32 [N]; where an image may have several labels uint8 [N, classes] of 0 and 1.
      indices: int32 [N], the index of each example in the source.
    """

    logits: np.ndarray
    labels: np.ndarray
    indices: np.ndarray

    @property
    def multi_label(self) -> bool:
        return self.labels.ndim == 2

    @functools.cached_property
    def log_probabilities(self) -> np.ndarray:
        """Float64 [N, classes]; with several labels each class has a probability of its own."""
        logits = self.logits.astype(np.float64)
        if self.multi_label:
            return -np.logaddexp(0, -logits)
        import scipy.special  # here: a slow import that only reports need

        return scipy.special.log_softmax(logits, axis=1)

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        """The most probable class of each example, int64 [N]."""
        return np.argmax(self.logits, axis=1)

    @property
    def is_correct(self) -> np.ndarray:
        """Whether the most probable class is the label, or one of them, bool [N]."""
        if self.multi_label:
            return self.labels[np.arange(len(self.labels)), self.predicted] == 1
        return self.predicted == self.labels

    @functools.cached_property
    def average_precision(self) -> np.ndarray:
        """The average precision of each class, float64 [classes], with several labels only."""
        from experiments.run import ranking  # here: scipy.stats is slow to import

        return ranking.average_precision(self.logits, self.labels)

    @functools.cached_property
    def roc_auc(self) -> np.ndarray:
        """The area under the ROC curve of each class, float64 [classes], likewise."""
        from experiments.run import ranking

        return ranking.roc_auc(self.logits, self.labels)

    @functools.cached_property
    def losses(self) -> np.ndarray:
        """The cross-entropy of each example, as in `losses.cross_entropy`, float64 [N]."""
        if self.multi_label:
            absent = -np.logaddexp(0, self.logits.astype(np.float64))
            return -np.where(self.labels == 1, self.log_probabilities, absent).mean(axis=1)
        return -self.log_probabilities[np.arange(len(self.labels)), self.labels]


def make_predict_step(logits_fn: LogitsFn) -> jax.stages.Wrapped:
    """Returns a parallel function (variables by name, batch) -> logits and labels of all examples.

    The result holds 'logits' by name, and 'label', 'index' and 'mask' of the batch.
    """

    def predict_step(variables: Mapping[str, tuple], batch: dict) -> dict[str, Any]:
        logits = {
            name: logits_fn(params, state, batch['image']).astype(jnp.float32)
            for name, (params, state) in variables.items()
        }
        rest = {name: batch[name] for name in ('label', 'index', 'mask')}
        return jax.lax.all_gather({'logits': logits} | rest, parallel.AXIS, tiled=True)

    return parallel.parallelize(predict_step)


def predict(
    experiment: Experiment, predict_step: Callable, variables: Mapping[str, tuple], split: str
) -> dict[str, Predictions]:
    """Returns the predictions on every readable example of a split, in every process, by name.

    Args:
      experiment: the experiment with the data.
      predict_step: from `make_predict_step`.
      variables: (parameters, state) by name, placed by `parallel.replicate`.
      split: one of `experiment.splits`.
    """
    parts = []
    with open_eval_batches(experiment, split) as batches:
        for batch in batches:
            found = jax.device_get(predict_step(variables, batch))
            real = found.pop('mask') == 1
            parts.append(jax.tree.map(lambda rows, real=real: rows[real], found))
    whole = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
    order = np.argsort(whole['index'])  # devices may stand in another order than their processes
    labels, indices = whole['label'][order], whole['index'][order]
    return {
        name: Predictions(logits[order], labels, indices)
        for name, logits in whole['logits'].items()
    }
