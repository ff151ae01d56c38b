"""All implementations of a convolution agree, and each platform gets its own."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from nfnets_jax.convolution import conv
from nfnets_jax.convolution.conv import ConvOptions

# kernel, in, out, options: one group a convolution, merged groups with some left over, strides.
CASES = {
    'wide groups': (3, 192, 128, ConvOptions(1, 2, 'SAME')),
    'narrow groups, stride 2': (3, 88, 44, ConvOptions(2, 11, 'SAME')),
    'unpadded': (3, 6, 12, ConvOptions(1, 6, 'VALID')),
    'pointwise, stride 2': (1, 12, 20, ConvOptions(2, 1, 'SAME')),
    'pointwise in groups': (1, 12, 20, ConvOptions(1, 4, 'SAME')),
    'dense': (3, 5, 7, ConvOptions(1, 1, 'SAME')),
    'stem': (3, 3, 7, ConvOptions(2, 1, 'SAME')),
    'large stem, stride 3': (7, 3, 7, ConvOptions(3, 1, 'SYMMETRIC')),
    'pixels left over': (3, 3, 7, ConvOptions(2, 1, 'VALID')),  # The last column is never read.
}
# A table with another implementation for each pass.
TABLE = {
    'cpu': {
        (3, 1, 2, 128, 128, 98): ('per_group', 'im2col', 'xla'),
        (3, 2, 1, 3, 7, 32): ('xla', 'nhwc_grads', 'im2col'),
        (1, 1, 1, 12, 20, 98): ('pointwise', 'pointwise', 'pointwise'),
    },
    'cuda': {(3, 1, 2, 128, 128, 98): ('xla', 'xla', 'im2col')},
}


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(conv, 'TABLE', TABLE)


def example(case, height=7, width=8, dtype=jnp.float32):
    kernel, inputs, outputs, options = case
    x = normal(2, height, width, inputs)
    w = normal(kernel, kernel, inputs // options.groups, outputs, seed=1)
    if dtype != jnp.float32:
        x, w = x.astype(dtype), w.astype(dtype)
    return options, x, w


def normal(*shape, seed=0):
    """Drawn by numpy, whose random numbers need no program."""
    return jax.device_put(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def conv2d(options, x, w):
    return conv.conv2d(x, w, options.stride, groups=options.groups, padding=options.padding)


def values_and_gradients(impls, options, x, w):
    """Returns {name: (output, gradients)} of several impls, in one program: it compiles faster."""
    result = jax.eval_shape(functools.partial(conv.xla, options), x, w)
    cotangent = normal(*result.shape, seed=2).astype(result.dtype)

    @jax.jit
    def run(x, w, cotangent):
        results = {}
        for name, impl in impls.items():
            out, vjp = jax.vjp(functools.partial(impl, options), x, w)
            results[name] = out, *vjp(cotangent)
        return results

    return run(x, w, cotangent)


def assert_agree(results):
    expected = results.pop('xla')
    for name, values in results.items():
        for got, want in zip(values, expected, strict=True):
            atol = 2e-5 * np.abs(want).max()
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=atol, err_msg=name)


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_implementations_and_their_gradients_agree(case):
    options, x, w = example(case)
    signature = conv.conv_signature(options, x.shape, w.shape)
    impls = {name: conv.IMPLS[name] for name in conv.candidates(signature)}
    assert len(impls) > 1
    results = values_and_gradients(impls, options, x, w)
    assert signature.positions * w.shape[-1] == results['xla'][0].size
    assert_agree(results)


@pytest.mark.parametrize('name', ['wide groups', 'stem'])
def test_each_pass_uses_its_implementation(name, table):
    impls = {'xla': conv.xla, 'conv2d': conv2d}
    assert_agree(values_and_gradients(impls, *example(CASES[name])))


def test_bfloat16_is_rounded_once():
    """The sums are float32 and only the result is rounded: to 8 bits."""
    options, x, w = example(CASES['wide groups'], dtype=jnp.bfloat16)
    exact = conv.xla(options, x.astype(jnp.float32), w.astype(jnp.float32))
    for name in ('xla', 'per_group', 'im2col'):
        out = conv.IMPLS[name](options, x, w)
        assert out.dtype == jnp.bfloat16
        difference = np.abs(out.astype(jnp.float32) - exact)
        assert np.all(difference <= 2.0**-8 * np.abs(exact) + 1e-4), name


def test_bfloat16_gradients_are_rounded_once():
    options, x, w = example(CASES['dense'], dtype=jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(impl, x, w):
        return jax.grad(lambda x, w: jnp.sum(impl(options, x, w) * 0.5), (0, 1))(x, w)

    exact = gradients(conv.xla, x.astype(jnp.float32), w.astype(jnp.float32))
    for got, want in zip(gradients(conv.nhwc_grads, x, w), exact, strict=True):
        assert got.dtype == jnp.bfloat16
        difference = np.abs(got.astype(jnp.float32) - want)
        assert np.all(difference <= 2.0**-8 * np.abs(want) + 1e-4)


def test_gradients_in_loops_have_the_axes_that_are_fast_on_the_cpu():
    """XLA brings the axes of others into this order, but not in the body of a loop."""
    options, x, w = example((3, 5, 5, ConvOptions(1, 1, 'SAME')))

    def layers(x, ws):
        return jnp.sum(jax.lax.scan(lambda x, w: (conv2d(options, x, w), None), x, ws)[0])

    gradients = jax.jit(jax.grad(layers, (0, 1))).lower(x, jnp.stack([w, w])).as_text()
    axes = re.findall(r'dim_numbers = (\[.*?\])x(\[.*?\])->(\[.*?\])', gradients)
    assert axes == [('[b, 0, 1, f]', '[0, 1, i, o]', '[b, 0, 1, f]')] * 3  # forward, of x, of w


def test_the_nearest_entry_is_taken():
    def lookup(*size, platform='cpu'):
        return conv.lookup(TABLE[platform], conv.ConvSignature(*size))

    assert lookup(3, 1, 6, 128, 128, 288) == ('per_group', 'im2col', 'xla')
    assert lookup(7, 2, 1, 3, 64, 100) == ('xla', 'nhwc_grads', 'im2col')
    assert lookup(1, 2, 1, 5, 5, 0) == ('pointwise',) * 3
    assert lookup(1, 1, 1, 5, 5, 9, platform='cuda') == conv.XLA, 'none has the same candidates'


def test_the_table_names_implementations_that_exist():
    for entries in conv.TABLE.values():
        for key, names in entries.items():
            assert set(names) <= set(conv.candidates(conv.ConvSignature(*key)))


def test_second_derivatives(table):
    options, x, w = example(CASES['wide groups'], 3, 3)

    def curvature(impl):
        slope = jax.grad(lambda w: jnp.sum(jnp.sin(impl(options, x, w))))
        return jax.jit(jax.grad(lambda w: jnp.sum(jnp.square(slope(w)))))(w)

    want = curvature(conv.xla)
    np.testing.assert_allclose(curvature(conv2d), want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize('name', ['wide groups', 'pointwise, stride 2'])
def test_each_platform_gets_its_implementation(name, table):
    options, x, w = example(CASES[name])

    def program(platform):
        grad = jax.jit(jax.grad(lambda x, w: jnp.sum(jnp.square(conv2d(options, x, w))), (0, 1)))
        return export.export(grad, platforms=[platform])(x, w).mlir_module()

    grouped = f'feature_group_count = {options.groups}'
    for platform in ('cuda', 'tpu'):
        assert 'stablehlo.convolution' in program(platform)
        assert grouped in program(platform)
    if name == 'wide groups':
        assert grouped not in program('cpu')
        assert 'stablehlo.dot_general' in program('cuda')
        assert 'stablehlo.dot_general' not in program('tpu')
    else:
        assert 'stablehlo.convolution' not in program('cpu')


def test_the_platform_is_never_an_argument(table):
    """Else XLA meets the convolutions in a conditional, where its CPU backend is very slow."""
    options, x, w = example(CASES['wide groups'])
    inner = jax.jit(lambda x, w: jnp.sum(jnp.sin(conv2d(options, x, w))))
    jaxpr = jax.make_jaxpr(jax.grad(inner, (0, 1)))(x, w)
    choices = list(_conditionals(jaxpr.jaxpr))
    assert len(choices) == 2  # forward and backward
    for index, arguments in choices:
        assert index not in arguments


def _conditionals(jaxpr):
    """Yields (index variable, arguments of the function it is in) of every conditional."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == 'cond':
            yield eqn.invars[0], jaxpr.invars
        for value in eqn.params.values():
            if hasattr(value, 'jaxpr'):
                yield from _conditionals(value.jaxpr)
            elif hasattr(value, 'eqns'):
                yield from _conditionals(value)


def test_a_repeated_convolution_is_traced_once(monkeypatch):
    traced = []

    def counted(options, x, w):
        traced.append(x.shape)
        return conv.xla(options, x, w)

    monkeypatch.setattr(conv, 'IMPLS', dict.fromkeys(conv.IMPLS, counted))

    def traces(repeats, size):
        traced.clear()
        x, w = jnp.ones((1, size, size, 8)), jnp.ones((3, 3, 8, 8))

        def out(w):
            return functools.reduce(lambda x, _: conv.conv2d(x, w), range(repeats), x).sum()

        jax.jit(jax.grad(out)).lower(w)
        return len(traced)

    assert traces(repeats=9, size=13) == traces(repeats=3, size=14) > 0
