"""What every transformation of ours must stand: all that optax and JAX do to a transformation."""

import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfnets_jax import adaptive_grad_clip, optimizers, unit_axes

PARAMS = {
    'Net/~/conv': {'w': (3, 3, 2, 4), 'gain': (4,), 'skip': ()},
    'Net/~/linear': {'w': (4, 3), 'b': (3,)},
}
PARAMS = jax.tree.map(
    lambda shape: np.asarray(np.random.RandomState(len(shape)).standard_normal(shape), np.float32),
    PARAMS,
    is_leaf=lambda x: isinstance(x, tuple),
)
GRADS = jax.tree.map(lambda p: np.float32(0.3) * np.cos(7 * p), PARAMS)
PARAMS, GRADS = jax.device_put((PARAMS, GRADS))
BODY = {'Net/~/conv': True, 'Net/~/linear': {'w': False, 'b': True}}


def from_config(**changes):
    """The whole chain of the runner. It needs the names of the parameters, so no empty ones."""
    config = optimizers.default_config() | changes
    config['clip'] = optimizers.default_config()['clip'] | changes.get('clip', {})
    return optimizers.create(
        config, PARAMS, batch_size=256, steps_per_epoch=2, total_steps=8
    ).transformation


FROZEN = [{'match': 'Net/~/conv/.*', 'freeze': True}, {'match': '.*'}]
OURS = {
    'agc': lambda: adaptive_grad_clip(0.01),
    'agc by schedule': lambda: adaptive_grad_clip(optax.linear_schedule(0.1, 0.01, 4)),
    'agc by leaf': lambda: adaptive_grad_clip(clipping_by_leaf=lambda path, leaf: 0.02),
    'agc with eps 0': lambda: adaptive_grad_clip(0.01, 0.0, axis=unit_axes.hwio),
    'agc with a mask': lambda: adaptive_grad_clip(0.01, mask=BODY),
    'agc with a mask of functions': lambda: adaptive_grad_clip(0.01, mask=lambda params: BODY),
    'clip by global norm': lambda: optimizers.clip_by_norm(0.1, per_leaf=False),
    'clip by leaf norm': lambda: optimizers.clip_by_norm(0.1, per_leaf=True),
    'runner, sgd': lambda: from_config(),
    'runner, adam': lambda: from_config(name='adam'),
    'runner, adamw': lambda: from_config(name='adamw'),
    'runner, global norm': lambda: from_config(clip={'name': 'global_norm'}),
    'runner, leaf norm': lambda: from_config(clip={'name': 'leaf_norm'}),
    'runner, frozen': lambda: from_config(groups=FROZEN),
}
# The parts of these are in the others.
SLOW = {'agc with a mask', 'runner, adam', 'runner, global norm', 'runner, leaf norm'}
every = pytest.mark.parametrize(
    'name', [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in OURS]
)


def cast(tree, dtype):
    return jax.tree.map(lambda x: np.asarray(x).astype(jnp.dtype(dtype)), tree)


def equal(ours, expected):
    chex.assert_trees_all_close(ours, expected, rtol=1e-5, atol=1e-7)


@functools.cache
def transformation(name):
    """One of `OURS` that is compiled once for all tests, and tests do not wrap."""
    tx = OURS[name]()
    return optax.GradientTransformation(tx.init, jax.jit(tx.update))


@functools.cache
def reference(name):
    """Updates and state after one update."""
    tx = transformation(name)
    return tx.update(GRADS, tx.init(PARAMS), PARAMS)


@every
def test_tree_map_params(name):
    """The structure of the state does not depend on the parameters."""
    tx = optax.chain(OURS[name](), optax.adamw(1e-3))
    state = tx.init(PARAMS)
    same = optax.tree_map_params(tx, lambda value: value + 0, state)
    chex.assert_trees_all_equal(same, state)
    # As they are used: for shardings of a state, where those of the parameters are known.
    kinds = optax.tree_map_params(
        tx, lambda _: 'param', state, transform_non_params=lambda _: 'other'
    )
    assert jax.tree.structure(kinds) == jax.tree.structure(state)
    moments = optax.tree.get_all_with_path(kinds, 'mu')[-1][1]
    assert set(jax.tree.leaves(moments)) == {'param'}
    fractions = [kind for _, kind in optax.tree.get_all_with_path(kinds, 'clipped_fraction')]
    assert set(fractions) == {'other'}


@every
def test_a_state_is_like_the_one_before(name):
    """In structure, shapes and dtypes: it can be carried through a scan, and donated."""
    tx = OURS[name]()
    state = tx.init(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, reference(name)[1])
    shapes = jax.eval_shape(tx.init, jax.eval_shape(lambda: PARAMS))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, state)
    # A buffer that two leaves share cannot be donated.
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    updates, _ = step(jax.tree.map(jnp.copy, GRADS), state, PARAMS)
    equal(updates, reference(name)[0])


@every
def test_pickled(name):
    tx = transformation(name)
    updates, state = reference(name)
    again = pickle.loads(pickle.dumps(jax.device_get(state)))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    results = [tx.update(GRADS, s, PARAMS) for s in (again, state)]
    chex.assert_trees_all_equal(*results)


@every
def test_dtypes_are_kept_without_implicit_promotion(name):
    tx = OURS[name]()
    for dtype in ('bfloat16', 'float16', 'float32'):
        grads, params = cast(GRADS, dtype), cast(PARAMS, dtype)
        # optax keeps the second moments of Adam in this dtype, where they are coarse; those of
        # float32 are the reference.
        shapes_alone = 'adam' in name or dtype == 'float32'
        update = (
            functools.partial(jax.eval_shape, tx.update) if shapes_alone else jax.jit(tx.update)
        )
        with jax.numpy_dtype_promotion('strict'):
            before = tx.init(params)
            updates, state = update(grads, before, params)
        chex.assert_trees_all_equal_dtypes(updates, grads)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
        if shapes_alone:
            continue
        tolerance = {'bfloat16': 0.05, 'float16': 0.01}[dtype]
        chex.assert_trees_all_close(
            cast(updates, 'float32'),
            reference(name)[0],
            rtol=tolerance,
            atol=tolerance * 0.1,
        )


@every
@pytest.mark.parametrize('wrap', ['masked', 'partition', 'label without leaf'])
def test_wrapped_for_part_of_the_parameters(name, wrap):
    tx = OURS[name]()
    if 'mask' in name or name.startswith('runner'):
        selected = jax.tree.map(lambda _: True, PARAMS)
    else:
        selected = {'Net/~/conv': True, 'Net/~/linear': {'w': False, 'b': False}}
    selected = jax.tree.broadcast(selected, PARAMS)
    labels = jax.tree.map(lambda yes: 'ours' if yes else 'rest', selected)
    match wrap:
        case 'masked':
            wrapped = optax.masked(tx, selected)
        case 'partition':
            wrapped = optax.partition({'ours': tx, 'rest': optax.identity()}, labels)
        case 'label without leaf':
            if 'mask' in name or name.startswith('runner'):
                pytest.skip('these name the parameters that they expect')
            everything = jax.tree.map(lambda _: 'rest', PARAMS)
            wrapped = optax.partition({'ours': tx, 'rest': optax.identity()}, everything)
    state = wrapped.init(PARAMS)
    updates, new = jax.jit(wrapped.update)(GRADS, state, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    optax.tree_map_params(wrapped, lambda x: x, state)
    if wrap != 'label without leaf':
        assert float(optax.tree.get(new, 'clipped_fraction')) > 0
    chex.assert_tree_all_finite(updates)


@every
def test_multi_steps_and_apply_if_finite(name):
    tx = optax.MultiSteps(OURS[name](), 2)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    _, state = update(GRADS, state, PARAMS)
    updates, state = update(GRADS, state, PARAMS)
    equal(updates, reference(name)[0])
    tx = optax.apply_if_finite(OURS[name](), 3)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    bad = jax.tree.map(lambda g: np.where(np.arange(g.size).reshape(g.shape), g, np.nan), GRADS)
    bad = cast(bad, 'float32')
    updates, state = update(bad, state, PARAMS)
    chex.assert_trees_all_equal(updates, jax.tree.map(np.zeros_like, GRADS))
    updates, state = update(GRADS, state, PARAMS)
    equal(updates, reference(name)[0])


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_inject_hyperparams(dtype):
    """Hyperparameters become arrays of the parameters' dtype."""
    grads, params = cast(GRADS, dtype), cast(PARAMS, dtype)
    for inner, number in (
        (adaptive_grad_clip, {'clipping': 0.01}),
        (functools.partial(optimizers.clip_by_norm, per_leaf=True), {'max_norm': 0.1}),
    ):
        tx = optax.inject_hyperparams(inner)(**number)
        state = tx.init(params)
        with jax.numpy_dtype_promotion('strict'):
            updates, new = jax.jit(tx.update)(grads, state, params)
        chex.assert_trees_all_equal_dtypes(updates, grads)
        plain = inner(**number)
        expected, _ = jax.jit(plain.update)(grads, plain.init(params), params)
        tolerance = 2**-7 if dtype == 'bfloat16' else 1e-5
        chex.assert_trees_all_close(
            cast(updates, 'float32'), cast(expected, 'float32'), rtol=tolerance
        )
        chex.assert_trees_all_equal_structs(optax.tree_map_params(tx, lambda x: x, new), new)


def test_mixed_dtypes_under_strict_promotion():
    with jax.enable_x64(True), jax.numpy_dtype_promotion('strict'):
        dtypes = ['float16', 'bfloat16', 'float32', 'float64', 'complex64', 'complex128']
        weights = {dtype: jnp.ones((4, 2), dtype) for dtype in dtypes}
        # Gradients of another dtype than their parameters, in both directions.
        grads = weights | {'bfloat16': jnp.ones((4, 2)), 'float64': jnp.ones((4, 2), 'float32')}
        extra = {
            'int': jnp.ones((4, 2), 'int32'),
            'bool': jnp.ones(3, bool),
            'none': None,
            'masked': optax.MaskedNode(),
            'empty': jnp.ones((0, 2), 'bfloat16'),
            'number': 1.0,
        }
        tx = adaptive_grad_clip(optax.linear_schedule(0.25, 0.0, 2), 1e-3)
        state = tx.init(weights | extra)
        updates, state = jax.jit(tx.update)(grads | extra, state, weights | extra)
    for dtype, grad in grads.items():
        assert updates[dtype].dtype == grad.dtype
        np.testing.assert_allclose(np.asarray(updates[dtype], np.complex128), 0.25)
    for name in ('int', 'bool', 'empty'):
        chex.assert_trees_all_equal(updates[name], extra[name])
        assert updates[name].dtype == extra[name].dtype
    assert updates['none'] is None
    assert updates['masked'] == optax.MaskedNode()
    assert state.clipped_fraction == 1


@pytest.mark.parametrize('eps', [1e-3, 0.0])
def test_no_conditional_is_compiled(eps):
    tx = adaptive_grad_clip(0.01, eps)
    compiled = jax.jit(tx.update).lower(GRADS, tx.init(PARAMS), PARAMS).compile().as_text()
    assert ' reduce(' in compiled
    assert ' conditional(' not in compiled
    assert ' while(' not in compiled
