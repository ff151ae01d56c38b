"""Adaptive gradient clipping: its numbers, its rules, its report, its errors."""

import functools
import itertools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfnets_jax import adaptive_grad_clip, describe_clipping, unit_axes
from nfnets_jax.agc import clipping_groups, gradient_to_weight

# Shapes of every rank that optax's rule knows, ones with axes of length 1 included.
SHAPES = [(), (1,), (7,), (1, 6), (6, 1), (5, 4), (1, 1, 8), (4, 2, 3), (1, 1, 4, 6), (1, 1, 1, 6)]
SHAPES += [(3, 3, 1, 8), (3, 3, 4, 6), (2, 3, 2, 3, 4), (1, 1, 1, 1, 5)]


def rank_axes(shape):
    """Optax's rule, said again."""
    if sum(n > 1 for n in shape) <= 1:
        return tuple(range(len(shape)))
    return (0,) if len(shape) <= 3 else tuple(range(len(shape) - 1))


def formula(grad, param, clipping=0.01, eps=1e-3, axes=None):
    """Equation 3 of the paper in float64."""
    wide = np.complex128 if np.iscomplexobj(grad) else np.float64
    grad, param = np.asarray(grad, wide), np.asarray(param, wide)
    axes = rank_axes(grad.shape) if axes is None else axes
    # Scaled: squares of 1e-300 underflow in float64 as well.
    scale = [np.max(np.abs(x), initial=0) or 1 for x in (grad, param)]
    norms = [
        s * np.sqrt(np.sum(np.abs(x / s) ** 2, axis=axes, keepdims=True))
        for x, s in zip((grad, param), scale, strict=True)
    ]
    bound = clipping * np.maximum(norms[1], eps)
    return np.where(norms[0] > bound, grad * (bound / np.where(norms[0] > 0, norms[0], 1)), grad)


def normal(shape, seed=0, scale=1.0, dtype=np.float32):
    x = scale * np.random.RandomState(seed).standard_normal(shape)
    return jax.device_put(np.asarray(x, jnp.dtype(dtype)))  # jnp.asarray compiles a copy.


def ones(shape, dtype=np.float32):
    return jax.device_put(np.ones(shape, dtype))


def zeros(shape):
    return jax.device_put(np.zeros(shape, np.float32))


def clip(grads, params, *args, **kwargs):
    tx = adaptive_grad_clip(*args, **kwargs)
    return jax.jit(tx.update)(grads, tx.init(params), params)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_equals_optax(dtype):
    @jax.jit
    def both(grads, params, clipping):
        ours, _ = adaptive_grad_clip(clipping).update(grads, None, params)
        # Optax in float32 throughout: it rounds its norms to the leaves' dtype.
        wide = [jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in (grads, params)]
        theirs, _ = optax.adaptive_grad_clip(clipping).update(wide[0], None, wide[1])
        return ours, theirs

    params = [normal(shape, 1, 1, dtype) for shape in SHAPES]
    tolerance = {'float32': 1e-6, 'bfloat16': 2**-8, 'float16': 2**-10}[dtype]
    # From far below to far above the bound.
    for clipping, scale in itertools.product((0.0, 0.01, 1.0), 10.0 ** np.arange(-4, 2)):
        grads = [normal(shape, 2, scale, dtype) for shape in SHAPES]
        ours, theirs = both(grads, params, clipping)
        for our, their, grad in zip(ours, theirs, grads, strict=True):
            assert our.dtype == grad.dtype
            ours_wide = np.asarray(our).astype(np.float32)
            np.testing.assert_allclose(ours_wide, their, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize('axis', [0, -1, (0, 2), (), (-4, 3)])
def test_equals_optax_on_given_axes(axis):
    params, grads = normal((3, 2, 4, 5), 1), normal((3, 2, 4, 5), 2, 0.1)
    ours, _ = clip(grads, params, 0.1, 1e-3, axis)
    theirs, _ = optax.adaptive_grad_clip(0.1, 1e-3, axis).update(grads, optax.EmptyState(), params)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)


@jax.jit
def update(grads, params, eps):
    return adaptive_grad_clip(0.01, eps).update(grads, None, params)[0]


def test_constants_are_not_folded_out_of_range():
    for scale in (1e-30, 1e30):
        grads, params = normal((4, 3), 1, scale), normal((4, 3), 2, scale)
        ours = jax.jit(functools.partial(update.__wrapped__, grads, params, 0.0))()
        np.testing.assert_allclose(ours, formula(grads, params, 0.01, 0.0), rtol=1e-5)


@pytest.mark.parametrize('scale', [1e-38, 1e-30, 1e-19, 1e-10, 1e10, 1e19, 1e30, 1e36])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_norms_at_any_scale(scale, dtype):
    grads = {'w': normal((3, 3, 4, 6), 1, scale, dtype), 'b': normal((9,), 2, scale, dtype)}
    params = {'w': normal((3, 3, 4, 6), 3, scale, dtype), 'b': normal((9,), 4, 1, dtype)}
    for eps in (0.0, 1e-30, 1e-3):
        ours = update(grads, params, eps)
        for name in grads:
            expected = formula(grads[name], params[name], 0.01, eps)
            got = np.asarray(ours[name], np.float64)
            # What is below the smallest normal number may round to zero.
            np.testing.assert_allclose(
                got, expected, rtol=1e-5 if dtype == 'float32' else 2**-7, atol=1.2e-38
            )


def test_scales_may_differ_between_units_of_one_leaf():
    scales = 10.0 ** np.array([-36, -30, -20, -10, 0, 10, 20, 30, 36])
    grads = jnp.asarray(normal((3, 3, 4, 9), 1) * scales, jnp.float32)
    params = jnp.asarray(normal((3, 3, 4, 9), 2) * scales[::-1], jnp.float32)
    ours, _ = clip(grads, params, 0.01, 0.0)
    np.testing.assert_allclose(ours, formula(grads, params, 0.01, 0.0), rtol=1e-5, atol=1.2e-38)


def test_float16_norm_beyond_its_range():
    grads, params = jnp.full((64, 4), 6e4, jnp.float16), jnp.full((64, 4), 6e4, jnp.float16)
    ours, _ = clip(grads, params, 0.5)
    np.testing.assert_allclose(np.asarray(ours, np.float32), 3e4)


def test_float64_keeps_its_precision():
    with jax.enable_x64(True):
        for scale in (1e-200, 1.0, 1e200):
            grads, params = (normal((4, 3), seed, scale, np.float64) for seed in (1, 2))
            ours, state = clip(grads, params, 0.3, 0.0)
            assert ours.dtype == np.float64
            np.testing.assert_allclose(ours, formula(grads, params, 0.3, 0.0), rtol=1e-14)
            assert state.clipped_fraction.dtype == np.float32


def test_complex_leaves():
    grads = normal((5, 4), 1) + 1j * normal((5, 4), 2)
    params = normal((5, 4), 3) + 1j * normal((5, 4), 4)
    for scale in (1e-25, 1.0, 1e25):
        ours, _ = clip(grads * scale, params, 0.1)
        assert ours.dtype == np.complex64
        np.testing.assert_allclose(ours, formula(grads * scale, params, 0.1), rtol=1e-5)


def test_within_the_bound_bit_for_bit():
    grads = {
        'w': normal((6, 5), 1, 1e-4),
        'zero': zeros((6, 5)),
        'sign': jnp.array([-0.0, 1e-9]),
    }
    params = {'w': ones((6, 5)), 'zero': zeros((6, 5)), 'sign': ones(2)}
    ours, state = clip(grads, params)
    chex.assert_trees_all_equal(ours, grads)
    assert np.signbit(ours['sign'][0])
    assert state.clipped_fraction == 0


def test_zero_parameters_move_at_eps():
    ours, _ = clip(ones(4), zeros(4), 0.01, 0.5)
    np.testing.assert_allclose(jnp.linalg.norm(ours), 0.005, rtol=1e-6)
    ours, _ = clip(ones(4), zeros(4), 0.01, 0.0)
    np.testing.assert_array_equal(ours, 0)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_not_finite_stays_in_its_unit(bad):
    params = {'a': normal((5, 4), 1), 'b': normal((5, 4), 2), 'c': normal((5, 4), 3)}
    grads = {'a': normal((5, 4), 4), 'b': normal((5, 4), 5), 'c': normal((5, 4), 6, 1e-5)}
    clean, _ = clip(grads, params)
    ours, state = clip(grads | {'a': grads['a'].at[2, 1].set(bad)}, params)
    assert not np.isfinite(ours['a'][2, 1])
    others = np.delete(np.arange(4), 1)
    np.testing.assert_array_equal(ours['a'][:, others], clean['a'][:, others])
    chex.assert_trees_all_equal(ours['b'], clean['b'])
    chex.assert_trees_all_equal(ours['c'], clean['c'])
    np.testing.assert_allclose(state.clipped_fraction, 8 / 12)


def test_leaves_that_are_no_gradients_pass():
    key = jax.random.key(0)
    params = {
        'w': ones((4, 2)),
        'none': None,
        'masked': optax.MaskedNode(),
        'empty': ones((0, 3)),
    }
    params |= {'frozen': ones(3), 'steps': jnp.arange(3), 'key': key, 'number': 2.0}
    params['function'] = jax.nn.relu  # an Equinox module that was not filtered
    grads = {
        'w': ones((4, 2)),
        'none': None,
        'masked': optax.MaskedNode(),
        'empty': ones((0, 3)),
    }
    grads |= {'frozen': None, 'steps': np.zeros(3, jax.dtypes.float0), 'key': key, 'number': 5.0}
    grads['function'] = None
    tx = adaptive_grad_clip(0.01)
    ours, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(ours['w'], 0.01, rtol=1e-6)
    np.testing.assert_allclose(ours['number'], 0.02, rtol=1e-6)
    assert ours['none'] is None
    assert ours['frozen'] is None
    assert ours['steps'] is grads['steps']
    assert ours['key'] is key
    assert ours['masked'] == optax.MaskedNode()
    assert ours['empty'].shape == (0, 3)
    assert state.clipped_fraction == 1


def test_only_empty_leaves():
    tx, params = adaptive_grad_clip(), {'w': ones((0, 3))}
    updates, state = tx.update(params, tx.init(params), params)
    assert updates['w'].shape == (0, 3)
    assert state.clipped_fraction == 0


def test_empty_tree():
    tx = adaptive_grad_clip()
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert state.clipped_fraction == 0


def test_is_differentiable_at_zero_too():
    def loss(grads):
        clipped, _ = clip(grads, ones((3, 2)), 0.1)
        return jnp.sum(clipped[:, 0] * jnp.arange(3.0))

    gradient = jax.jit(jax.grad(loss))
    for grads in (zeros((3, 2)), ones((3, 2)), jnp.full((3, 2), 1e25)):
        assert np.all(np.isfinite(gradient(grads)))
    # Far over the bound only the direction counts: moving along it changes nothing.
    along = np.sum(gradient(ones((3, 2))))
    np.testing.assert_allclose(along, 0, atol=1e-7)


class TestArguments:
    params = {'head': {'w': ones((4, 3)), 'b': ones(3)}, 'body': {'w': ones((4, 3))}}
    grads = jax.tree.map(lambda p: ones(p.shape), params)

    def norms(self, *args, **kwargs):
        clipped, _ = clip(self.grads, self.params, *args, **kwargs)
        return {
            '/'.join(str(k.key) for k in path): float(jnp.linalg.norm(leaf))
            for path, leaf in jax.tree_util.tree_flatten_with_path(clipped)[0]
        }

    def test_clipping_by_leaf(self):
        seen = {}

        def ratio(path, leaf):
            seen[path] = leaf.shape, leaf.dtype
            return {'head/w': None, 'head/b': 0.5}.get(path, 0.25)

        norms = self.norms(clipping_by_leaf=ratio)
        assert seen == {
            'body/w': ((4, 3), np.float32),
            'head/w': ((4, 3), np.float32),
            'head/b': ((3,), np.float32),
        }
        np.testing.assert_allclose(norms['head/w'], 12**0.5, rtol=1e-6)
        np.testing.assert_allclose(norms['head/b'], 0.5 * 3**0.5, rtol=1e-6)
        np.testing.assert_allclose(norms['body/w'], 0.25 * 12**0.5, rtol=1e-6)

    def test_a_function_as_clipping_still_works_with_a_warning(self):
        def ratio(path, leaf):
            return None if path == 'head/w' else 0.25

        expected = self.norms(clipping_by_leaf=ratio)
        with pytest.warns(DeprecationWarning, match='pass it as clipping_by_leaf') as caught:
            tables = [describe_clipping(self.params, ratio)]
        tables.append(describe_clipping(self.params, clipping_by_leaf=ratio))
        assert tables[0] == tables[1]
        (warning,) = caught
        assert '\n' not in str(warning.message)
        assert pathlib.Path(warning.filename) == pathlib.Path(__file__)  # the line of the caller
        with pytest.warns(DeprecationWarning, match='pass it as clipping_by_leaf'):
            assert self.norms(ratio) == expected

    def test_clipping_by_step(self):
        tx = adaptive_grad_clip(optax.linear_schedule(1.0, 0.0, 4))
        state = tx.init(self.params)
        update = jax.jit(tx.update)
        for step in range(4):
            clipped, state = update(self.grads, state, self.params)
            np.testing.assert_allclose(clipped['head']['b'], 1 - step / 4, rtol=1e-6)
        assert state.step == 4

    def test_schedule_with_defaults(self):
        norms = self.norms(lambda step, ratio=0.5: ratio + 0 * step)
        np.testing.assert_allclose(norms['head/b'], 0.5 * 3**0.5, rtol=1e-6)

    @pytest.mark.parametrize(
        'mask',
        [
            {'head': False, 'body': True},
            {'head': {'w': False, 'b': False}, 'body': {'w': True}},
            lambda params: {'head': False, 'body': True},
        ],
    )
    def test_mask(self, mask):
        norms = self.norms(0.01, mask=mask)
        assert norms['head/w'] == self.norms(1e9)['head/w']
        np.testing.assert_allclose(norms['body/w'], 0.01 * 12**0.5, rtol=1e-6)

    def test_axis_by_leaf(self):
        seen = []

        def axes(path, leaf):
            seen.append(path)
            return {'head/w': 1, 'head/b': None}.get(path, (0, 1))

        grads = {'head': {'w': normal((4, 3)), 'b': normal((3,))}, 'body': {'w': normal((4, 3))}}
        clipped, _ = clip(grads, self.params, 0.1, axis=axes)
        assert set(seen) == {'head/w', 'head/b', 'body/w'}
        for (module, name), over in (('head', 'w'), 1), (('head', 'b'), 0), (('body', 'w'), (0, 1)):
            expected = formula(grads[module][name], self.params[module][name], 0.1, axes=over)
            np.testing.assert_allclose(clipped[module][name], expected, rtol=1e-6)


class TestFraction:
    def test_of_units_and_by_group(self):
        params = {'a': {'w': ones((2, 3)), 'b': ones(5)}, 'c': ones((2, 4))}
        grads = jax.tree.map(lambda p: p * 1e-4, params)
        grads['a']['w'] = grads['a']['w'].at[0, :2].set(1.0)
        grads['c'] = grads['c'].at[:, 3].set(1.0)
        tx = optax.chain(adaptive_grad_clip(0.01), optax.sgd(0.1, momentum=0.9))
        state = tx.init(params)
        assert optax.tree.get(state, 'clipped_fraction') == 0
        _, state = jax.jit(tx.update)(grads, state, params)
        np.testing.assert_allclose(optax.tree.get(state, 'clipped_fraction'), 3 / 8)
        by_group = optax.tree.get(state, 'clipped_fraction_by_group')
        assert clipping_groups(params) == ['a', 'c']
        np.testing.assert_allclose(by_group, [2 / 4, 1 / 4])
        assert by_group.dtype == np.float32

    def test_counts_no_masked_leaf(self):
        params = {'a': ones(3), 'b': ones(3)}
        _, state = clip(params, params, mask={'a': True, 'b': False})
        assert state.clipped_fraction == 1
        np.testing.assert_array_equal(state.clipped_fraction_by_group, [1, 0])

    def test_gradient_to_weight_is_that_of_each_group(self):
        rng = np.random.default_rng(0)
        params = {'a': {'w': rng.normal(size=(2, 3)), 'b': np.zeros(5)}, 'c': np.zeros(4), 'd': 1.0}
        grads = jax.tree.map(lambda p: rng.normal(size=np.shape(p)), params)
        expected = [
            np.sqrt(np.square(grads['a']['w']).sum() + np.square(grads['a']['b']).sum())
            / np.linalg.norm(params['a']['w']),
            np.linalg.norm(grads['c']) / 1e-3,
            0,
        ]
        params['d'] = grads['d'] = optax.MaskedNode()
        params, grads = jax.tree.map(jnp.float32, (params, grads))
        found = jax.jit(gradient_to_weight)(grads, params)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert clipping_groups(params) == ['a', 'c', 'd']

    @pytest.mark.parametrize(
        ('paths', 'groups'),
        [
            (['NFNet/~/stem/w', 'NFNet/~/block_1/~/conv0/w', 'NFNet/~/linear/w'],
             ['block_1', 'linear', 'stem']),
            (['params/Conv_0/kernel', 'params/Conv_0/bias', 'params/Dense_0/kernel'],
             ['Conv_0', 'Dense_0']),
            (['linear/w', 'linear/b'], ['b', 'w']),
            (['linear/w'], ['w']),
            ([], []),
        ],
    )  # fmt: skip
    def test_group_is_the_first_part_that_differs(self, paths, groups):
        params = {path: ones(2) for path in paths}
        assert clipping_groups(params) == groups
        state = adaptive_grad_clip().init(params)
        assert state.clipped_fraction_by_group.shape == (len(groups),)


class TestErrors:
    params = {'conv': {'w': ones((3, 3, 2, 4)), 'b': ones(4)}}

    @pytest.mark.parametrize(
        'kwargs',
        [
            {'clipping': -0.1},
            {'eps': -1e-3},
            {'clipping': np.nan},
            {'clipping': '0.01'},
            {'clipping': None},
        ],
    )
    def test_no_number_or_negative(self, kwargs):
        with pytest.raises(ValueError, match=f'{next(iter(kwargs))} must be a number >= 0'):
            adaptive_grad_clip(**kwargs)
        with pytest.raises(ValueError, match='must be a number >= 0'):
            describe_clipping(self.params, **kwargs)

    def test_negative_for_a_leaf(self):
        tx = adaptive_grad_clip(
            clipping_by_leaf=lambda path, leaf: -1.0 if path == 'conv/w' else 0.01
        )
        with pytest.raises(ValueError, match='conv/w: clipping must be a number >= 0, got -1'):
            tx.init(self.params)

    def test_clipping_of_three_arguments(self):
        with pytest.raises(ValueError, match=r'\(path, leaf\) -> float; got a function of 3'):
            adaptive_grad_clip(lambda a, b, c: 0.01)

    @pytest.mark.parametrize('clipping', [0.02, 1.0, 1, optax.constant_schedule(0.02)])
    def test_clipping_twice(self, clipping):
        with pytest.raises(ValueError, match='clipping=.* and clipping_by_leaf exclude each other'):
            adaptive_grad_clip(clipping, clipping_by_leaf=lambda path, leaf: 0.01)

    @pytest.mark.parametrize('rule', [0.02, {'head': 0.02}, lambda step: 0.01])
    def test_clipping_by_leaf_is_no_rule(self, rule):
        with pytest.raises(ValueError, match=r'clipping_by_leaf must be a function \(path, leaf\)'):
            adaptive_grad_clip(clipping_by_leaf=rule)

    def test_params_missing(self):
        tx = adaptive_grad_clip()
        with pytest.raises(ValueError, match=r'needs params: tx.update\(grads, state, params\)'):
            tx.update(self.params, tx.init(self.params))

    @pytest.mark.parametrize('axis', [1, (0, 1, 2), -2, lambda path, leaf: 4])
    def test_axis_out_of_range(self, axis):
        with pytest.raises(ValueError, match=r'conv/b: axis -?\d is out of range for shape \(4,\)'):
            adaptive_grad_clip(axis=axis).init(self.params)

    def test_axis_twice(self):
        with pytest.raises(ValueError, match=r'conv/w: axes \(0, -4\) repeat an axis of shape'):
            adaptive_grad_clip(axis=lambda _, leaf: (0, -4)).init(
                {'conv': {'w': self.params['conv']['w']}}
            )

    def test_axis_traced(self):
        tx = optax.inject_hyperparams(adaptive_grad_clip)(0.01, axis=0)
        with pytest.raises(ValueError, match="static_args=\\('axis',\\)"):
            jax.jit(tx.init)(self.params)

    def test_rank_6_needs_axes(self):
        params = {'conv': ones((2,) * 6)}
        with pytest.raises(ValueError, match='conv: the rank .* axis=unit_axes.hwio'):
            adaptive_grad_clip().init(params)
        adaptive_grad_clip(axis=unit_axes.hwio).init(params)

    @pytest.mark.parametrize(
        'kwargs',
        [{'mask': False}, {'clipping_by_leaf': lambda path, leaf: None}, {'mask': lambda p: False}],
    )
    def test_nothing_selected(self, kwargs):
        with pytest.raises(ValueError, match="select none of the 2 leaves .*'conv/b'"):
            adaptive_grad_clip(**kwargs).init(self.params)

    def test_params_unlike_gradients(self):
        tx = adaptive_grad_clip()
        state = tx.init(self.params)
        grads = {'conv': {'w': ones((3, 3, 4, 2)), 'b': ones(4)}}
        with pytest.raises(ValueError, match=r'conv/w: the gradient has shape \(3, 3, 4, 2\)'):
            tx.update(grads, state, self.params)
        params = {'conv': {'w': self.params['conv']['w'], 'b': None}}
        with pytest.raises(ValueError, match='conv/b: .* no array there'):
            tx.update(self.params, state, params)


class TestDescribe:
    params = {
        'conv': {'w': jax.ShapeDtypeStruct((3, 3, 8, 16), np.float32), 'b': ones(16)},
        'head': ones((16, 10)),
        'steps': jnp.arange(2),
    }

    def test_table(self, capsys):
        description = describe_clipping(
            self.params,
            clipping_by_leaf=lambda path, leaf: 0.02 if leaf.ndim == 4 else 0.01,
            axis=unit_axes.hwio,
            mask={'conv': True, 'head': False, 'steps': True},
        )
        assert not capsys.readouterr().out
        head, *table = [line.split('  ') for line in description.splitlines()]
        table = [[cell.strip() for cell in row if cell.strip()] for row in table]
        assert head[0] == 'leaf'
        assert table[:4] == [
            ['conv/b', '(16,)', '(0,)', '1', '0.01', 'conv'],
            ['conv/w', '(3, 3, 8, 16)', '(0, 1, 2)', '16', '0.02', 'conv'],
            ['head', '(16, 10)', '-', '-', '-', 'head'],
            ['steps', '(2,)', '-', '-', '-', 'steps'],
        ]
        assert table[4][0].startswith('17 units in 2 of 4 leaves: ')

    def test_schedule(self):
        table = describe_clipping(self.params, optax.linear_schedule(0.04, 0.01, 100))
        assert '  0.04  conv' in table
        assert table.endswith('clipping as at step 0')

    def test_errors_as_at_init(self):
        with pytest.raises(ValueError, match='conv/b: axis 2 is out of range'):
            describe_clipping(self.params, axis=2)


@pytest.mark.parametrize(
    ('dtype', 'scale'), [('float32', 1.0), ('float32', 1e-30), ('float32', 1e30)]
)
def test_the_forms_of_all_platforms_agree(monkeypatch, dtype, scale):
    params = {str(i): normal(shape, i, scale, dtype) for i, shape in enumerate(SHAPES + SHAPES)}
    grads = {str(i): normal(shape, 99 + i, scale / 50, dtype) for i, shape in enumerate(SHAPES * 2)}
    grads['2'] = grads['2'].at[3].set(jnp.nan)
    default, state = clip(grads, params, 0.01)
    assert 0 < state.clipped_fraction < 1

    def as_on_a_tpu(*args, default, tpu=None, cpu=None):
        return (tpu or default)(*args)

    monkeypatch.setattr(jax.lax, 'platform_dependent', as_on_a_tpu)
    on_tpu, state_on_tpu = clip(grads, params, 0.01)
    chex.assert_trees_all_close(on_tpu, default, rtol=1e-6)
    chex.assert_trees_all_close(state_on_tpu, state)


def test_one_reduction_a_leaf_on_a_tpu_and_one_a_shape_on_a_gpu():
    params = {str(i): ones((8,)) for i in range(20)} | {'w': ones((3, 3, 4, 6))}
    tx = adaptive_grad_clip(0.01)

    def reductions(platform):
        program = jax.export.export(jax.jit(tx.update), platforms=[platform])
        text = program(params, tx.init(params), params).mlir_module()
        return text.count('stablehlo.reduce(')

    counts = 21  # of units above the bound, one a group
    assert reductions('tpu') == counts + 21
    # Two sums of gradients and of weights, for the vectors together and for w.
    assert reductions('cuda') == counts + 2 * 4
    assert reductions('cpu') == counts + 21 * 4
