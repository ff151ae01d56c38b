"""Exported programs compute what the model computes, without this package and its normal form."""

import dataclasses
import functools
import json
import subprocess
import sys

import chex
import haiku as hk
import jax
import numpy as np
import pytest

from nfnets_jax import augment, create_model
from nfnets_jax.errors import UsageError
from nfnets_jax.weights import export, pretrained
from nfnets_jax.weights.pretrained import Metadata, Weights

MODELS = {
    'NF-ResNet-8': {'widths': (8, 16), 'depths': (1, 1), 'use_se': True},
    'NFNet-F0': {'widths': (16, 32), 'depths': (1, 1), 'group_size': 8, 'stem': 'small'},
    'NF-RegNet-B0': {'widths': (16, 32), 'depths': (1, 1), 'width': 1.0},
    'ResNet-8': {'widths': (8, 16), 'depths': (1, 1)},
    'eca_nfnet_l0': {'widths': (16, 32), 'depths': (1, 1), 'group_size': 4, 'stem_width': 8},
}


@functools.cache
def trained(name: str, **options) -> Weights:
    """Weights unlike their initial values, where half of the network would be 0."""
    metadata = Metadata(model=name, num_classes=5, options=MODELS[name] | options, test_size=16)
    rng = np.random.RandomState(0)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1])
        if fan_in > 1:
            x = rng.standard_normal(leaf.shape) / np.sqrt(fan_in)
        else:
            x = rng.uniform(0.5, 1.5, leaf.shape)
        return np.asarray(x, leaf.dtype)

    return Weights(*jax.tree.map(draw, pretrained.variable_shapes(metadata)), metadata)


@functools.cache
def exported(name: str) -> bytes:
    return export.to_stablehlo(trained(name))


def load(program: bytes) -> jax.export.Exported:
    return jax.export.deserialize(bytearray(program))


def pixels(batch: int, size: int = 16) -> np.ndarray:
    return np.random.RandomState(1).uniform(0, 255, (batch, size, size, 3)).astype(np.float32)


def expected_logits(weights: Weights, pixels: np.ndarray) -> np.ndarray:
    metadata = weights.metadata
    network = hk.transform_with_state(
        lambda images: create_model(metadata.model, 5, **metadata.options)(images, False)
    )
    images = augment.normalize(pixels, metadata.mean, metadata.std)
    return jax.jit(network.apply)(weights.params, weights.state, None, images)[0]['logits']


@pytest.mark.parametrize(
    'name', ['NFNet-F0', 'ResNet-8', pytest.param('eca_nfnet_l0', marks=pytest.mark.slow)]
)
def test_the_program_gives_the_models_logits(name):
    program = load(exported(name))
    x = pixels(3)
    expected = expected_logits(trained(name), x)
    assert np.abs(expected).max() > 0.1
    chex.assert_trees_all_close(program.call(x), expected, rtol=1e-5, atol=1e-5)
    assert set(program.platforms) == set(export.PLATFORMS)


def test_a_program_for_images_that_are_not_square():
    weights = trained('NF-ResNet-8')
    metadata = dataclasses.replace(weights.metadata, test_size=(8, 24))
    x = np.random.RandomState(2).uniform(0, 255, (2, 8, 24, 3)).astype(np.float32)
    program = load(export.to_stablehlo(weights._replace(metadata=metadata)))
    chex.assert_trees_all_close(program.call(x), expected_logits(weights, x), rtol=1e-5, atol=1e-5)


def test_the_batch_size_is_free():
    program = load(exported('NF-ResNet-8'))
    x = pixels(5)
    logits = program.call(x)
    assert logits.shape == (5, 5)
    chex.assert_trees_all_close(program.call(x[:1]), logits[:1], rtol=1e-5, atol=1e-5)


def test_weights_are_standardised_once_and_not_in_the_program():
    weights = trained('NF-ResNet-8')
    program = load(exported('NF-ResNet-8')).mlir_module()
    assert 'rsqrt' not in program
    assert 'stablehlo.convolution' in program
    folded = export.fold_standardization(weights.params)
    w = folded['NF_ResNet/~/initial_conv']['w']
    gain = weights.params['NF_ResNet/~/initial_conv']['gain']
    np.testing.assert_allclose(w.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(w.var((0, 1, 2)) * 27, gain**2, rtol=1e-5)


def test_weights_that_the_model_does_not_standardise_are_not_standardised():
    weights = trained('NF-ResNet-8', standardize=False)
    x = pixels(2)
    logits = jax.jit(export.make_classifier(weights))(x)
    chex.assert_trees_all_close(logits, expected_logits(weights, x), rtol=1e-5, atol=1e-5)


def test_the_normalisation_of_the_weights_is_in_the_program():
    weights = trained('NF-ResNet-8')
    other = weights._replace(
        metadata=dataclasses.replace(weights.metadata, mean=(0.0,) * 3, std=(255.0,) * 3)
    )
    x = pixels(2)
    logits = jax.jit(export.make_classifier(other))(x)
    chex.assert_trees_all_close(logits, expected_logits(other, x), rtol=1e-5, atol=1e-5)
    assert np.abs(logits - expected_logits(weights, x)).max() > 1e-3


RUN = """
import json, sys
import jax
from jax import export
program = export.deserialize(bytearray(open('program', 'rb').read()))
logits = program.call(jax.numpy.full((2, 16, 16, 3), 100.0))
assert not {'haiku', 'nfnets_jax'} & {name.partition('.')[0] for name in sys.modules}
print(json.dumps(logits.tolist()))
"""


def test_the_program_runs_without_this_package(tmp_path):
    weights = trained('NF-ResNet-8')
    (tmp_path / 'program').write_bytes(exported('NF-ResNet-8'))
    done = subprocess.run(
        [sys.executable, '-c', RUN], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    x = np.full((2, 16, 16, 3), 100, np.float32)
    expected = expected_logits(weights, x)
    chex.assert_trees_all_close(np.array(json.loads(done.stdout)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ['NF-ResNet-8', 'NF-RegNet-B0', 'eca_nfnet_l0'])
def test_onnx_gives_the_models_logits_at_any_batch_size(name):
    pytest.importorskip('jax2onnx', reason='an optional extra')
    onnxruntime = pytest.importorskip('onnxruntime', reason='an optional extra')
    weights = trained(name)
    session = onnxruntime.InferenceSession(export.to_onnx(weights))
    x = pixels(3)
    expected = expected_logits(weights, x)
    for batch in (1, 3):
        (logits,) = session.run(['logits'], {'pixels': x[:batch]})
        np.testing.assert_allclose(logits, expected[:batch], rtol=1e-4, atol=1e-4)


def test_onnx_of_images_that_are_not_square():
    pytest.importorskip('jax2onnx', reason='an optional extra')
    onnxruntime = pytest.importorskip('onnxruntime', reason='an optional extra')
    weights = trained('NF-ResNet-8')
    metadata = dataclasses.replace(weights.metadata, test_size=(8, 24))
    session = onnxruntime.InferenceSession(export.to_onnx(weights._replace(metadata=metadata)))
    assert session.get_inputs()[0].shape[1:] == [8, 24, 3]
    x = np.random.RandomState(2).uniform(0, 255, (2, 8, 24, 3)).astype(np.float32)
    (logits,) = session.run(['logits'], {'pixels': x})
    np.testing.assert_allclose(logits, expected_logits(weights, x), rtol=1e-4, atol=1e-4)


def test_a_network_of_features_for_one_channel():
    weights = pretrained.fit_stem(trained('eca_nfnet_l0'), 1)
    metadata = dataclasses.replace(weights.metadata, num_classes=0)
    program = load(export.to_stablehlo(weights._replace(metadata=metadata)))
    x = pixels(2)[..., :1]
    images = augment.normalize(x, metadata.mean, metadata.std)
    network = pretrained.network(metadata)
    expected = jax.jit(lambda x: network.apply(weights.params, {}, None, x, False)[0])(images)
    chex.assert_trees_all_close(program.call(x), expected['pool'], rtol=1e-5, atol=1e-5)


def test_without_jax2onnx_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'jax2onnx', None)
    with pytest.raises(UsageError, match='pip install'):
        export.to_onnx(trained('NF-ResNet-8'))


def test_weights_must_have_the_size_of_their_images():
    weights = trained('NF-ResNet-8')
    metadata = dataclasses.replace(weights.metadata, test_size=None)
    with pytest.raises(UsageError, match='size of their images'):
        export.to_stablehlo(weights._replace(metadata=metadata))
