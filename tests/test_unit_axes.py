"""The rules against the layers themselves: a unit feeds one output channel, and all of it."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nfnets_jax import unit_axes
from nfnets_jax.agc import adaptive_grad_clip

KEY = jax.random.key(0)


def haiku(layer, x):
    net = hk.transform(lambda x: layer()(x))
    params = jax.jit(net.init)(KEY, x)
    (module,) = params
    return lambda w: net.apply({module: params[module] | {'w': w}}, None, x), params[module]['w']


def linen(layer, x):
    params = jax.jit(layer().init)(KEY, x)['params']
    return lambda w: layer().apply({'params': params | {'kernel': w}}, x), params['kernel']


def equinox(layer, x):
    layer = layer()
    run = lambda w: eqx.tree_at(lambda m: m.weight, layer, w)(x)  # noqa: E731
    return lambda w: jnp.moveaxis(run(w), 0, -1), layer.weight


# Name -> rule, and what `make` takes: the library, the layer's constructor, shape of the input.
CASES = {
    'haiku linear': (unit_axes.hwio, haiku, lambda: hk.Linear(3), (2, 4)),
    'haiku 1-D': (unit_axes.hwio, haiku, lambda: hk.Conv1D(3, 2), (1, 4, 2)),
    'haiku 2-D': (unit_axes.hwio, haiku, lambda: hk.Conv2D(3, 2), (1, 3, 3, 2)),
    'haiku 3-D': (unit_axes.hwio, haiku, lambda: hk.Conv3D(3, 2), (1, 2, 2, 2, 2)),
    'haiku grouped': (
        unit_axes.hwio,
        haiku,
        lambda: hk.Conv2D(6, 2, feature_group_count=2),
        (1, 3, 3, 4),
    ),
    'haiku depthwise': (unit_axes.hwio, haiku, lambda: hk.DepthwiseConv2D(2, 2), (1, 3, 3, 3)),
    'haiku transposed': (unit_axes.hwoi, haiku, lambda: hk.Conv2DTranspose(3, 2), (1, 3, 3, 2)),
    'flax dense': (unit_axes.hwio, linen, lambda: nn.Dense(3), (2, 4)),
    'flax 2-D': (unit_axes.hwio, linen, lambda: nn.Conv(3, (2, 2)), (1, 3, 3, 2)),
    'flax grouped': (
        unit_axes.hwio,
        linen,
        lambda: nn.Conv(6, (2, 2), feature_group_count=2),
        (1, 3, 3, 4),
    ),
    'flax transposed': (unit_axes.hwio, linen, lambda: nn.ConvTranspose(3, (2, 2)), (1, 3, 3, 2)),
    'flax transposed kernel': (
        unit_axes.hwoi,
        linen,
        lambda: nn.ConvTranspose(3, (2, 2), transpose_kernel=True),
        (1, 3, 3, 2),
    ),
    'flax many outputs': (
        unit_axes.dense_general(1),
        linen,
        lambda: nn.DenseGeneral((2, 3)),
        (2, 4),
    ),
    'flax many inputs': (
        unit_axes.dense_general(2),
        linen,
        lambda: nn.DenseGeneral((2, 3), axis=(-2, -1)),
        (2, 4, 5),
    ),
    'equinox linear': (unit_axes.oihw, equinox, lambda: eqx.nn.Linear(4, 3, key=KEY), (4,)),
    'equinox 1-D': (unit_axes.oihw, equinox, lambda: eqx.nn.Conv1d(2, 3, 2, key=KEY), (2, 4)),
    'equinox 2-D': (unit_axes.oihw, equinox, lambda: eqx.nn.Conv2d(2, 3, 2, key=KEY), (2, 3, 3)),
    'equinox grouped': (
        unit_axes.oihw,
        equinox,
        lambda: eqx.nn.Conv2d(4, 6, 2, groups=2, key=KEY),
        (4, 3, 3),
    ),
    'equinox transposed': (
        unit_axes.oihw,
        equinox,
        lambda: eqx.nn.ConvTranspose2d(2, 3, 2, key=KEY),
        (2, 3, 3),
    ),
    'equinox grouped transposed': (
        unit_axes.oihw,
        equinox,
        lambda: eqx.nn.ConvTranspose2d(4, 6, 2, groups=2, key=KEY),
        (4, 3, 3),
    ),
}


def make(case):
    """Returns the rule of a case, the layer's outputs as a function of its weight, and that."""
    rule, library, layer, shape = CASES[case]
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return rule, *library(layer, x)


def axes_of(rule, shape, path='layer/w'):
    return rule(path, jax.ShapeDtypeStruct(shape, np.float32))


def feeds(fn, weight, axes):
    """Which unit feeds which output channel, as a matrix [channels, units] of bools."""
    jacobian = np.asarray(jax.jit(jax.jacobian(fn))(weight)) != 0
    out_ndim = jacobian.ndim - weight.ndim
    # Outputs with as many trailing axes as there are unit axes are channels; the rest is places.
    channel_axes = out_ndim - (weight.ndim - len(axes))
    places = tuple(range(channel_axes))
    matrix = jacobian.any(axis=places + tuple(out_ndim + axis for axis in axes))
    units = int(np.prod([n for i, n in enumerate(weight.shape) if i not in axes]))
    return matrix.reshape(-1, units)


@pytest.mark.parametrize('case', CASES)
def test_a_unit_is_an_output_channel(case):
    rule, fn, weight = make(case)
    axes = axes_of(rule, weight.shape)
    found = feeds(fn, weight, axes)
    np.testing.assert_array_equal(found, np.eye(found.shape[0]))


def test_the_check_above_tells_layouts_apart():
    _, fn, weight = make('haiku transposed')
    assert feeds(fn, weight, axes_of(unit_axes.hwio, weight.shape)).all()


@pytest.mark.parametrize('shape', [(), (5,), (1, 1, 5), (5, 1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize('rule', ['by_rank', 'hwio', 'oihw', 'hwoi', 'per_tensor'])
def test_vectors_are_one_unit(rule, shape):
    assert axes_of(getattr(unit_axes, rule), shape) == tuple(range(len(shape)))


def test_by_rank():
    shapes = {(3, 4): (0,), (3, 4, 5): (0,), (2, 3, 4, 5): (0, 1, 2), (2,) * 5: (0, 1, 2, 3)}
    for shape, axes in shapes.items():
        assert axes_of(unit_axes.by_rank, shape) == axes


def test_per_tensor():
    assert axes_of(unit_axes.per_tensor, (3, 3, 4, 5)) == (0, 1, 2, 3)


@pytest.mark.parametrize('library', ['linen', 'nnx'])
def test_flax_attention(library):
    if library == 'linen':
        layer = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
        params = {'attention': layer.init(KEY, jnp.ones((1, 3, 4)))['params']}
    else:
        layer = nnx.MultiHeadAttention(
            num_heads=2, in_features=4, qkv_features=6, decode=False, rngs=nnx.Rngs(0)
        )
        params = {'attention': nnx.state(layer, nnx.Param)}
    units = {}

    def rule(path, leaf):
        axes = unit_axes.flax_attention(path, leaf)
        name = path.removeprefix('attention/').removesuffix('/value')
        units[name] = leaf.size // int(np.prod([leaf.shape[i] for i in axes]))
        return axes

    adaptive_grad_clip(axis=rule).init(params | {'mlp': {'kernel': jnp.ones((4, 8))}})
    projections = {f'{name}/kernel': 6 for name in ('query', 'key', 'value')}
    biases = {f'{name}/bias': 1 for name in ('query', 'key', 'value', 'out')}
    assert units == projections | biases | {'out/kernel': 4, 'mlp/kernel': 8}


class TestStacked:
    @pytest.mark.parametrize(
        ('shape', 'axes'),
        [((5,), ()), ((5, 7), (1,)), ((5, 3, 4), (1,)), ((5, 3, 3, 2, 4), (1, 2, 3))],
    )
    def test_never_reduces_the_stack(self, shape, axes):
        assert axes_of(unit_axes.stacked(unit_axes.hwio), shape) == axes

    def test_two_stacks(self):
        assert axes_of(unit_axes.stacked(unit_axes.oihw, 2), (2, 5, 3, 4)) == (3,)

    def test_of_rules_with_negative_axes_or_none(self):
        assert axes_of(unit_axes.stacked(lambda path, leaf: -1), (5, 3, 4)) == (2,)
        assert axes_of(unit_axes.stacked(lambda path, leaf: None), (5, 2, 3, 4)) == (1,)

    def test_clips_each_layer_as_if_alone(self):
        grads = jax.random.normal(KEY, (3, 4, 5))
        params = jax.random.normal(jax.random.key(1), (3, 4, 5))

        def clip(grads, params, axis):
            return adaptive_grad_clip(0.5, axis=axis).update(grads, None, params)[0]

        stacked = clip(grads, params, unit_axes.stacked(unit_axes.hwio))
        for i in range(3):
            np.testing.assert_allclose(
                stacked[i], clip(grads[i], params[i], unit_axes.hwio), rtol=1e-6
            )


def test_errors_name_the_leaf():
    with pytest.raises(ValueError, match='layer/w: shape .* fewer than 3 input axes'):
        axes_of(unit_axes.dense_general(3), (4, 5))
    with pytest.raises(ValueError, match='layer/w: shape .* fewer than 1 stacked axes'):
        axes_of(unit_axes.stacked(unit_axes.hwio), ())
    with pytest.raises(ValueError, match='inputs must be at least 1'):
        unit_axes.dense_general(0)
    with pytest.raises(ValueError, match='axes must be at least 1'):
        unit_axes.stacked(unit_axes.hwio, 0)
