import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.run.losses import cross_entropy

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 4, (7, 5)).astype(np.float32)
WEIGHTS = np.array([0.25, 1, 2, 8, 1], np.float32)


@pytest.mark.parametrize('weights', [None, WEIGHTS])
@pytest.mark.parametrize('multi_label', [False, True])
def test_equals_the_formula_in_float64(multi_label, weights):
    targets = RNG.uniform(size=(7, 5)).astype(np.float32)
    if not multi_label:
        targets /= targets.sum(1, keepdims=True)
    x, t = LOGITS.astype(np.float64), targets.astype(np.float64)
    w = np.ones(5) if weights is None else weights.astype(np.float64)
    if multi_label:
        p = 1 / (1 + np.exp(-x))
        expected = -np.mean(w * t * np.log(p) + (1 - t) * np.log(1 - p), axis=1)
    else:
        p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
        expected = -np.sum(w * t * np.log(p), axis=1)
    found = cross_entropy(jnp.asarray(LOGITS), targets, weights, multi_label=multi_label)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_unweighted_losses_are_those_of_optax():
    targets = RNG.integers(0, 2, (7, 5)).astype(np.float32)
    np.testing.assert_array_equal(
        cross_entropy(jnp.asarray(LOGITS), targets), optax.softmax_cross_entropy(LOGITS, targets)
    )
    np.testing.assert_allclose(
        cross_entropy(jnp.asarray(LOGITS), targets, multi_label=True),
        optax.sigmoid_binary_cross_entropy(LOGITS, targets).mean(1),
        rtol=1e-6,
    )


def test_confident_logits_overflow_nothing():
    loss = cross_entropy(jnp.array([[1e4, -1e4]]), jnp.array([[0.0, 1.0]]), multi_label=True)
    np.testing.assert_allclose(loss, [1e4])
