"""Weights of every kind come in, are recognised, and fit a model; nothing is skipped silently."""

import dataclasses
import json
import pathlib
import pickle
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.run.checkpoints import Checkpoints
from nfnets_jax import from_pretrained, load_pretrained, models
from nfnets_jax.convolution import conv
from nfnets_jax.errors import UsageError
from nfnets_jax.weights import pretrained
from nfnets_jax.weights.pretrained import Metadata, Weights, fit_weights, save_weights

EVAL_MODES = {'NFNet-F0': 'resize_crop_32'}
TREES = pathlib.Path(__file__).parents[1] / 'golden' / 'param_trees'
SMALL = Metadata(
    model='NF-ResNet-8',
    options={'width': 0.5},
    num_classes=3,
    class_names=('cat', 'dog', 'owl'),
    train_size=24,
    test_size=32,
    eval_mode='resize_crop_8',
    mean=(1.0, 2.0, 3.0),
    std=(4.0, 5.0, 6.0),
)


def random_weights(metadata: Metadata) -> Weights:
    def fill(path, leaf):
        seed = zlib.crc32(jax.tree_util.keystr(path).encode())
        x = np.random.RandomState(seed).standard_normal(leaf.shape)
        return x.astype(leaf.dtype)

    shapes = pretrained.variable_shapes(metadata)
    return Weights(*jax.tree.map_with_path(fill, shapes), metadata)


@pytest.fixture
def weights() -> Weights:
    return random_weights(SMALL)


def authors_tree(name: str) -> dict:
    shapes = json.loads((TREES / f'{name}.json').read_text())
    return {
        module: {leaf: np.zeros(shape, np.float32) for leaf, shape in leaves.items()}
        for module, leaves in shapes.items()
    }


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        pytest.param('NFNet-F0', {}, marks=pytest.mark.slow),
        ('NF-RegNet-B0', {}),
        pytest.param('NF-ResNet-50', {}, marks=pytest.mark.slow),
        ('NF-ResNet-50-SE', {'use_se': True}),
        ('ResNet-50', {}),
    ],
)
def test_the_authors_files_are_recognised(name, options, tmp_path):
    path = tmp_path / 'F0_haiku.npz'  # named like an archive, but a pickle
    tree = authors_tree(name)
    path.write_bytes(pickle.dumps(tree, protocol=4))
    weights = load_pretrained(path)
    assert weights.metadata.model == name.removesuffix('-SE')
    assert weights.metadata.options == options
    assert weights.metadata.num_classes == 1000
    assert weights.metadata.test_size == {'NFNet-F0': 256}.get(name, 224)
    assert weights.metadata.eval_mode == EVAL_MODES.get(name, 'crop_resize')
    chex.assert_trees_all_equal(weights.params, tree)


def test_the_evaluation_mode_follows_the_model_unless_it_is_given():
    for name in models.list_models():
        is_timms = models.variant_info(name).base is not None
        expected = 'resize_crop_32' if name.startswith('NFNet') else 'crop_resize'
        if is_timms:
            expected = models.variant_info(name).eval_mode
            assert expected.startswith('timm_center_')
        assert Metadata(model=name).eval_mode == expected
    assert Metadata().eval_mode == Metadata(model='unknown').eval_mode == 'crop_resize'
    told = '{"model": "NFNet-F0", "eval_mode": "crop_resize"}'  # As earlier versions wrote.
    assert pretrained.decode_metadata(told, 'w').eval_mode == 'crop_resize'


def test_parameters_of_no_known_model_are_read_all_the_same(tmp_path):
    tree = authors_tree('NF-ResNet-50')
    del tree['NF_ResNet/~/nf_res_block_2/~/conv1']
    path = tmp_path / 'w.npz'
    path.write_bytes(pickle.dumps(tree))
    assert load_pretrained(path).metadata == Metadata(num_classes=1000)
    with pytest.raises(
        UsageError, match=r'w.npz .*NF-ResNet-50: .*missing, like .*block_2/~/conv1'
    ):
        load_pretrained(path, 'NF-ResNet-50')


def test_a_hostile_file_is_refused_by_its_name(tmp_path):
    class Hostile:
        def __reduce__(self):
            return exec, ('raise SystemExit',)

    path = tmp_path / 'F0_haiku.npz'
    path.write_bytes(pickle.dumps({'NFNet/~/linear': {'w': Hostile()}}))
    with pytest.raises(UsageError, match=r'F0_haiku\.npz .*builtins\.exec, which is not run'):
        load_pretrained(path)


def test_own_files_come_back_whole(weights, tmp_path):
    save_weights(tmp_path / 'w.safetensors', weights)
    again = load_pretrained(tmp_path / 'w.safetensors', 'NF-ResNet-8')
    chex.assert_trees_all_equal(again.params, weights.params)
    assert again.metadata == SMALL


def test_metadata_of_own_files_are_read_without_the_arrays(weights, tmp_path, monkeypatch):
    save_weights(tmp_path / 'w.safetensors', weights)
    monkeypatch.delattr(pretrained, '_load_file')
    assert pretrained.load_metadata(tmp_path / 'w.safetensors', 'NF-ResNet-8') == SMALL
    with pytest.raises(UsageError, match='NF-ResNet-14'):
        pretrained.load_metadata(tmp_path / 'w.safetensors', 'NF-ResNet-14')


def test_the_state_of_batch_norm_travels_too(tmp_path):
    weights = random_weights(Metadata(model='ResNet-8', num_classes=2, options={'width': 0.5}))
    save_weights(tmp_path / 'w.safetensors', weights)
    again = load_pretrained(tmp_path / 'w.safetensors')
    chex.assert_trees_all_equal(again.state, weights.state)
    chex.assert_trees_all_equal_dtypes(again.state, weights.state)
    both = pretrained.flatten(weights.params) | pretrained.flatten(weights.state)
    np.savez(tmp_path / 'plain.npz', **both)
    plain = load_pretrained(tmp_path / 'plain.npz')
    chex.assert_trees_all_equal((plain.params, plain.state), (weights.params, weights.state))


def test_a_plain_npz_is_recognised_and_made_float32(tmp_path):
    weights = random_weights(Metadata(model='NF-ResNet-14', num_classes=5))
    halves = {name: x.astype(np.float16) for name, x in pretrained.flatten(weights.params).items()}
    np.savez(tmp_path / 'w.npz', **halves)
    again = load_pretrained(tmp_path / 'w.npz')
    assert (again.metadata.model, again.metadata.num_classes) == ('NF-ResNet-14', 5)
    assert {x.dtype for x in jax.tree.leaves(again.params)} == {np.dtype(np.float32)}
    chex.assert_trees_all_close(again.params, weights.params, atol=2e-3)


def test_another_model_than_the_one_named_is_told(weights, tmp_path):
    save_weights(tmp_path / 'w', weights)
    with pytest.raises(UsageError, match='weights of NFNet-F0: they are those of NF-ResNet-8'):
        load_pretrained(tmp_path / 'w', 'NFNet-F0')
    with pytest.raises(UsageError, match="did you mean 'NFNet-F0'"):
        load_pretrained(tmp_path / 'w', 'NFNet-f0')


_RANGES = ('5', '"ab"', '[1]', '[2, 1]', '[0, NaN]', '[0, 1' + '0' * 400 + ']', '[0, "x"]')


@pytest.mark.filterwarnings('ignore:overflow')  # a width of 1e300
@pytest.mark.parametrize(
    ('metadata', 'named'),
    [
        ('{', 'cannot be read'),
        ('[1]', 'cannot be read'),
        ('{"modell": "x"}', "did you mean 'model'"),
        ('{"model": "NFNet-F9", "num_classes": 3}', 'NFNet-F'),
        ('{"model": "NF-ResNet-8", "num_classes": 3}', 'does not fit NF-ResNet-8'),
        ('{"model": ["x"]}', "model is \\['x'\\]"),
        ('{"options": {"num_classes": 3}}', 'options is'),
        ('{"options": [1]}', 'options is'),
        ('{"test_size": "big"}', "test_size is 'big'"),
        ('{"eval_mode": 3}', 'eval_mode is 3'),
        ('{"mean": [1, 2]}', 'mean is'),
        ('{"std": [0, 0, 0]}', 'std is'),
        *((f'{{"value_range": {value}}}', 'value_range is') for value in _RANGES),
        ('{"class_names": ["a"], "num_classes": 3}', 'name 1 of 3 classes'),
        ('[' * 100_000, 'cannot be read'),
        ('{"train_size": ' + '1' * 5000 + '}', 'cannot be read'),
        ('{"mean": [1, 1, 1' + '0' * 400 + ']}', 'mean is'),
        (
            '{"model": "NF-ResNet-8", "num_classes": 1000000}',
            'does not fit NF-ResNet-8: .* new head',
        ),
        (
            '{"model": "NF-ResNet-8", "num_classes": 3, "options": {"foo": 1}}',
            'w.safetensors: .*: unknown key foo of NF-ResNet-8',
        ),
        (
            '{"model": "NF-ResNet-8", "num_classes": 3, "options": {"width": 1e300}}',
            'w.safetensors: its metadata describe no model',
        ),
    ],
)
def test_wrong_metadata_are_named(metadata, named, weights, tmp_path):
    arrays = {f'params/{name}': x for name, x in pretrained.flatten(weights.params).items()}
    path = tmp_path / 'w.safetensors'
    pretrained.weight_files.write_safetensors(path, arrays, {'nfnets_jax': metadata})
    with pytest.raises(UsageError, match=named):
        load_pretrained(path)


@pytest.mark.parametrize(
    'array',
    [
        np.array(['a', 'b']),
        np.ones((2, 2), complex),
        np.zeros(2, 'datetime64[s]'),
        np.ones((2, 2), jnp.bfloat16),  # as void in an .npz
    ],
)
def test_arrays_that_are_not_numbers_are_named(array, tmp_path):
    np.savez(tmp_path / 'w.npz', **{'NFNet/~/linear/w': array})
    with pytest.raises(UsageError, match='NFNet/~/linear/w holds .*, not numbers'):
        load_pretrained(tmp_path / 'w.npz')


def test_a_part_of_a_timm_state_dict_is_told(tmp_path):
    np.savez(tmp_path / 'w.npz', **{'stages.0.0.conv1.weight': np.ones((4, 4, 1, 1), np.float32)})
    with pytest.raises(UsageError, match='not whole|holds'):
        load_pretrained(tmp_path / 'w.npz')


@pytest.mark.parametrize('stage', ['999999999', '9' * 5000])
def test_a_stage_number_out_of_reason_is_told(stage, tmp_path):
    names = ['stages.0.0.conv1.weight', f'stages.{stage}.0.conv1.weight']
    weights = dict.fromkeys(names, np.ones((4, 4, 1, 1), np.float32))
    pretrained.weight_files.write_safetensors(tmp_path / 'w', weights, {})
    with pytest.raises(UsageError, match='w: .*not whole'):
        load_pretrained(tmp_path / 'w')


def test_a_head_for_other_classes_is_left_as_it_is(weights):
    target = random_weights(dataclasses.replace(SMALL, num_classes=7, class_names=()))
    params, state, report = fit_weights(weights, target.params, target.state)
    head = 'NF_ResNet/~/linear'
    assert report.new_head == (f'{head}/b', f'{head}/w')
    assert report.fits
    assert set(report.matched) == pretrained.flatten(weights.params).keys() - set(report.new_head)
    chex.assert_trees_all_equal(params[head], target.params[head])
    chex.assert_trees_all_equal(
        {module: leaves for module, leaves in params.items() if module != head},
        {module: leaves for module, leaves in weights.params.items() if module != head},
    )
    assert state == {}


def test_a_network_of_features_needs_no_head(weights):
    target = random_weights(dataclasses.replace(SMALL, num_classes=0, class_names=()))
    _, _, report = fit_weights(weights, target.params, target.state)
    assert report.unused_head == ('NF_ResNet/~/linear/b', 'NF_ResNet/~/linear/w')
    assert report.fits
    assert str(report).endswith('; 2 unused head')


def test_from_pretrained(weights, tmp_path):
    save_weights(tmp_path / 'w.safetensors', weights)
    network, params, state, metadata = from_pretrained(tmp_path / 'w.safetensors', 'NF-ResNet-8')
    chex.assert_trees_all_equal(params, weights.params)
    assert metadata == SMALL
    images = np.random.RandomState(0).standard_normal((2, 8, 8, 3)).astype(np.float32)

    def apply(network, params, state):
        evaluate = jax.jit(lambda p, s: network.apply(p, s, None, images, False)[0])
        return evaluate(params, state)

    pool = apply(network, params, state)['pool']
    # With another head, or none, the rest is the same.
    for num_classes in (7, 0):
        network, params, state, metadata = from_pretrained(
            tmp_path / 'w.safetensors', num_classes=num_classes
        )
        assert (metadata.num_classes, metadata.class_names) == (num_classes, ())
        outputs = apply(network, params, state)
        np.testing.assert_allclose(outputs['pool'], pool, rtol=1e-5)
        if num_classes:
            assert outputs['logits'].shape == (2, 7)
            assert 0.005 < np.std(params['NF_ResNet/~/linear']['w']) < 0.02  # as drawn
        else:
            assert 'logits' not in outputs
    with pytest.raises(UsageError, match='weights of NFNet-F0: they are those of NF-ResNet-8'):
        from_pretrained(tmp_path / 'w.safetensors', 'dm_nfnet_f0')


def test_weights_for_other_channels_travel(weights, tmp_path):
    fitted = pretrained.fit_stem(weights, 1)
    assert fitted.metadata.mean == (2.0,)
    save_weights(tmp_path / 'w.safetensors', fitted)
    again = load_pretrained(tmp_path / 'w.safetensors')
    chex.assert_trees_all_equal(again.params, fitted.params)
    assert (again.metadata, again.metadata.channels) == (fitted.metadata, 1)
    assert pretrained.fit_stem(again, 1) is again
    with pytest.raises(UsageError, match='channels=4: .* the weights have 1 channels'):
        pretrained.fit_stem(again, 4)
    with pytest.raises(UsageError, match='channels=0: must be a positive integer'):
        pretrained.fit_stem(weights, 0)


def test_images_with_equal_channels_give_the_same_from_one_channel_or_six():
    weights = random_weights(Metadata(model='ResNet-8', num_classes=2, options={'width': 0.5}))
    gray = np.random.RandomState(0).standard_normal((2, 8, 8, 1)).astype(np.float32)

    def stem(channels):
        w = pretrained.fit_stem(weights, channels).params['ResNet/~/initial_conv']['w']
        return conv.conv2d(jnp.repeat(gray, channels, -1), jnp.asarray(w))

    for channels in (1, 6):
        np.testing.assert_allclose(stem(channels), stem(3), rtol=1e-4, atol=1e-5)


def test_a_new_head_can_be_asked_for(weights):
    blank = jax.tree.map(np.zeros_like, weights.params)
    same = fit_weights(weights, blank, {})
    chex.assert_trees_all_equal(same[0], weights.params)
    assert same[2].new_head == ()
    anew = fit_weights(weights, blank, {}, new_head=True)
    assert not anew[0]['NF_ResNet/~/linear']['w'].any()
    assert len(anew[2].new_head) == 2


def test_everything_that_does_not_fit_is_in_the_report(weights):
    params = {module: dict(leaves) for module, leaves in weights.params.items()}
    source = {module: dict(leaves) for module, leaves in weights.params.items()}
    block = 'NF_ResNet/~/nf_res_block'
    del source[f'{block}/~/conv0']['gain']
    source[block]['other'] = np.zeros(2, np.float32)
    source[f'{block}_1/~/conv0']['bias'] = np.zeros(99, np.float32)
    fitted, _, report = fit_weights(weights._replace(params=source), params, {})
    assert report.missing == (f'{block}/~/conv0/gain',)
    assert report.unexpected == (f'{block}/other',)
    assert report.wrong_shape == (f'{block}_1/~/conv0/bias',)
    assert not report.fits
    total = len(pretrained.flatten(weights.params))
    assert len(report.matched) == total - 2
    line = f'{total - 2} parameters matched; 1 missing, like {block}/~/conv0/gain; 1 unexpected'
    assert str(report).startswith(line)
    chex.assert_trees_all_equal(fitted[f'{block}_1/~/conv0'], params[f'{block}_1/~/conv0'])


@pytest.fixture
def run(weights, tmp_path):
    """The directory of a run with two checkpoints, the first the better one."""
    (tmp_path / 'model.json').write_text(pretrained.encode_metadata(SMALL))
    checkpoints = Checkpoints(tmp_path / 'checkpoints')
    for step, score in ((3, 0.9), (6, 0.5)):
        params = jax.tree.map(lambda x, step=step: x + step, weights.params)
        state = {
            'params': params,
            'state': {},
            'ema_params': jax.tree.map(lambda x: -x, params),
            'ema_state': {},
            'opt_state': ({'count': np.int32(step)},),
        }
        checkpoints.save(step, state, score=score)
    checkpoints.close()
    return tmp_path


@pytest.mark.parametrize(
    ('choice', 'expected'),
    [
        ({}, lambda x: -(x + 6)),
        ({'ema': False}, lambda x: x + 6),
        ({'checkpoint': 'best'}, lambda x: -(x + 3)),
        ({'checkpoint': 3, 'ema': False}, lambda x: x + 3),
    ],
)
def test_a_run_gives_the_weights_asked_for(choice, expected, run, weights):
    loaded = load_pretrained(run, **choice)
    chex.assert_trees_all_equal(loaded.params, jax.tree.map(expected, weights.params))
    assert loaded.metadata == SMALL


def test_what_is_wrong_with_a_run_is_told(run):
    with pytest.raises(UsageError, match="checkpoint '4': .* has latest, best, 3, 6"):
        load_pretrained(run, checkpoint=4)
    (run / 'model.json').unlink()
    with pytest.raises(UsageError, match=r'holds no run: there is no .*model\.json'):
        load_pretrained(run)


def test_a_damaged_checkpoint_is_told(run):
    for file in sorted((run / 'checkpoints' / '6').rglob('*')):
        if file.is_file() and file.stat().st_size > 2000:
            file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UsageError, match=r'checkpoint 6 of .* is damaged'):
        load_pretrained(run)
