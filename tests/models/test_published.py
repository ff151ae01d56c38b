"""The networks are the published ones: names, shapes, outputs, losses and gradients.

tests/golden holds values computed with the authors' own code in float32. Parameters follow one
rule (see `reference_weights`), the input is RandomState(0), the labels are 1 and 2; dropout and
stochastic depth are off.
"""

import json
import pathlib
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nfnets_jax import models, optimizers, schedules
from tests import versions

LABELS = np.array([1, 2])
GOLDEN = pathlib.Path(__file__).parent.parent / 'golden'
# The others differ from these by what tests/models/test_zoo.py covers; gradients take most of the
# time to compile. Those of standardized weights are quickly compared with timm's
# (tests/weights/test_convert_timm.py).
QUICK, QUICK_FORWARD = {'SkipInit-ResNet-50'}, ('NFNet-F0', 'NF-ResNet-50')
GRADIENT_ROUNDING = np.finfo(np.float32).eps if versions.EXACT_SUMS else 5e-5


@pytest.fixture(autouse=True)
def _optimized_where_slow(request):
    """The gradients of NF-ResNet-50 need more exact sums than unoptimized ones."""
    if request.node.get_closest_marker('slow'):
        request.getfixturevalue('optimized')


def build(golden_name, num_classes=1000, **overrides):
    name = golden_name.removesuffix('-SE')
    if golden_name.endswith('-SE'):
        overrides['use_se'] = True
    return hk.transform_with_state(
        lambda images, is_training: models.create_model(name, num_classes, **overrides)(
            images, is_training
        )
    )


def abstract_params(network, size=32):
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(lambda rng, x: network.init(rng, x, True), jax.random.key(0), images)


def reference_weights(params):
    """Fills a tree of shapes by the rule the golden values were computed with."""

    def fill(module, name, shape):
        seed = zlib.crc32(f'{module}/{name}'.encode())
        r = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
        if name in ('gain', 'scale', 'skip_gain'):
            return 1 + np.float32(0.1) * r
        if len(shape) > 1:
            return r / np.float32(np.sqrt(np.prod(shape[:-1])))
        return np.float32(0.1) * r

    return {
        module: {name: fill(module, name, leaf.shape) for name, leaf in leaves.items()}
        for module, leaves in params.items()
    }


class Golden(NamedTuple):
    values: Mapping[str, np.ndarray]
    network: hk.TransformedWithState
    params: dict
    state: dict
    images: np.ndarray


def golden_case(name):
    golden = np.load(GOLDEN / f'{name}.npz')
    size = int(golden['image_size'])
    images = np.random.RandomState(0).standard_normal((2, size, size, 3)).astype(np.float32)
    network = build(name, drop_rate=0.0, stochdepth_rate=0.0)
    params, state = abstract_params(network, size)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)
    return Golden(golden, network, reference_weights(params), state, images)


def norms(tree):
    """Per-leaf norms in float64, {'module:name': norm}."""
    return {
        f'{module}:{name}': np.linalg.norm(np.asarray(leaf, np.float64))
        for module, leaves in tree.items()
        for name, leaf in leaves.items()
    }


def assert_close(got, want, rtol=1e-4):
    """|got - want| <= rtol * max |want|: relative to the array, as logits cross zero."""
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())


@pytest.mark.parametrize(
    'path', sorted((GOLDEN / 'param_trees').glob('*.json')), ids=lambda p: p.stem
)
def test_names_and_shapes(path):
    params, _ = abstract_params(build(path.stem))
    shapes = {m: {n: list(p.shape) for n, p in leaves.items()} for m, leaves in params.items()}
    assert shapes == json.loads(path.read_text())


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
        for path in sorted(GOLDEN.glob('*Net-*.npz'))
        if not path.stem.startswith(('timm', 'trajectory'))
    ],
)
def test_outputs_loss_and_gradients(name):
    golden, network, params, state, images = golden_case(name)

    def loss_fn(params):
        logits = network.apply(params, state, None, images, True)[0]['logits']
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
        # In one program: what evaluation has in common with training is not compiled twice.
        evaluated = network.apply(params, state, None, images, False)[0]
        return losses.mean(), (logits, evaluated)

    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, (logits, evaluated)), grads = step(params)
    assert_close(logits, golden['logits_train'])
    assert_close(loss, golden['loss'])
    want = dict(zip(golden['grad_names'].tolist(), golden['grad_norms'].tolist(), strict=True))
    got = norms(grads)
    assert got.keys() == want.keys()
    # The smallest, of gains, are differences of large terms: no better than float32 has the whole.
    whole = np.linalg.norm(golden['grad_norms'])
    np.testing.assert_allclose(
        [got[k] for k in want],
        list(want.values()),
        rtol=1e-4,
        atol=GRADIENT_ROUNDING * whole,
    )
    if 'logits_eval' in golden:  # Not for batch normalisation, which has no statistics yet.
        assert_close(evaluated['logits'], golden['logits_eval'])
        assert_close(evaluated['pool'], golden['pool_eval'])


@pytest.mark.parametrize('name', QUICK_FORWARD)
def test_outputs_and_loss(name):
    golden, network, params, state, images = golden_case(name)

    @jax.jit
    def forward(params):
        out, _ = network.apply(params, state, None, images, True)
        losses = optax.softmax_cross_entropy_with_integer_labels(out['logits'], LABELS)
        return out, losses.mean()

    out, loss = forward(params)
    assert_close(out['logits'], golden['logits_train'])
    assert_close(loss, golden['loss'])
    if (
        'pool_eval' in golden
    ):  # Without normalisation, nothing being random, training pools the same.
        assert_close(out['pool'], golden['pool_eval'])


@pytest.mark.slow
def test_trajectory_of_sgd_with_agc():
    """Six steps of F0 at 64 pixels with the published optimizer and parameter groups."""
    golden = np.load(GOLDEN / 'trajectory-NFNet-F0.npz')
    random = np.random.RandomState(1)
    images = random.standard_normal((6, 4, 64, 64, 3)).astype(np.float32)
    labels = random.randint(0, 10, (6, 4))
    network = build('NFNet-F0', 10, drop_rate=0.0, stochdepth_rate=0.0)
    params = reference_weights(abstract_params(network, 64)[0])
    config = optimizers.default_config() | {
        'learning_rate': 0.05,
        'scale_lr_by_batch': False,
        'schedule': schedules.default_config() | {'warmup': '2 steps'},
    }
    optimizer = optimizers.create(
        config, params, batch_size=4, steps_per_epoch=6, total_steps=6
    ).transformation

    @jax.jit
    def step(params, opt_state, images, labels):
        def loss_fn(params):
            logits = network.apply(params, {}, None, images, True)[0]['logits']
            targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1)
            return optax.softmax_cross_entropy(logits, targets).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, losses = optimizer.init(params), []
    for batch in zip(images, labels, strict=True):
        params, opt_state, loss = step(params, opt_state, *batch)
        losses.append(float(loss))
    np.testing.assert_allclose(losses, golden['losses'], rtol=1e-4)
    want = dict(zip(golden['param_names'].tolist(), golden['param_norms'].tolist(), strict=True))
    got = norms(params)
    assert got.keys() == want.keys()
    np.testing.assert_allclose([got[k] for k in want], list(want.values()), rtol=1e-4)
