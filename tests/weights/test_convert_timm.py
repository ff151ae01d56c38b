"""timm's names and networks: logits of the golden state dicts, and every kind of array once."""

import functools
import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nfnets_jax import build, from_pretrained
from nfnets_jax.data.preprocessing import make_transform
from nfnets_jax.errors import UsageError
from nfnets_jax.weights import convert_timm, pretrained

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'


@pytest.fixture(autouse=True)
def _optimized_where_slow(request):
    """Large networks are computed as users do; the quick ones pass without."""
    if request.node.get_closest_marker('slow'):
        request.getfixturevalue('optimized')


def golden_state_dict(golden) -> dict[str, np.ndarray]:
    """Fills the golden file's names and shapes by its rule, see tests/golden."""
    arrays = {}
    for name, shape in zip(
        golden['names'].tolist(), map(json.loads, golden['shapes']), strict=True
    ):
        r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        r = np.asarray(r, np.float32)
        if 'gain' in name:
            r = 1 + 0.1 * r
        elif r.ndim > 1:
            r = r / np.sqrt(np.prod(shape[1:]), dtype=np.float32)
        else:
            r = 0.1 * r
        arrays[name] = np.asarray(r, np.float32)
    return arrays


# Largest difference over the largest logit. The GELU of dm_nfnet is another function.
TOLERANCES = {'dm_nfnet_f0': 2e-3}
QUICK = {'test_nfnet', 'nf_regnet_b1'}  # The others are made of the same parts.
FILES = {
    *('test_nfnet', 'nfnet_l0', 'eca_nfnet_l0', 'eca_nfnet_l2', 'dm_nfnet_f0'),
    *('nf_resnet50', 'nf_seresnet50', 'nf_ecaresnet26', 'nf_regnet_b1'),
}


@pytest.mark.parametrize(
    'file', [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in sorted(FILES)]
)
def test_logits_are_timms(file):
    golden = np.load(GOLDEN / f'timm-{file}.npz')
    params = convert_timm.convert(golden_state_dict(golden))
    assert len(params) == len(golden['names'])
    network = build(file, 1000)
    size = int(golden['image_size'])
    images = np.random.RandomState(0).standard_normal((2, size, size, 3)).astype(np.float32)
    apply = jax.jit(lambda params: network.apply(params, {}, None, images, False)[0]['logits'])
    logits = apply(pretrained.unflatten(params))
    scale = np.abs(golden['logits']).max()
    assert np.abs(logits - golden['logits']).max() / scale < TOLERANCES.get(file, 1e-5)


@pytest.fixture(scope='module')
def test_nfnet(tmp_path_factory):
    """The golden weights of test_nfnet, in a file."""
    arrays = golden_state_dict(np.load(GOLDEN / 'timm-test_nfnet.npz'))
    path = tmp_path_factory.mktemp('weights') / 'model.safetensors'
    pretrained.weight_files.write_safetensors(path, arrays, {})
    return path


def test_gradients_and_features_are_timms(test_nfnet):
    """Against timm 1.0.31: what training sees, and the output of every stage."""
    golden = np.load(GOLDEN / 'timm-test_nfnet-gradients.npz')
    network, params, state, _ = from_pretrained(test_nfnet)
    images = np.random.RandomState(0).standard_normal((2, 64, 64, 3)).astype(np.float32)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        outputs, _ = network.apply(params, state, None, images, False, return_features=True)
        log_probabilities = jax.nn.log_softmax(outputs['logits'])
        return -(log_probabilities[0, 1] + log_probabilities[1, 2]) / 2, outputs

    (value, outputs), grads = loss(params)
    assert value == pytest.approx(float(golden['loss']), rel=1e-6)
    np.testing.assert_allclose(outputs['pool'], golden['pool'], rtol=1e-4, atol=1e-6)
    for name in ('stem', 'stage1', 'stage2', 'stage3'):
        norm = np.linalg.norm(outputs['features'][name])
        assert norm == pytest.approx(float(golden[name]), rel=1e-5)
    # In timm's order, which conversion keeps. Near 1, as gains hold timm's epsilon of variances.
    shapes = golden_state_dict(np.load(GOLDEN / 'timm-test_nfnet.npz'))
    names = dict(zip(golden['names'].tolist(), convert_timm.convert(shapes), strict=True))
    grads = pretrained.flatten(grads)
    for theirs, norm in zip(golden['names'].tolist(), golden['grad_norms'], strict=True):
        assert np.linalg.norm(grads[names[theirs]]) == pytest.approx(norm, rel=5e-3), theirs


def test_metadata_are_timms(test_nfnet):
    metadata = pretrained.load_pretrained(test_nfnet, 'test_nfnet').metadata
    assert metadata == pretrained.Metadata(
        model='test_nfnet',
        num_classes=1000,
        train_size=160,
        test_size=160,
        eval_mode='timm_center_0.95',
        mean=(127.5, 127.5, 127.5),
        std=(127.5, 127.5, 127.5),
    )


@pytest.mark.parametrize(
    ('file', 'model', 'size', 'mode'),
    [
        ('dm_nfnet_f0', 'NFNet-F0', 256, 'timm_squash_0.9'),
        ('nf_resnet50', 'nf_resnet50', 288, 'timm_center_0.94'),
        ('nf_regnet_b1', 'nf_regnet_b1', 288, 'timm_center_0.9'),
        pytest.param(
            *('nf_seresnet50', 'nf_seresnet50', 224, 'timm_center_0.9'), marks=pytest.mark.slow
        ),
        pytest.param(
            *('eca_nfnet_l2', 'eca_nfnet_l2', 384, 'timm_center_1.0'), marks=pytest.mark.slow
        ),
        ('nfnet_l0', 'nfnet_l0', 288, 'timm_center_1.0'),
    ],
)
def test_timms_weights_are_recognised(file, model, size, mode, monkeypatch):
    golden = np.load(GOLDEN / f'timm-{file}.npz')
    shapes = zip(golden['names'].tolist(), map(json.loads, golden['shapes']), strict=True)
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes}
    monkeypatch.setattr(pretrained.weight_files, 'read', lambda path: (arrays, {}))
    metadata = pretrained.load_pretrained('weights.pth', file).metadata  # by its alias as well
    assert (metadata.model, metadata.options) == (model, {})
    assert (metadata.test_size, metadata.eval_mode) == (size, mode)
    make_transform(metadata.eval_mode, metadata.test_size)


def test_a_branch_starts_closed_by_the_gain_of_its_last_convolution():
    network = build('test_nfnet', 10, widths=(32, 32), depths=(1, 2), stem_width=16)

    @jax.jit
    def initial_gains():  # Without the rest, no random number is compiled.
        params, _ = network.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32), True)
        named = {f'{module}/{name}': x for module in params for name, x in params[module].items()}
        return {name: leaf for name, leaf in named.items() if 'gain' in name}

    gains = jax.device_get(initial_gains())
    assert len(gains) > 9
    assert not any('skip_gain' in name for name in gains)
    for name, gain in gains.items():
        np.testing.assert_array_equal(gain, 0 if name.endswith('/conv2/gain') else 1, name)


@pytest.mark.parametrize('channels', [1, 2, 4, 7])
def test_a_stem_is_fitted_to_other_channels_as_timm_does(channels, test_nfnet):
    weight = golden_state_dict(np.load(GOLDEN / 'timm-test_nfnet.npz'))['stem.conv1.weight']
    if channels == 1:  # timm's adapt_input_conv, in its layout OIHW
        expected = weight.sum(1, keepdims=True)
    else:
        repeated = np.tile(weight, (1, -(-channels // 3), 1, 1))[:, :channels]
        expected = repeated * np.float32(3 / channels)
    network, params, state, metadata = from_pretrained(test_nfnet, num_classes=0, channels=channels)
    stem = params['NFNet/~/stem_conv0']['w']
    np.testing.assert_array_equal(stem.transpose(3, 2, 0, 1), expected)
    assert (metadata.channels, metadata.num_classes) == (channels, 0)
    assert metadata.mean == metadata.std == (127.5,) * channels
    images = jax.ShapeDtypeStruct((2, 32, 32, channels), jnp.float32)
    outputs, _ = jax.eval_shape(
        lambda images: network.apply(params, state, None, images, False), images
    )
    assert {name: leaf.shape for name, leaf in outputs.items()} == {'pool': (2, 192)}


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        (lambda a: a | {'stages.0.0.attn_last.mlp.weight': np.ones((1, 1, 3))}, 'attn_last.mlp'),
        (lambda a: a | {'stages.0.0.attn_last.conv.weight': np.ones((1, 3))}, 'attn_last.conv'),
        (lambda a: a | {'stages.0.1.bn1.running_mean': np.ones(4)}, 'running_mean'),
        (lambda a: a | {'final_norm.weight': np.ones(4)}, 'final_norm'),
        (lambda a: a | {'head.fc.weight': np.ones((10, 4, 2, 2))}, 'head.fc.weight'),
    ],
)
def test_other_networks_of_timm_are_refused_by_name(change, named):
    arrays = {
        'stem.conv.weight': np.ones((4, 3, 7, 7)),
        'stages.0.0.conv1.weight': np.ones((4, 4, 1, 1)),
        'head.fc.weight': np.ones((10, 4)),
    }
    with pytest.raises(UsageError, match=named):
        convert_timm.convert(change(arrays))


def test_only_timms_names_are_taken_for_timms():
    assert convert_timm.is_timm(['stem.conv.weight', 'stages.0.0.conv1.weight'])
    assert not convert_timm.is_timm(['NFNet/~/stem_conv0/w', 'layer1.0.conv1.weight'])


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('NF-ResNet-50', {'widths': (16, 16), 'depths': (1, 2)}),
        ('NF-RegNet-B0', {'widths': (16, 16), 'depths': (1, 2)}),
        ('NFNet-F0', {'widths': (16, 16), 'depths': (1, 2), 'group_size': 8}),
    ],
)
def test_with_skip_gains_a_network_computes_the_same(name, options):
    network = build(name, 5, conventions='timm_gains', **options)
    images = np.random.RandomState(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    rng = np.random.RandomState(1)
    params = jax.tree.map(
        lambda x: 0.5 * rng.standard_normal(x.shape).astype(np.float32),
        jax.eval_shape(lambda: network.init(jax.random.key(0), images, True))[0],
    )
    activation = {'NF-ResNet-50': 'relu', 'NF-RegNet-B0': 'silu', 'NFNet-F0': 'gelu'}[name]
    other = build(name, 5, conventions='timm', **options)

    @jax.jit
    def logits(params, converted):
        both = ((network, params), (other, converted))
        return [each.apply(p, {}, None, images, False)[0]['logits'] for each, p in both]

    expected, found = logits(params, convert_timm.to_skip_gains(params, activation))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_crops_are_timms():
    crops = [mode.rpartition('_')[2] for mode in convert_timm.EVAL_MODES.values()]
    assert crops == ['0.9', '0.91', '0.92', '0.94', '0.951', '0.954', '0.956']
    assert set(convert_timm.EVAL_MODES) == {f'NFNet-F{level}' for level in range(7)}


@pytest.mark.parametrize('shape', [(5, 7), (5, 7, 1, 1)])
def test_linear_layers_have_two_axes_or_are_convolutions_of_one_pixel(shape):
    weight = np.arange(35, dtype=np.float32).reshape(shape)
    name, found = convert_timm._parameter('head', 'NFNet/~/linear', 'weight', weight)
    assert name == 'NFNet/~/linear/w'
    np.testing.assert_array_equal(found, weight.reshape(5, 7).T)
