"""Packed chains against the same convolutions one by one."""

import functools

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax import models
from nfnets_jax.convolution import packed


def _gradients(monkeypatch, form, options, x, kernels):
    """Returns the output and the gradients with respect to the images and the kernels."""
    monkeypatch.setattr(packed, '_by_platform', lambda function: function(form))

    @jax.jit
    def gradients(x, kernels):
        out, pull_back = jax.vjp(functools.partial(packed.chain, options), x, kernels)
        return out, pull_back(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    return gradients(x, kernels)


@pytest.mark.parametrize('padding', ['SAME', 'SYMMETRIC'])
@pytest.mark.parametrize(
    ('strides', 'kernel'), [((2, 1, 1, 2), 3), ((2,), 7), ((1, 2), 3), ((4, 1), 4)]
)
def test_packed_equals_one_by_one(strides, kernel, padding, monkeypatch):
    if kernel == 4 and padding == 'SYMMETRIC':
        pytest.skip('defined for odd kernels')
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        channels = [3, *range(4, 4 + len(strides))]
        x = jnp.asarray(rng.normal(size=(2, 16, 24, 3)))
        kernels = [
            (jnp.asarray(rng.normal(size=(kernel, kernel, a, b))), jnp.asarray(rng.normal(size=b)))
            for a, b in zip(channels, channels[1:], strict=False)
        ]
        options = packed.ChainOptions(strides, padding, jnp.tanh, 'conv')
        assert packed.can_pack(strides, padding, 16, 24)
        one_by_one, dense = (
            _gradients(monkeypatch, form, options, x, kernels) for form in (False, True)
        )
        chex.assert_trees_all_close(dense, one_by_one, rtol=1e-11, atol=1e-11)


def test_a_network_trains_with_the_chain_as_with_its_modules(monkeypatch):
    def forward(images):
        options = {'widths': (32,), 'depths': (1,), 'group_size': 8, 'stem_width': 16}
        network = models.create_model('NFNet-F0', 4, **options)
        return network(images, True, return_features=True)['features']['stem']

    network = hk.transform_with_state(forward)
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    shapes, state = jax.eval_shape(network.init, jax.random.key(1), images)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), shapes)

    def gradients():
        def loss(params):
            return jnp.sum(jnp.sin(network.apply(params, state, jax.random.key(2), images)[0]))

        every = jax.jit(jax.grad(loss))(params)
        return {name: leaves for name, leaves in every.items() if 'stem' in name}

    results = []
    for form in (True, False):
        monkeypatch.setattr(packed, '_by_platform', lambda function, form=form: function(form))
        results.append(gradients())
    monkeypatch.setattr(packed, 'can_pack', lambda *_: False)
    dense, one_by_one, modules = *results, gradients()
    assert len(modules) == 4
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(modules))
    chex.assert_trees_all_close(one_by_one, modules, rtol=1e-5, atol=1e-6 * scale)
    chex.assert_trees_all_close(dense, modules, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize('size', [(18, 16), (16, 18)])
def test_sizes_that_squares_do_not_divide_are_not_packed(size):
    assert not packed.can_pack((2, 1, 1, 2), 'SAME', *size)
