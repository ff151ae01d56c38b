import functools

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.polynomial.hermite_e import hermegauss

from nfnets_jax import layers
from nfnets_jax.errors import UsageError


def init_and_apply(module, *args, static=(), rng=0):
    """Returns (params, state, result, new state) of calling the module `module()` makes."""
    network = hk.transform_with_state(lambda *args: module()(*args, *static))
    params, state = jax.jit(network.init)(jax.random.key(rng), *args)
    result, new_state = jax.jit(network.apply)(params, state, None, *args)
    return params, state, result, new_state


def normal(*shape, seed=0, dtype=jnp.float32):
    x = np.random.RandomState(seed).standard_normal(shape)
    return jax.device_put(np.asarray(x, jnp.dtype(dtype)))  # jnp.asarray compiles a copy.


# Nonlinearities ---------------------------------------------------------------------------------


@pytest.mark.parametrize('name', sorted(layers.gains.keys() - {'glu', 'log_softmax'}))
def test_gains_preserve_the_variance_of_a_gaussian(name):
    # Fine enough for the kinks: the trapezium rule, not Gauss-Hermite.
    z = np.linspace(-10, 10, 200_001)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    f = np.asarray(layers.nonlinearities[name](jnp.asarray(z, jnp.float32)), np.float64)
    mean = np.trapezoid(f * density, z)
    variance = np.trapezoid((f - mean) ** 2 * density, z)
    # The published gains are Monte Carlo estimates.
    assert variance == pytest.approx(1, abs=3e-3)


def test_gain_of_glu_preserves_the_variance_of_two_gaussians():
    z, weight = hermegauss(60)
    weight = weight / weight.sum()
    # std(a * sigmoid(b))^2 = E[a^2] E[sigmoid(b)^2], as E[a] = 0
    variance = np.sum(weight * (1 / (1 + np.exp(-z))) ** 2)
    assert layers.gains['glu'] ** 2 * variance == pytest.approx(1, abs=3e-3)
    x = normal(5, 8)
    expected = x[:, :4] * jax.nn.sigmoid(x[:, 4:]) * layers.gains['glu']
    np.testing.assert_allclose(layers.nonlinearities['glu'](x), expected, rtol=1e-6)


def test_gain_of_log_softmax_preserves_variance_over_many_channels():
    x = normal(200, 2000)
    assert np.var(layers.nonlinearities['log_softmax'](x)) == pytest.approx(1, abs=5e-3)


def test_there_are_sixteen_and_each_is_the_published_multiple_of_the_plain_function():
    assert len(layers.nonlinearities) == 16
    assert layers.nonlinearities.keys() == layers.activations.keys() == layers.gains.keys()
    x = normal(4, 6)

    def apply_all(functions, x):
        return {name: function(x) for name, function in functions.items()}

    scaled = jax.jit(lambda x: apply_all(layers.nonlinearities, x))(x)
    plain = jax.jit(lambda x: apply_all(layers.activations, x))(x)
    for name, gain in layers.gains.items():
        np.testing.assert_allclose(scaled[name], gain * plain[name], rtol=1e-6, err_msg=name)
    low = jax.eval_shape(lambda x: apply_all(layers.nonlinearities, x), x.astype(jnp.bfloat16))
    assert {out.dtype for out in low.values()} == {jnp.dtype('bfloat16')}


def test_gelu_is_the_tanh_form():
    x = np.linspace(-3, 3, 7)
    tanh_form = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(layers.activations['gelu'](x), tanh_form, atol=1e-6)


def test_unknown_activation_names_the_nearest():
    with pytest.raises(UsageError, match="activation='gellu' is unknown .*'gelu'"):
        layers.get_activation('gellu', scaled=True)


# Convolutions and linear ------------------------------------------------------------------------


def test_standardize_is_the_published_formula():
    w = 3 + 2 * np.random.RandomState(0).standard_normal((3, 3, 8, 5))
    gain = np.arange(1.0, 6.0)
    fan_in = 72
    expected = gain * (w - w.mean((0, 1, 2))) / np.sqrt(w.var((0, 1, 2)) * fan_in)
    result = layers.standardize(jnp.asarray(w, jnp.float32), jnp.asarray(gain, jnp.float32))
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=1e-6)


def test_the_guard_of_standardize_is_a_floor_not_an_addend():
    gain = jnp.ones(1)
    # fan-in 2, values +-s: variance * fan_in is 2 s^2, and the result +-s / sqrt(max(2 s^2, eps))
    for s in (1e-3, 1.0):
        w = jnp.array([-s, s]).reshape(1, 1, 2, 1)
        expected = s / np.sqrt(max(2 * s**2, 1e-4))
        np.testing.assert_allclose(layers.standardize(w, gain)[0, 0, 1, 0], expected, rtol=1e-6)
    constant = layers.standardize(jnp.full((3, 3, 4, 1), 7.0), gain)
    np.testing.assert_array_equal(constant, 0)


def test_the_gradient_of_standardize_is_that_of_the_formula():
    def formula(w, gain):
        mean, variance = jnp.mean(w, (0, 1, 2)), jnp.var(w, (0, 1, 2))
        return gain * (w - mean) / jnp.sqrt(variance * 72)

    args, cotangent = (normal(3, 3, 8, 5), 1 + normal(5)), normal(3, 3, 8, 5) ** 3

    def gradient(f, *args):
        return jax.vjp(f, *args)[1](cotangent)

    def second(f, *args):
        return jax.grad(lambda *args: jnp.sum(gradient(f, *args)[0] ** 2))(*args)

    for order in (gradient, second):
        ours, theirs = jax.jit(
            lambda *args, order=order: [order(f, *args) for f in (layers.standardize, formula)]
        )(*args)
        chex.assert_trees_all_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_standardize_lacks_the_sum_that_is_zero():
    def pull_back(w, gain, cotangent):
        return jax.vjp(layers.standardize, w, gain)[1](cotangent)

    text = jax.jit(pull_back).lower(normal(3, 3, 8, 5), normal(5), normal(3, 3, 8, 5)).as_text()
    # 9 with the sum of deviations, which is zero.
    assert text.count('stablehlo.reduce(') == 8


def test_ws_conv_keeps_the_variance_of_its_input():
    x = normal(8, 16, 16, 64)
    _, _, out, _ = init_and_apply(lambda: layers.ScaledWSConv2D(128, 3, groups=2), x)
    inside = np.asarray(out)[:, 1:-1, 1:-1]  # Padding with zeros takes some away at the border.
    assert inside.var() == pytest.approx(1, abs=0.05)
    assert abs(inside.mean()) < 0.02


@pytest.mark.parametrize('groups', [1, 4])
def test_ws_conv_parameters(groups):
    network = hk.transform(lambda x: layers.ScaledWSConv2D(12, 3, 2, groups=groups)(x))
    params = jax.eval_shape(network.init, jax.random.key(0), x := normal(1, 7, 7, 8))
    shapes = jax.tree.map(lambda p: p.shape, params)
    assert shapes == {
        'scaled_ws_conv2_d': {'w': (3, 3, 8 // groups, 12), 'gain': (12,), 'bias': (12,)}
    }
    assert jax.eval_shape(network.apply, params, None, x).shape == (1, 4, 4, 12)


def test_ws_conv_gain_and_bias_scale_and_shift_its_output():
    network = hk.without_apply_rng(hk.transform(lambda x: layers.ScaledWSConv2D(4, 3)(x)))
    x, bias = normal(2, 5, 5, 3), np.arange(4, dtype=np.float32)

    @jax.jit
    def apply(gain, bias):
        params = {'w': normal(3, 3, 3, 4), 'gain': gain, 'bias': bias}
        return network.apply({'scaled_ws_conv2_d': params}, x)

    before, after = apply(np.ones_like(bias), 0 * bias), apply(np.full_like(bias, 3), bias)
    np.testing.assert_allclose(after, 3 * before + bias, rtol=1e-5, atol=1e-5)


def test_ws_conv_without_standardisation_is_a_convolution_with_a_gain():
    w, x, gain = normal(1, 1, 6, 4), normal(2, 3, 3, 6), np.arange(1.0, 5.0, dtype=np.float32)
    network = hk.without_apply_rng(
        hk.transform(lambda x: layers.ScaledWSConv2D(4, 1, standardize=False)(x))
    )
    params = {'scaled_ws_conv2_d': {'w': w, 'gain': gain, 'bias': np.zeros_like(gain)}}
    expected = np.asarray(x) @ np.asarray(w)[0, 0] * gain
    np.testing.assert_allclose(network.apply(params, x), expected, rtol=1e-5, atol=1e-5)


MODULES = {
    'ws': lambda: layers.ScaledWSConv2D(6, 3),
    'conv': lambda: layers.Conv2D(6, 3),
    'linear': lambda: layers.Linear(6),
    'se': lambda: layers.SqueezeExcite(8, 0.5),
    'eca': lambda: layers.EfficientChannelAttention(8),
}


def test_bfloat16_computes_in_bfloat16_with_float32_parameters():
    x = normal(2, 9, 9, 8)
    # In one program, which is compiled once.
    network = hk.without_apply_rng(
        hk.transform(lambda x: {name: module()(x) for name, module in MODULES.items()})
    )
    shapes = jax.eval_shape(network.init, jax.random.key(0), x.astype(jnp.bfloat16))

    def fill(path, leaf):
        x = normal(*leaf.shape, dtype=leaf.dtype)
        return 1 + 0.1 * x if path[-1].key == 'gain' else 0.15 * x

    params = jax.tree.map_with_path(fill, shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}

    @jax.jit
    def both(params, x):
        return network.apply(params, x.astype(jnp.bfloat16)), network.apply(params, x)

    results, expected = both(params, x)
    for name, out in results.items():
        assert out.dtype == jnp.bfloat16
        low = np.asarray(out).astype(np.float32)
        np.testing.assert_allclose(low, expected[name], atol=0.05, err_msg=name)


def test_weights_are_standardised_in_float32_under_bfloat16():
    # Around 300 bfloat16 steps by 2: standardised after the cast, these weights would be noise.
    w = 300 + 0.01 * np.random.RandomState(0).standard_normal((1, 1, 64, 8)).astype(np.float32)
    network = hk.without_apply_rng(hk.transform(lambda x: layers.ScaledWSConv2D(8, 1)(x)))
    params = {'scaled_ws_conv2_d': {'w': w, 'gain': jnp.ones(8), 'bias': jnp.zeros(8)}}
    x = normal(4, 2, 2, 64)

    @jax.jit
    def both(x):
        return network.apply(params, x.astype(jnp.bfloat16)), network.apply(params, x)

    low, expected = map(np.asarray, both(x))
    np.testing.assert_allclose(low.astype(np.float32), expected, atol=0.05)


def test_conv_and_linear_equal_haikus():
    x = normal(2, 7, 7, 4)

    def all_of(library):
        def call(x):
            return [
                library.Conv2D(5, 3, 2, name='strided')(x),
                library.Conv2D(5, 3, padding='VALID', with_bias=False, name='valid')(x),
                library.Linear(5, name='linear')(x),
            ]

        return init_and_apply(lambda: call, x)

    params, _, results, _ = all_of(layers)
    haiku_params, _, expected, _ = all_of(hk)
    jax.tree.map(np.testing.assert_array_equal, params, haiku_params)
    for a, b in zip(results, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_initializer_reads_numbers():
    def values(value, number_means):
        init = layers.initializer(value, number_means)
        draw = hk.transform(lambda: hk.get_parameter('w', (400, 100), init=init))
        return draw.init(jax.random.key(0))['~']['w']

    assert np.all(values(0.5, 'constant') == 0.5)
    assert np.all(values(0.0, 'stddev') == 0)
    assert np.std(values(0.01, 'stddev')) == pytest.approx(0.01, rel=0.02)
    assert np.all(values(jnp.ones, 'stddev') == 1)


# Squeeze-and-excitation, stochastic depth, pooling -----------------------------------------------


def test_squeeze_excite_gates_each_channel_of_each_sample():
    x = normal(3, 4, 4, 8)
    params, _, gates, _ = init_and_apply(lambda: layers.SqueezeExcite(8, 0.25), x)
    fc0, fc1 = (params[f'squeeze_excite/~/{name}'] for name in ('linear', 'linear_1'))
    assert fc0['w'].shape == (8, 2)
    pooled = np.asarray(x).mean((1, 2))
    hidden = np.maximum(pooled @ fc0['w'] + fc0['b'], 0)
    expected = 1 / (1 + np.exp(-(hidden @ fc1['w'] + fc1['b'])))
    np.testing.assert_allclose(gates, expected[:, None, None], rtol=1e-5)


def test_squeeze_excite_has_a_hidden_unit_at_least():
    network = hk.transform(lambda x: layers.SqueezeExcite(2, 0.25)(x))
    params = jax.eval_shape(network.init, jax.random.key(0), normal(1, 2, 2, 2))
    assert params['squeeze_excite/~/linear']['w'].shape == (2, 1)


@pytest.mark.parametrize(
    ('channels', 'divisor', 'rounded'),
    [(11.9, 8, 8), (12, 8, 16), (27, 8, 24), (3, 8, 8), (2.5, 1, 3), (0.2, 1, 1)],
)
def test_channels_are_rounded_to_the_nearest_multiple(channels, divisor, rounded):
    assert layers.round_to(channels, divisor) == rounded


@pytest.mark.parametrize(('divisor', 'hidden'), [(1, 2), (2, 2), (3, 3)])
def test_hidden_units_of_squeeze_excite_are_cut_off_unless_a_divisor_rounds_them(divisor, hidden):
    network = hk.transform(lambda x: layers.SqueezeExcite(11, 0.25, divisor)(x))
    params = jax.eval_shape(network.init, jax.random.key(0), normal(1, 2, 2, 11))
    assert params['squeeze_excite/~/linear']['w'].shape == (11, hidden)


def test_efficient_channel_attention_convolves_the_channels_means():
    x = normal(3, 4, 4, 16)
    params, _, gates, _ = init_and_apply(lambda: layers.EfficientChannelAttention(16), x)
    kernel = params['efficient_channel_attention']['w'][:, 0, 0]
    assert kernel.shape == (3,)
    assert np.abs(kernel).max() <= 3**-0.5
    pooled = np.asarray(x).mean((1, 2))
    # numpy's convolution turns the kernel round; neural networks' does not.
    logits = np.stack([np.convolve(row, kernel[::-1], 'same') for row in pooled])
    np.testing.assert_allclose(gates[:, 0, 0], 1 / (1 + np.exp(-logits)), rtol=1e-5)


@pytest.mark.parametrize(
    ('channels', 'size'), [(16, 3), (64, 3), (128, 5), (256, 5), (512, 5), (1536, 5), (2048, 7)]
)
def test_the_kernel_of_efficient_channel_attention_grows_with_the_channels(channels, size):
    module = hk.transform(lambda x: layers.EfficientChannelAttention(channels)(x))
    params = jax.eval_shape(module.init, jax.random.key(0), normal(1, 1, 1, channels))
    assert params['efficient_channel_attention']['w'].shape == (size, 1, 1)


def test_stochastic_depth_drops_whole_samples_and_rescales_none():
    x = 1 + jnp.arange(4000 * 6.0).reshape(4000, 2, 3)
    out = np.asarray(layers.stochastic_depth(jax.random.key(0), 0.25, x))
    dropped = (out == 0).all((1, 2))
    np.testing.assert_array_equal(out[~dropped], np.asarray(x)[~dropped])
    assert dropped.mean() == pytest.approx(0.25, abs=0.03)
    low = layers.stochastic_depth(jax.random.key(0), 0.5, x.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16


def test_average_pooling_at_the_border_is_over_the_pixels_there_are():
    out = layers.avg_pool(jnp.arange(9.0).reshape(1, 3, 3, 1), 2, 2)
    np.testing.assert_allclose(out[0, :, :, 0], [[2, 3.5], [6.5, 8]])


# Batch normalisation ----------------------------------------------------------------------------


def test_batch_norm_equals_haikus_with_its_names_and_state():
    x = 2 + 3 * normal(6, 3, 3, 4)

    def run(make):
        network = hk.transform_with_state(lambda x, t, local: make()(x, t, local))
        params, state = network.init(jax.random.key(0), x, True, False)
        params = jax.tree.map(lambda p: p + 0.5, params)
        train, state = network.apply(params, state, None, x, True, False)
        train, state = network.apply(params, state, None, 2 * x, True, False)
        evaluated, same = network.apply(params, state, None, x, False, False)
        local, _ = network.apply(params, state, None, x, False, True)
        return params, state, train, evaluated, local, same

    makers = (
        lambda: layers.BatchNorm(0.9, name='bn'),
        lambda: hk.BatchNorm(True, True, 0.9, name='bn'),
    )
    ours, haikus = jax.jit(lambda: [run(make) for make in makers])()
    assert jax.tree.structure(ours) == jax.tree.structure(haikus)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), ours, haikus)


def test_batch_norm_is_float32_inside():
    x = 100 + normal(64, 4, 4, 3)
    params, state, out, new_state = init_and_apply(
        lambda: layers.BatchNorm(), x.astype(jnp.bfloat16), static=(True,)
    )
    floats = [a for a in jax.tree.leaves((params, state, new_state)) if a.dtype != jnp.int32]
    assert {a.dtype for a in floats} == {jnp.dtype('float32')}
    assert out.dtype == jnp.bfloat16
    rounded = np.asarray(x.astype(jnp.bfloat16), np.float64)
    expected = (rounded - rounded.mean((0, 1, 2))) / rounded.std((0, 1, 2))
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.02)


def test_batch_norm_of_a_constant_channel_is_finite():
    x = jnp.full((4, 3, 3, 2), 1234.567)
    _, _, out, state = init_and_apply(lambda: layers.BatchNorm(), x, static=(True,))
    # The mean is off by one rounding, 1e-4, and a variance below eps^2 amplifies it 300-fold.
    assert np.abs(out).max() < 0.2
    assert np.all(state['batch_norm/~/var_ema']['average'] >= 0)


@pytest.mark.parametrize('axis', [None, 'devices'])
def test_batch_norm_under_pmap(axis):
    x = np.asarray(normal(4, 2, 3, 3, 5)) + np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1, 1)
    network = hk.transform_with_state(lambda x: layers.BatchNorm(cross_replica_axis=axis)(x, True))
    # Outside of pmap the axis is not bound: making parameters must not need it.
    params, state = jax.jit(network.init)(jax.random.key(0), x[0])
    apply = jax.pmap(
        lambda x: network.apply(params, state, None, x), axis_name='devices', in_axes=0
    )
    out, new_state = apply(x)
    over = (0, 1, 2, 3) if axis else (1, 2, 3)
    mean, std = np.mean(x, over, keepdims=True), np.std(x, over, keepdims=True)
    np.testing.assert_allclose(out, (x - mean) / std, atol=1e-4)
    running = np.asarray(new_state['batch_norm/~/mean_ema']['average']).reshape(4, 5)
    np.testing.assert_allclose(running, np.broadcast_to(mean.reshape(-1, 5), (4, 5)), atol=1e-5)


# Signal metrics ---------------------------------------------------------------------------------


def test_signal_metrics():
    outputs = [3 + 2 * normal(5, 4, 4, 7, seed=i) for i in range(3)]
    branches = [normal(5, 4, 4, 7, seed=9 + i, dtype=jnp.bfloat16) for i in range(2)]
    metrics = jax.jit(layers.signal_metrics)(outputs, branches)
    assert {k: (v.shape, v.dtype.name) for k, v in metrics.items()} == {
        'avg_sq_mean': ((3,), 'float32'),
        'avg_var': ((3,), 'float32'),
        'res_avg_var': ((2,), 'float32'),
    }
    for i, x in enumerate(outputs):
        flat = np.asarray(x, np.float64).reshape(-1, 7)
        assert metrics['avg_sq_mean'][i] == pytest.approx(np.mean(flat.mean(0) ** 2), rel=1e-4)
        assert metrics['avg_var'][i] == pytest.approx(np.mean(flat.var(0)), rel=1e-4)
    flat = np.asarray(branches[1], np.float64).reshape(-1, 7)
    assert metrics['res_avg_var'][1] == pytest.approx(np.mean(flat.var(0)), rel=1e-4)


@pytest.mark.parametrize(
    ('layer', 'published'),
    [
        (layers.Conv2D, hk.initializers.TruncatedNormal(72**-0.5)),
        (layers.ScaledWSConv2D, hk.initializers.VarianceScaling(1.0, 'fan_in', 'normal')),
        (
            functools.partial(layers.Conv2D, w_init=layers.he_init),
            hk.initializers.VarianceScaling(2.0, 'fan_in', 'truncated_normal'),
        ),
    ],
)
def test_initial_weights_are_drawn_as_haiku_draws_them(layer, published):
    x, key = jnp.ones((1, 4, 4, 8)), jax.random.key(3)
    ours = hk.transform(lambda: layer(9, 3, name='conv')(x))
    theirs = hk.transform(lambda: hk.get_parameter('w', (3, 3, 8, 9), init=published))
    params, expected = jax.jit(lambda key: (ours.init(key), theirs.init(key)))(key)
    np.testing.assert_array_equal(params['conv']['w'], expected['~']['w'])
