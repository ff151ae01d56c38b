import jax
import numpy as np
import pytest


@pytest.fixture
def random_variables():
    """Fills a network's parameters and state from a fixed seed, in numpy.

    Compiling Haiku's init takes longer than most tests, and its zeros (skip gains, classifiers)
    hide the layers behind them.
    """

    def fill(network, *args):
        shapes = jax.eval_shape(lambda key: network.init(key, *args), jax.random.key(0))
        rng = np.random.RandomState(0)

        def draw(path, leaf):
            module, name = (key.key for key in path[-2:])
            if leaf.dtype == np.int32:
                return np.ones(leaf.shape, np.int32)
            noise = 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)
            if name in ('hidden', 'average'):  # batch norm's running statistics
                return 1 + np.abs(noise) if module.endswith('var_ema') else noise
            if name in ('gain', 'scale', 'skip_gain'):
                return 1 + noise
            fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 1
            return 10 * noise / np.sqrt(fan_in, dtype=np.float32) if fan_in > 1 else noise

        return jax.tree_util.tree_map_with_path(draw, shapes)

    return fill
