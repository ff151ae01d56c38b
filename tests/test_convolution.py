"""The forms of a convolution agree, and each platform gets its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from nfnets_jax import convolution
from nfnets_jax.convolution import ConvShape

# kernel, in, out, shape: one group a convolution, merged groups with some left over, strides.
CASES = {
    'wide groups': (3, 256, 256, ConvShape(1, 2, 'SAME')),
    'narrow groups': (3, 88, 44, ConvShape(1, 11, 'SAME')),
    'narrow groups, stride 2': (3, 88, 88, ConvShape(2, 11, 'SAME')),
    'depthwise': (3, 6, 6, ConvShape(1, 6, 'SAME')),
    'unpadded': (3, 16, 32, ConvShape(1, 2, 'VALID')),
    'pointwise': (1, 12, 20, ConvShape(1, 1, 'SAME')),
    'pointwise, stride 2': (1, 12, 20, ConvShape(2, 1, 'SAME')),
    'pointwise in groups': (1, 12, 20, ConvShape(1, 4, 'SAME')),
    'dense': (3, 5, 7, ConvShape(2, 1, 'SAME')),
}


def example(case, size=7):
    kernel, inputs, outputs, shape = case
    key_x, key_w = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key_x, (2, size, size, inputs))
    w = jax.random.normal(key_w, (kernel, kernel, inputs // shape.groups, outputs))
    return shape, x, w


def conv2d(shape, x, w):
    return convolution.conv2d(x, w, shape.stride, groups=shape.groups, padding=shape.padding)


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_equals_the_plain_form_with_its_gradients(case):
    shape, x, w = example(case)
    cotangent_key = jax.random.key(1)

    def value_and_gradients(form):
        def run(x, w):
            out, vjp = jax.vjp(lambda x, w: form(shape, x, w), x, w)
            return out, *vjp(jax.random.normal(cotangent_key, out.shape))

        return jax.jit(run)(x, w)

    expected = value_and_gradients(convolution.plain)
    for got, want in zip(value_and_gradients(conv2d), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * np.abs(want).max())


def test_second_derivatives():
    shape, x, w = example(CASES['narrow groups'], size=3)

    def curvature(form):
        slope = jax.grad(lambda w: jnp.sum(jnp.sin(form(shape, x, w))))
        return jax.jit(jax.grad(lambda w: jnp.sum(jnp.square(slope(w)))))(w)

    want = curvature(convolution.plain)
    np.testing.assert_allclose(curvature(conv2d), want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize('name', ['narrow groups', 'pointwise'])
def test_each_platform_gets_its_form(name):
    shape, x, w = example(CASES[name])
    grad = jax.jit(jax.grad(lambda x, w: jnp.sum(conv2d(shape, x, w)), (0, 1)))

    def program(platform):
        return export.export(grad, platforms=[platform])(x, w).mlir_module()

    grouped = [
        f'{kind}_group_count = {shape.groups}' for kind in ('feature', 'batch') if shape.groups > 1
    ]
    assert 'stablehlo.convolution' in program('cuda')
    assert all(text in program('cuda') for text in grouped)
    if name == 'pointwise':
        assert 'stablehlo.convolution' not in program('cpu')
    assert not any(text in program('cpu') for text in grouped)


def test_the_platform_is_never_an_argument():
    """Else XLA meets the convolutions in a conditional, where its CPU backend is very slow."""
    shape, x, w = example(CASES['wide groups'])
    inner = jax.jit(lambda x, w: jnp.sum(jnp.sin(conv2d(shape, x, w))))
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
