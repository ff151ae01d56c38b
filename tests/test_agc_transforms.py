"""Adaptive gradient clipping inside what optax and JAX put around it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nfnets_jax import adaptive_grad_clip, unit_axes

PARAMS = {
    'conv': {'w': (3, 3, 4, 8), 'b': (8,)},
    'linear': {'w': (8, 12), 'b': (12,)},
    'gain': (),
}
PARAMS = jax.tree.map(
    lambda shape: jax.device_put(
        np.asarray(np.random.RandomState(len(shape)).standard_normal(shape), np.float32)
    ),
    PARAMS,
    is_leaf=lambda x: isinstance(x, tuple),
)


def gradients(seed=0):
    """Some units above the bound and some below."""
    random = np.random.RandomState(seed)
    return jax.tree.map(
        lambda p: jax.device_put(
            np.asarray(random.standard_normal(p.shape), np.float32)
            * np.asarray(10.0 ** random.uniform(-4, 0, p.shape[-1:]), np.float32)
        ),
        PARAMS,
    )


GRADS = gradients()
CLIPPED = jax.jit(optax.adaptive_grad_clip(0.01).update)(GRADS, optax.EmptyState(), PARAMS)[0]


def fraction(state):
    return float(optax.tree.get(state, 'clipped_fraction'))


@jax.jit
def clip(grads, params, eps=1e-3):
    return adaptive_grad_clip(0.01, eps).update(grads, None, params)


def assert_updates(tx, expected=CLIPPED, grads=GRADS, params=PARAMS):
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-7)
    return state


def test_the_gradients_above_test_something():
    state = assert_updates(adaptive_grad_clip(0.01))
    assert 0.2 < fraction(state) < 0.8


class TestOptax:
    def test_inject_hyperparams(self):
        tx = optax.inject_hyperparams(adaptive_grad_clip, static_args=('axis', 'mask'))(
            0.01, axis=unit_axes.by_rank
        )
        state = tx.init(PARAMS)
        update = jax.jit(tx.update)
        updates, state = update(GRADS, state, PARAMS)
        chex.assert_trees_all_close(updates, CLIPPED, rtol=1e-5, atol=1e-7)
        state.hyperparams['clipping'] = jnp.asarray(1e9)
        updates, state = update(GRADS, state, PARAMS)
        chex.assert_trees_all_equal(updates, GRADS)
        assert fraction(state) == 0

    def test_inject_hyperparams_with_a_schedule(self):
        tx = optax.inject_hyperparams(adaptive_grad_clip)(optax.constant_schedule(0.01))
        assert_updates(tx)

    def test_masked(self):
        expected = CLIPPED | {'linear': GRADS['linear']}
        mask = {'conv': True, 'linear': False, 'gain': True}
        ours = assert_updates(adaptive_grad_clip(0.01, mask=mask), expected)
        theirs = assert_updates(optax.masked(adaptive_grad_clip(0.01), mask), expected)
        assert fraction(ours) == fraction(theirs)
        # Groups: conv, gain, linear.
        chex.assert_trees_all_equal(
            *(optax.tree.get(state, 'clipped_fraction_by_group') for state in (ours, theirs))
        )
        assert optax.tree.get(theirs, 'clipped_fraction_by_group')[2] == 0

    def test_partition(self):
        tx = optax.partition(
            {
                'clip': adaptive_grad_clip(0.01),
                'hard': adaptive_grad_clip(0.001),
                'not': optax.identity(),
            },
            {'conv': 'clip', 'linear': {'w': 'not', 'b': 'hard'}, 'gain': 'clip'},
        )
        hard = optax.adaptive_grad_clip(0.001)
        update = jax.jit(hard.update)
        bias, _ = update(GRADS['linear']['b'], optax.EmptyState(), PARAMS['linear']['b'])
        state = assert_updates(tx, CLIPPED | {'linear': {'w': GRADS['linear']['w'], 'b': bias}})
        assert len(optax.tree.get_all_with_path(state, 'clipped_fraction')) == 2

    def test_partition_with_a_label_that_no_leaf_has(self):
        tx = optax.partition({'a': adaptive_grad_clip(0.01), 'b': adaptive_grad_clip(1.0)}, 'a')
        assert_updates(tx)

    def test_apply_if_finite(self):
        tx = optax.apply_if_finite(adaptive_grad_clip(0.01), 3)
        state = tx.init(PARAMS)
        bad = GRADS | {'gain': jnp.asarray(jnp.nan)}
        updates, state = jax.jit(tx.update)(bad, state, PARAMS)
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
        assert state.total_notfinite == 1
        updates, state = jax.jit(tx.update)(GRADS, state, PARAMS)
        chex.assert_trees_all_close(updates, CLIPPED, rtol=1e-5, atol=1e-7)

    def test_multi_steps(self):
        tx = optax.MultiSteps(adaptive_grad_clip(0.01), 2)
        state = tx.init(PARAMS)
        update = jax.jit(tx.update)
        updates, state = update(jax.tree.map(lambda g: 2 * g, GRADS), state, PARAMS)
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
        updates, state = update(jax.tree.map(jnp.zeros_like, GRADS), state, PARAMS)
        chex.assert_trees_all_close(updates, CLIPPED, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize('place', [0, 1, 2])
    def test_chain(self, place):
        links = [optax.add_decayed_weights(1e-3), optax.trace(0.9, nesterov=True)]
        ours = optax.chain(*links[:place], adaptive_grad_clip(0.01), *links[place:])
        theirs = optax.chain(*links[:place], optax.adaptive_grad_clip(0.01), *links[place:])
        states = [tx.init(PARAMS) for tx in (ours, theirs)]
        updates = [jax.jit(tx.update) for tx in (ours, theirs)]
        for seed in range(3):
            results = [
                update(gradients(seed), state, PARAMS)
                for update, state in zip(updates, states, strict=True)
            ]
            states = [state for _, state in results]
            chex.assert_trees_all_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-6)
        assert 0 < fraction(states[0]) < 1


class TestJax:
    def test_vmap_over_an_ensemble(self):
        plain = jax.device_get((PARAMS, GRADS))
        params = jax.tree.map(lambda p: np.stack([p, 2 * p, p * 0]), plain[0])
        grads = jax.tree.map(lambda g: np.stack([g, g, g * np.float32(1e30)]), plain[1])
        tx = adaptive_grad_clip(0.01)
        updates, state = jax.jit(jax.vmap(tx.update))(grads, jax.vmap(tx.init)(params), params)
        assert state.clipped_fraction.shape == (3,)
        updates = jax.device_get(updates)
        for i in range(3):
            member = [jax.tree.map(lambda x, i=i: x[i], tree) for tree in (updates, grads, params)]
            alone, alone_state = clip(member[1], member[2])
            chex.assert_trees_all_close(member[0], alone, rtol=1e-6)
            np.testing.assert_allclose(state.clipped_fraction[i], alone_state.clipped_fraction)

    def test_scan_with_donation(self):
        tx = adaptive_grad_clip(optax.linear_schedule(0.1, 0.01, 3))

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def run(params, state):
            def step(carry, seed):
                params, state = carry
                updates, state = tx.update(GRADS, state, params)
                return (optax.apply_updates(params, updates), state), state.clipped_fraction

            return jax.lax.scan(step, (params, state), jnp.arange(4))

        params = jax.tree.map(jnp.copy, PARAMS)
        (_, state), fractions = run(params, tx.init(params))
        assert state.step == 4
        assert params['conv']['w'].is_deleted()
        assert fractions[0] < fractions[-1]

    def test_checkpoint_and_gradient_of_the_update(self):
        """A step of training as part of a loss, as in meta-learning."""
        tx = adaptive_grad_clip(0.01)

        def after_a_step(params, tx):
            updates, _ = tx.update(GRADS, tx.init(params), params)
            moved = optax.apply_updates(params, updates)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(moved))

        inner = jax.checkpoint(functools.partial(after_a_step, tx=tx))
        theirs = functools.partial(after_a_step, tx=optax.adaptive_grad_clip(0.01))
        grads, expected = (jax.jit(jax.grad(f))(PARAMS) for f in (inner, theirs))
        chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-6)

    def test_pmap(self):
        tx = adaptive_grad_clip(0.01)

        def step(grads, state, params):
            return tx.update(jax.lax.pmean(grads, 'devices'), state, params)

        # Four devices whose gradients are 1, 2, 3 and -2 times GRADS: the mean is GRADS.
        weights = np.array([1, 2, 3, -2], np.float32)
        shards = jax.tree.map(lambda g: np.einsum('d,...->d...', weights, g), GRADS)
        mapped = jax.pmap(step, 'devices', in_axes=(0, None, None), out_axes=None)
        updates, state = mapped(shards, tx.init(PARAMS), PARAMS)
        chex.assert_trees_all_close(updates, CLIPPED, rtol=1e-5, atol=1e-7)
        assert 0 < fraction(state) < 1

    @pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
    def test_gradients_of_another_dtype_than_parameters(self, dtype):
        low = jax.tree.map(lambda g: np.asarray(g).astype(jnp.dtype(dtype)), GRADS)
        updates, _ = clip(low, PARAMS)
        chex.assert_trees_all_equal_dtypes(updates, low)
        wide = jax.tree.map(lambda u: np.asarray(u).astype(np.float32), updates)
        chex.assert_trees_all_close(wide, CLIPPED, rtol=0.02, atol=1e-6)


SPECS = {
    'outputs': {
        'conv': {'w': P(None, None, None, 'model'), 'b': P('model')},
        'linear': {'w': P(None, 'model'), 'b': P('model')},
        'gain': P(),
    },
    'inputs': {
        'conv': {'w': P(None, None, 'model'), 'b': P()},
        'linear': {'w': P('model', None), 'b': P()},
        'gain': P(),
    },
    'both, and a prefix': {
        'conv': {'w': P(None, None, 'model', 'data'), 'b': P('data')},
        'linear': P(('data', 'model')),
        'gain': P(),
    },
}


# The last splits outputs as well as inputs, the second splits units.
@pytest.mark.parametrize(
    'specs', [pytest.param('outputs', marks=pytest.mark.slow), 'inputs', 'both, and a prefix']
)
class TestSharded:
    """Whole units are clipped, whichever device holds what."""

    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ('data', 'model'))

    @pytest.fixture(params=[AxisType.Auto, AxisType.Explicit])
    def placed(self, request, specs):
        """Parameters and gradients; in a mesh of explicit axes shardings are part of the types."""
        mesh = jax.make_mesh((2, 2), ('data', 'model'), axis_types=(request.param,) * 2)
        full = jax.tree.broadcast(SPECS[specs], PARAMS)
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), full)
        return jax.device_put((PARAMS, GRADS), (shardings, shardings))

    def test_jit(self, placed):
        params, grads = placed
        state = assert_updates(adaptive_grad_clip(0.01), grads=grads, params=params)
        chex.assert_trees_all_close(state, clip(GRADS, PARAMS)[1])

    @pytest.mark.parametrize('check_vma', [True, False])
    def test_shard_map(self, specs, check_vma):
        def update(grads, params, eps):
            tx = adaptive_grad_clip(0.01, eps, specs=SPECS[specs])
            return tx.update(grads, tx.init(params), params)

        mapped = jax.jit(
            jax.shard_map(
                update,
                mesh=self.mesh,
                in_specs=(SPECS[specs], SPECS[specs], P()),
                out_specs=(SPECS[specs], P()),
                check_vma=check_vma,
            )
        )
        for scale, eps in ((1.0, 1e-3), (1e-30, 0.0), (1e30, 0.0)):
            scaled = [
                jax.tree.map(lambda x, s=scale: np.asarray(x) * np.float32(s), tree)
                for tree in (GRADS, PARAMS)
            ]
            updates, state = mapped(*scaled, np.float32(eps))
            expected, expected_state = clip(*scaled, np.float32(eps))
            chex.assert_trees_all_close(updates, expected, rtol=1e-5)
            chex.assert_trees_all_close(state, expected_state)

    def test_specs_do_nothing_outside_shard_map(self, specs):
        assert_updates(adaptive_grad_clip(0.01, specs=SPECS[specs]))


def test_rule_sees_the_whole_leaf_in_shard_map():
    """A device's part [1, 12] looks like a vector; the leaf [2, 12] is none."""
    mesh = Mesh(np.array(jax.devices()[:2]), ('model',))
    params, grads = jnp.ones((2, 12)), jax.random.normal(jax.random.key(0), (2, 12))
    tx = adaptive_grad_clip(0.01, specs=P('model'))
    mapped = jax.shard_map(
        lambda g, p: tx.update(g, tx.init(p), p),
        mesh=mesh, in_specs=(P('model'), P('model')), out_specs=(P('model'), P()),
    )  # fmt: skip
    updates, _ = jax.jit(mapped)(grads, params)
    expected, _ = clip(grads, params)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


def test_bad_specs():
    mesh = Mesh(np.array(jax.devices()[:2]), ('model',))

    def update(specs):
        tx = adaptive_grad_clip(0.01, specs=specs)
        return jax.shard_map(
            lambda p: tx.update(p, tx.init(p), p)[0],
            mesh=mesh,
            in_specs=P('model'),
            out_specs=P('model'),
        )({'w': jnp.ones((2, 12))})

    with pytest.raises(ValueError, match=r"w: specs names the mesh axis 'modle'; .*'model'"):
        update(P('modle'))
    with pytest.raises(
        ValueError, match='w: .* in specs has more entries than the leaf has axes, 2'
    ):
        update(P(None, None, 'model'))
