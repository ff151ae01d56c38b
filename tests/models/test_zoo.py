"""What holds for every family, on networks shrunk to a few channels."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax import models
from tests import versions

STAGES = {'widths': (16, 32), 'depths': (1, 1)}
# A block that changes shape and one that does not; the other families' are in the golden values.
STAGE = {'widths': (16,), 'depths': (2,)}
RATES = {'drop_rate': 0.5, 'stochdepth_rate': 0.5}
BN = {'cross_replica_axis': 'devices'}
# name: (listed name, options, whether training is random)
ZOO = {
    'NFNet': ('NFNet-F0', STAGES | RATES | {'group_size': 8}, True),
    'NFNet, one conv': (
        'NFNet-F0',
        STAGES | {'group_size': 4, 'use_two_convs': False, 'big_width': False, 'stem': 'small'}
        | {'final_conv_mult': None, 'final_conv_ch': 24, 'stochdepth_rate': 0.5},
        True,
    ),
    'NF-RegNet': ('NF-RegNet-B0', STAGE | RATES | {'group_size': 8}, True),
    'NF-ResNet': ('NF-ResNet-50', STAGES | RATES | {'width': 1, 'use_se': True}, True),
    'NF-ResNet, basic': ('NF-ResNet-8', STAGES, False),
    'NFNet, timm': (
        'eca_nfnet_l0',
        STAGES | RATES | {'group_size': 4, 'stem_width': 16},
        True,
    ),
    'NF-RegNet, timm': ('nf_regnet_b0', STAGE | RATES, True),
    'NF-ResNet, timm': ('nf_seresnet26', STAGES | RATES | {'width': 1}, True),
    'ResNet': ('ResNet-50', STAGES | RATES | BN | {'width': 1, 'use_se': True}, True),
    'ResNet, post-activation': ('ResNet-8', STAGE | BN | {'preactivation': False}, False),
    'ResNet, no norm': ('ResNet-8', STAGES | {'norm': 'none'}, False),
    'SkipInit': ('SkipInit-ResNet-50', STAGES | RATES | {'width': 1}, True),
    'SkipInit, basic': ('SkipInit-ResNet-8', STAGE, False),
    'Fixup': ('Fixup-ResNet-50', STAGE | RATES | {'width': 1}, True),
    'Fixup, basic': ('Fixup-ResNet-8', STAGES, False),
    'SmallCNN': ('SmallCNN', BN, False),
    'SmallCNN, no norm': ('SmallCNN', {'norm': 'none'}, False),
}  # fmt: skip
# Made of the parts of others.
SLOW = {'NFNet, one conv', 'NF-ResNet, basic', 'ResNet, no norm', 'SkipInit', 'Fixup, basic'}
SLOW |= {'SmallCNN, no norm', 'NF-RegNet, timm', 'NF-ResNet, timm'}


def each(slow):
    return pytest.mark.parametrize(
        'zoo_name', [pytest.param(n, marks=pytest.mark.slow if n in slow else ()) for n in ZOO]
    )


CLASSES, SIZE, BATCH = 7, 24, 8


class Network(NamedTuple):
    init: Callable
    apply: Callable
    is_random: bool
    normalises: bool


def make(zoo_name, **more):
    name, options, is_random = ZOO[zoo_name]
    options = options | more
    if name != 'SmallCNN':
        options = {'drop_rate': 0.0, 'stochdepth_rate': 0.0} | options
    transformed = hk.transform_with_state(
        lambda images, is_training: models.create_model(name, CLASSES, **options)(
            images, is_training
        )
    )
    return Network(*transformed, is_random, BN.items() <= options.items())


def images(seed=0):
    return np.random.RandomState(seed).standard_normal((BATCH, SIZE, SIZE, 3)).astype(np.float32)


@pytest.mark.parametrize(
    'zoo_name',
    ['NFNet', pytest.param('NFNet, timm', marks=pytest.mark.slow), 'NF-ResNet', 'ResNet'],
)
def test_rows_and_columns_are_treated_alike(zoo_name, random_variables):
    """Transposed images through transposed kernels: the logits of images that are not square."""
    network = make(zoo_name, **({'cross_replica_axis': None} if zoo_name == 'ResNet' else {}))
    wide = np.random.RandomState(0).standard_normal((2, 16, 40, 3)).astype(np.float32)
    params, state = random_variables(network, wide, False)
    transposed = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1) if leaf.ndim == 4 else leaf, params)

    @jax.jit
    def logits(*cases):
        return [network.apply(p, state, None, x, False)[0]['logits'] for p, x in cases]

    expected, found = logits((params, wide), (transposed, wide.swapaxes(1, 2)))
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


# Of timm's network every gradient is compared with timm's, in tests/weights/test_convert_timm.py.
@each(SLOW | {'NFNet, timm'})
def test_training(zoo_name, random_variables):
    network = make(zoo_name)
    params, state = random_variables(network, images(), True)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype('float32')}

    @functools.partial(jax.pmap, axis_name='devices', in_axes=(None, 0, None), out_axes=None)
    def train(params, images, key):
        def loss(params):
            out, new_state = network.apply(params, state, key, images, True)
            return jnp.mean(jnp.square(out['logits'] - 1)), new_state

        (loss, new_state), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.lax.pmean((loss, new_state, grads), 'devices')

    def on(devices, seed=1):
        shards = images().reshape(devices, BATCH // devices, SIZE, SIZE, 3)
        return jax.device_get(train(params, shards, jax.random.key(seed)))

    loss, new_state, grads = on(1)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.all(np.isfinite(grad)), path
        assert np.any(grad != 0), path
    assert on(1)[0] == loss
    assert (on(1, seed=2)[0] != loss) == network.is_random
    # Statistics must be those of all devices; if nothing is random, for then each draws its own.
    if network.normalises and not network.is_random:
        assert_close((loss, new_state, grads), on(4), 1e-3)


@each(SLOW)
def test_evaluation(zoo_name, random_variables):
    network = make(zoo_name)
    params, state = random_variables(network, images(), True)
    # No key: nothing may be random.
    apply = jax.jit(lambda images: network.apply(params, state, None, images, False))

    def evaluate(images):
        return jax.device_get(apply(images))

    out, same_state = evaluate(images())
    assert (out['logits'].shape, out['logits'].dtype) == ((BATCH, CLASSES), jnp.float32)
    assert (out['pool'].shape[0], out['pool'].ndim) == (BATCH, 2)
    jax.tree.map(np.testing.assert_array_equal, same_state, state)
    # One picture does not change what another gets.
    changed = images()
    changed[0] = images(1)[0]
    other = evaluate(changed)[0]['logits']
    np.testing.assert_array_equal(other[1:], out['logits'][1:])
    assert np.any(other[0] != out['logits'][0])

    low, _ = evaluate(images().astype(jnp.bfloat16))
    assert low['logits'].dtype == jnp.float32
    assert_close(low['logits'], out['logits'], 0.05)
    made, _ = jax.eval_shape(
        lambda x: network.init(jax.random.key(0), x, True), images().astype(jnp.bfloat16)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {np.dtype('float32')}


def test_a_batch_norm_in_the_stem_is_all_that_stem_bn_adds(random_variables):
    network = make('NF-ResNet, basic', stem_bn=True)
    params, state = random_variables(network, images(), True)
    of_stem = {name for name in {*params, *state} if 'initial_bn' in name}
    assert of_stem >= {*state}
    without, _ = random_variables(make('NF-ResNet, basic'), images(), True)
    assert {name: params[name].keys() for name in {*params} - of_stem} == {
        name: leaves.keys() for name, leaves in without.items()
    }
    # In training mode, what a picture gets depends on the others.
    train = jax.jit(lambda images: network.apply(params, state, None, images, True))
    (out, new_state), changed = jax.device_get(train(images())), images()
    changed[0] = images(1)[0]
    other = jax.device_get(train(changed)[0]['logits'])
    assert np.any(other[1:] != out['logits'][1:])
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    for name, leaves in state.items():
        assert np.any(new_state[name]['average'] != leaves['average']), name


def assert_close(got, want, tolerance):
    """Equal up to `tolerance` of each array's largest entry (of rounding, where that is all).

    The gradient of a bias before a batch normalization is rounding alone.
    """
    rounding = 1e-4 if versions.EXACT_SUMS else 3e-4

    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), rounding))

    jax.tree.map(check, got, want)
