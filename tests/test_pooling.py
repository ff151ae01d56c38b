import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax import pooling


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ('window', 'stride', 'padding', 'size'),
    [
        (2, 2, 'VALID', (8, 6)),
        (2, 2, 'VALID', (7, 9)),  # The last row and column are in no window.
        (2, 3, 'SAME', (7, 8)),  # Pixels between the windows are in none either.
        (3, 1, 'SAME', (5, 4)),
        (3, 2, 'SAME', (8, 7)),
        (3, 2, 'SYMMETRIC', (8, 7)),
    ],
)
def test_max_pool_and_gradient_are_those_of_xla(window, stride, padding, size, dtype):
    # Few values, as after a ReLU: most windows have several largest elements.
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.integers(0, 3, (2, *size, 3)), dtype)

    def expected(x):
        ends = (window // 2,) * 2 if padding == 'SYMMETRIC' else (0, 0)
        x = jnp.pad(x, ((0, 0), ends, ends, (0, 0)), constant_values=-jnp.inf)
        shape, strides = (1, window, window, 1), (1, stride, stride, 1)
        return hk.max_pool(x, shape, strides, padding.replace('SYMMETRIC', 'VALID'))

    # Integers, whose sums are exact in any order.
    cotangent = jnp.asarray(draw.integers(-4, 5, expected(x).shape), dtype)

    def with_gradient(pool):
        @jax.jit
        def both(x):
            out, gradient = jax.vjp(pool, x)
            return out, gradient(cotangent)

        return both(x)

    chex.assert_trees_all_equal(
        with_gradient(lambda x: pooling.max_pool(x, window, stride, padding)),
        with_gradient(expected),
    )


def test_a_cpu_alone_compares():
    """Other platforms keep XLA's own gradient."""

    def lowered(platform):
        gradient = jax.grad(lambda x: pooling.max_pool(x, 3, 2).sum())
        shape = jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32)
        return jax.jit(gradient).trace(shape).lower(lowering_platforms=(platform,)).as_text()

    chosen = {name: 'select_and_scatter' in lowered(name) for name in ('cpu', 'cuda', 'tpu')}
    assert chosen == {'cpu': False, 'cuda': True, 'tpu': True}
