import dataclasses
import math

import chex
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


def test_each_part_that_keeps_the_variance_is_missed(random_variables):
    """Taken out one at a time, from the same weights."""
    ablations = ('standardize', 'activation_gain', 'downscale')
    options = {'widths': (16,), 'depths': (4,), 'stem': 'small', 'alpha': 1.0}

    def build(**without):
        return hk.transform_with_state(
            lambda x: models.create_model('NF-ResNet-8', 5, **options, **without)(
                x, False, return_metrics=True
            )
        )

    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    networks = {'': build()} | {part: build(**{part: False}) for part in ablations}
    params, state = random_variables(networks[''], x)
    for network in networks.values():
        made, _ = jax.eval_shape(network.init, jax.random.key(0), x)
        chex.assert_trees_all_equal_shapes_and_dtypes(made, params)

    @jax.jit
    def signals(params):
        return {
            part: network.apply(params, state, None, x)[0]['signal']
            for part, network in networks.items()
        }

    signal = signals(params)
    whole = {name: values[-1] for name, values in signal[''].items()}
    assert signal['standardize']['avg_sq_mean'][-1] > 1.5 * whole['avg_sq_mean']
    assert signal['activation_gain']['res_avg_var'][-1] < 0.5 * whole['res_avg_var']
    assert signal['downscale']['res_avg_var'][-1] > 1.5 * whole['res_avg_var']


# Every kind of block; the second stage has equal ones. Fixup's first is as wide as its stem.
TINY = {'widths': (16, 8), 'depths': (1, 3), 'stochdepth_rate': 0.5}
FAMILIES = {
    'NFNet-F0': {'group_size': 4},
    'NF-RegNet-B0': {'group_size': 4},
    # Wide enough inside: of two standardised numbers no gradient is left but rounding.
    'eca_nfnet_l0': {'expansion': 1.0, 'group_size': 4, 'stem_width': 16},
    'NF-ResNet-50': {'width': 1.0, 'use_se': True},
    'ResNet-8': {'cross_replica_axis': None},
    'ResNet-50': {'width': 1.0, 'preactivation': False},
    'SkipInit-ResNet-8': {},
    'Fixup-ResNet-8': {},
}
ONE_STAGE = {'widths': (8,), 'depths': (3,)}


def tiny(name, **more):
    name, _, short = name.partition(', ')
    options = TINY | FAMILIES[name] | (ONE_STAGE if short else {}) | more
    network = hk.transform_with_state(
        lambda x: models.create_model(name, 5, **options)(x, True, return_metrics=True)
    )
    return network, jax.random.normal(jax.random.key(0), (4, 8, 8, 3))


@pytest.fixture
def any_loop(monkeypatch):
    monkeypatch.setattr(residual, 'SHORTEST_LOOP', 2)


def test_loops_are_those_of_many_equal_blocks():
    options = {'widths': (8, 8), 'depths': (6, 7), 'group_size': 4, 'scan': True}
    network = hk.transform(lambda x: models.NFNet(5, **options)(x, True)['logits'])
    x, key = jnp.zeros((2, 8, 8, 3)), jax.random.key(0)
    program = str(jax.make_jaxpr(network.apply)(jax.eval_shape(network.init, key, x), key, x))
    # The first block of a stage is another; of the others there are 5 and 6.
    assert program.count(' scan[') == 1


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=() if name in ('NFNet-F0', 'ResNet-50') else pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_scan_and_remat_change_the_program_but_not_the_parameters(name, any_loop):
    inits, applies = [], []
    for chosen in (False, True):
        network, x = tiny(name, scan=chosen, remat=chosen)
        inits.append(str(jax.make_jaxpr(network.init)(jax.random.key(1), x)))
        params, state = jax.eval_shape(network.init, jax.random.key(1), x)
        bfloats = x.astype(jnp.bfloat16)
        apply = jax.make_jaxpr(network.apply, return_shape=True)
        program, shapes = apply(params, state, jax.random.key(2), bfloats)
        applies.append(shapes)
        assert (' scan[' in str(program)) == ('remat' in str(program)) == chosen
    assert inits[0] == inits[1]  # The same values from the same seed.
    assert applies[0] == applies[1]


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('ResNet-8, one stage', {'scan': True, 'remat': True}),
        *(
            pytest.param(name, options, marks=pytest.mark.slow)
            for name in FAMILIES
            for options in ({'remat': True}, {'scan': True}, {'scan': True, 'remat': True})
        ),
    ],
)
def test_scan_and_remat_compute_the_same(name, options, random_variables, any_loop):
    """Loss, metrics, running statistics and gradients; with the same branches dropped."""
    results = []
    for given in ({}, options):
        network, x = tiny(name, **given)
        params, state = random_variables(network, x)

        def loss(params, network=network, state=state, x=x):
            out, new_state = network.apply(params, state, jax.random.key(2), x)
            return jnp.sum(jnp.square(out['logits'])), (out['signal'], new_state)

        results.append(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(a).max())


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
