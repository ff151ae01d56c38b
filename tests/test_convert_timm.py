"""timm's names and networks: logits of the golden state dicts, and every kind of array once."""

import json
import pathlib
import zlib

import chex
import haiku as hk
import jax
import numpy as np
import pytest

from nfnets_jax import convert_timm, create_model, pretrained
from nfnets_jax.errors import UsageError

GOLDEN = pathlib.Path(__file__).parent / 'golden'


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


@pytest.mark.parametrize(
    ('file', 'model', 'tolerance'),
    [('dm_nfnet_f0', 'NFNet-F0', 2e-3), ('nf_resnet50', 'NF-ResNet-50', 1e-5)],
)
def test_logits_are_timms(file, model, tolerance):
    golden = np.load(GOLDEN / f'timm-{file}.npz')
    params, options, added = convert_timm.convert(golden_state_dict(golden))
    assert len(params) == len(golden['names']) + len(added)
    network = hk.without_apply_rng(
        hk.transform(lambda images: create_model(model, 1000, **options)(images, False))
    )
    size = int(golden['image_size'])
    images = np.random.RandomState(0).standard_normal((2, size, size, 3)).astype(np.float32)
    logits = jax.jit(network.apply)(pretrained.unflatten(params), images)['logits']
    scale = np.abs(golden['logits']).max()
    assert np.abs(logits - golden['logits']).max() / scale < tolerance


@pytest.mark.parametrize(
    ('file', 'size', 'mode'),
    [('dm_nfnet_f0', 256, 'timm_squash_0.9'), ('nf_resnet50', 288, 'timm_center_0.94')],
)
def test_timms_weights_are_evaluated_as_timm_does(file, size, mode, monkeypatch):
    golden = np.load(GOLDEN / f'timm-{file}.npz')
    shapes = zip(golden['names'].tolist(), map(json.loads, golden['shapes']), strict=True)
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes}
    monkeypatch.setattr(pretrained.weight_files, 'read', lambda path: (arrays, {}))
    metadata = pretrained.load_pretrained('weights').metadata
    assert (metadata.test_size, metadata.eval_mode) == (size, mode)


def state_dict(metadata: pretrained.Metadata, *, attention: str) -> dict[str, np.ndarray]:
    """A state dict of timm's for a model of ours, by the inverse of the names."""
    inverse = {ours: theirs for theirs, ours in convert_timm._IN_BLOCK.items()}
    inverse |= {'squeeze_excite/~/linear': f'{attention}.fc1'}
    inverse |= {'squeeze_excite/~/linear_1': f'{attention}.fc2'}
    depths = pretrained.models.variant_info(metadata.model).depths
    stages = [(s, b) for s, depth in enumerate(depths) for b in range(depth)]
    arrays = {}
    for path, leaf in pretrained.flatten(pretrained.variable_shapes(metadata)[0]).items():
        _, _, module = path.partition('/~/')
        module, _, name = module.rpartition('/')
        block, _, rest = module.partition('/~/')
        x = np.random.RandomState(zlib.crc32(path.encode())).uniform(0.5, 1.5, leaf.shape)
        if 'block' in block:
            if name == 'skip_gain':
                continue
            index = int(block.rpartition('_')[2]) if block[-1].isdigit() else 0
            theirs = f'stages.{stages[index][0]}.{stages[index][1]}.{inverse[rest]}'
        else:
            theirs = {'initial_conv': 'stem.conv', 'linear': 'head.fc'}.get(module, module)
        is_attention = attention in theirs
        if name == 'w':
            x = x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T
            x = x[..., None, None] if is_attention else x
        elif name == 'gain':
            x = x.reshape(-1, 1, 1, 1)
        ours = {'w': 'weight', 'b': 'bias', 'bias': 'bias', 'gain': 'gain'}[name]
        arrays[f'{theirs}.{ours}'] = x.astype(np.float32)
    return arrays


def test_a_regnet_has_all_its_arrays_and_timms_widths(tmp_path):
    metadata = pretrained.Metadata(
        model='NF-RegNet-B1', num_classes=7, options={'conventions': 'timm'}
    )
    arrays = state_dict(metadata, attention='attn')
    # What is public of timm's nf_regnet_b1: 10.22 million parameters with 1000 classes.
    head = arrays['head.fc.weight'].shape[1] + 1
    assert sum(x.size for x in arrays.values()) + 993 * head == 10_223_984
    assert arrays['stages.3.0.conv3.weight'].shape[0] == 328
    with open(tmp_path / 'nf_regnet_b1.npz', 'wb') as file:
        np.savez(file, **arrays)
    weights = pretrained.load_pretrained(tmp_path / 'nf_regnet_b1.npz')
    assert weights.metadata.model == 'NF-RegNet-B1'
    assert weights.metadata.options == {'conventions': 'timm'}
    assert weights.metadata.test_size == 288
    assert weights.metadata.eval_mode == 'timm_center_0.9'
    assert len(weights.added) == 20
    assert all(name.endswith('skip_gain') for name in weights.added)
    squeeze = weights.params['NF_RegNet/~/nf_block_3/~/squeeze_excite/~/linear']
    chex.assert_trees_all_equal(squeeze['w'], arrays['stages.1.1.attn.fc1.weight'][:, :, 0, 0].T)
    chex.assert_trees_all_equal(squeeze['b'], arrays['stages.1.1.attn.fc1.bias'])


@pytest.mark.parametrize(
    ('change', 'named'),
    [
        (lambda a: a | {'stages.0.0.attn_last.conv.weight': np.ones((1, 1, 3))}, 'attn_last.conv'),
        (lambda a: a | {'stages.0.1.bn1.running_mean': np.ones(4)}, 'running_mean'),
        (lambda a: a | {'final_norm.weight': np.ones(4)}, 'final_norm'),
        (lambda a: a | {'head.fc.weight': np.ones((10, 4, 2, 2))}, 'head.fc.weight'),
        (lambda a: a | {'stem.conv1.weight': np.ones((8, 3, 3, 3))}, 'skipinit_gain'),
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
