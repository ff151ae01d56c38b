import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax.convolution import split_concat

X = jnp.arange(24.0).reshape(2, 3, 4)


@pytest.mark.parametrize(('sizes', 'axis'), [((1, 1), 0), ((2, 1), 1), ((1, 2, 1), -1), ((4,), 2)])
def test_split_and_join_are_those_of_numpy(sizes, axis):
    parts = split_concat.split(X, sizes, axis)
    expected = np.split(X, np.cumsum(sizes)[:-1], axis)
    for part, want in zip(parts, expected, strict=True):
        np.testing.assert_array_equal(part, want)
    np.testing.assert_array_equal(split_concat.join(parts, axis), X)


def test_gradients_of_any_order():
    def product(x):
        a, b = split_concat.split(x, (1, 2), 1)
        return jnp.sum(split_concat.join([b * a, a**3], 1))

    def as_jax_does_it(x):
        a, b = x[:, :1], x[:, 1:]
        return jnp.sum(jnp.concatenate([b * a, a**3], 1))

    for order in (jax.grad, lambda f: jax.jacrev(jax.grad(f))):
        both = jax.jit(lambda x, order=order: [order(f)(x) for f in (product, as_jax_does_it)])
        np.testing.assert_array_equal(*both(X))


def test_slices_of_one_size_are_one_program():
    """Those of jnp.split are not, or this module has no purpose."""

    def programs(split):
        traced = jax.jit(lambda x: [part + 1 for part in split(x)]).lower(jnp.ones((8, 32)))
        text = traced.compile().as_text()
        bodies = re.findall(r'^%fused_computation.*?\n(.*?)^}', text, re.M | re.S)
        assert len(bodies) == 8
        return {re.sub(r'%[\w.-]+|metadata=\{.*?\}', '', body) for body in bodies}

    assert len(programs(lambda x: split_concat.split(x, (1,) * 8, 0))) == 1
    assert len(programs(lambda x: jnp.split(x, 8))) == 8
