import dataclasses
import math

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax import models
from nfnets_jax.models import residual


def test_plan_of_blocks():
    plans = residual.plan_blocks(64, [256, 512], [2, 3], [1, 2], alpha=0.2, stochdepth_rate=0.25)
    assert [dataclasses.astuple(p)[:4] for p in plans] == [
        (0, 64, 256, 1),
        (1, 256, 256, 1),
        (2, 256, 512, 2),
        (3, 512, 512, 1),
        (4, 512, 512, 1),
    ]
    assert [p.is_transition for p in plans] == [True, False, True, False, False]
    # A transition resets the variance to 1 and adds alpha^2 like every other block.
    variances = [1, 1.04, 1.08, 1.04, 1.08]
    np.testing.assert_allclose([p.beta for p in plans], [v**-0.5 for v in variances])
    np.testing.assert_allclose([p.stochdepth_rate for p in plans], [0, 0.05, 0.1, 0.15, 0.2])


def test_a_first_block_that_changes_nothing_is_no_transition():
    plans = residual.plan_blocks(16, [16, 32], [1, 1], [1, 2], alpha=0.2)
    assert [p.is_transition for p in plans] == [False, True]
    assert plans[1].beta == pytest.approx(1 / math.sqrt(1.04))


def test_variance_grows_as_planned(random_variables):
    """The claim of the NF-ResNets paper: what beta divides by is what is there."""
    network = hk.transform_with_state(
        lambda x: models.NFResNet(5, '50', widths=(16, 32), depths=(3, 3), stem='small')(
            x, False, return_metrics=True
        )
    )
    x = jax.random.normal(jax.random.key(0), (8, 16, 16, 3))
    params, state = random_variables(network, x)
    for leaves in params.values():  # As at initialisation, but for skip gains of 1.
        for name, leaf in leaves.items():
            if name != 'w':
                leaves[name] = np.full(leaf.shape, 'gain' in name, np.float32)
    signal = jax.jit(network.apply)(params, state, None, x)[0]['signal']
    expected = [1, *(2 * (1.04, 1.08, 1.12))]
    np.testing.assert_allclose(signal['avg_var'], expected, rtol=0.25)
    np.testing.assert_allclose(signal['res_avg_var'], 1, rtol=0.25)


def test_rematerialised_blocks_compute_the_same(random_variables):
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    options = {'depths': (1, 2), 'widths': (8, 16), 'stochdepth_rate': 0.5}
    results = []
    for remat in (False, True):
        network = hk.transform_with_state(
            lambda x, remat=remat: models.ResNet(5, '8', remat=remat, **options)(x, True)
        )
        params, state = random_variables(network, x)

        def loss(params, network=network, state=state):
            out, new_state = network.apply(params, state, jax.random.key(2), x)
            return jnp.sum(jnp.square(out['logits'])), new_state

        (value, new_state), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        results.append((value, new_state, grads))
        assert ('remat' in str(jax.make_jaxpr(loss)(params))) == remat
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *results)


def test_dropout_is_before_the_classifier_and_in_training_only():
    features = jnp.ones((4, 2, 2, 100))

    def run(is_training):
        network = hk.transform(
            lambda: residual.classify(features, lambda pool: pool, 0.25, is_training)
        )
        return network.apply({}, jax.random.key(0))

    trained = run(True)
    np.testing.assert_array_equal(trained['pool'], 1)
    assert set(np.unique(trained['logits'])) == {np.float32(0), np.float32(1 / 0.75)}
    np.testing.assert_array_equal(run(False)['logits'], 1)
