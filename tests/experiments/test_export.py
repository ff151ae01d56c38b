"""The export command: its formats, its errors, and what a run exported can be used for."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest

from experiments import export, train
from nfnets_jax import load_pretrained
from nfnets_jax.errors import UsageError
from nfnets_jax.weights import pretrained


@pytest.fixture
def weights():
    metadata = pretrained.Metadata(
        model='NF-ResNet-8',
        options={'widths': (8, 8), 'depths': (1, 1)},
        num_classes=2,
        test_size=16,
    )
    shapes = pretrained.variable_shapes(metadata)
    return pretrained.Weights(
        *jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), shapes), metadata
    )


def test_a_run_exports_as_a_file_that_says_all(tiny, command, tmp_path):
    train.train(tiny(), tmp_path / 'run')
    out = tmp_path / 'digits.safetensors'
    process = command('export', f'--workdir={tmp_path}/run', f'--out={out}', devices=1)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert 'NF-ResNet-8' in stdout
    weights = load_pretrained(out)
    assert weights.metadata.model == 'NF-ResNet-8'
    assert weights.metadata.class_names == tuple('0123456789')
    assert weights.metadata.test_size == 8
    assert weights.metadata.eval_mode == 'resize_crop_1.0'
    chex.assert_trees_all_equal(weights.params, load_pretrained(tmp_path / 'run').params)


def test_the_suffix_says_the_format(weights, tmp_path):
    export.export_weights(weights, tmp_path / 'w.stablehlo')
    program = jax.export.deserialize(bytearray((tmp_path / 'w.stablehlo').read_bytes()))
    assert program.out_avals[0].shape[1] == 2
    with pytest.raises(UsageError, match=r"unknown suffix \(did you mean '\.onnx'\?\)"):
        export.export_weights(weights, tmp_path / 'w.onx')
    unknown = weights._replace(metadata=pretrained.Metadata())
    with pytest.raises(UsageError, match='not those of a known model'):
        export.export_weights(unknown, tmp_path / 'w.safetensors')
    assert [path.name for path in tmp_path.iterdir()] == ['w.stablehlo']


def test_metadata_can_be_put_right(weights, tmp_path):
    names = tmp_path / 'names.txt'
    names.write_text('cat\ndog\n\n')
    metadata = export.override(
        weights.metadata,
        test_size=24,
        eval_mode='resize_crop_0.875',
        class_names=export.read_class_names(names),
    )
    assert metadata == dataclasses.replace(
        weights.metadata, test_size=24, eval_mode='resize_crop_0.875', class_names=('cat', 'dog')
    )
    with pytest.raises(UsageError, match='names 3 classes, but the weights have 2'):
        export.override(weights.metadata, class_names=('a', 'b', 'c'))
    with pytest.raises(UsageError, match="preprocessing 'squash': unknown"):
        export.override(weights.metadata, eval_mode='squash')
    with pytest.raises(UsageError, match='cannot be read'):
        export.read_class_names(tmp_path / 'absent.txt')
    (tmp_path / 'empty.txt').write_text('\n\n')
    with pytest.raises(UsageError, match='is empty: write the names of the classes, one a line'):
        export.read_class_names(tmp_path / 'empty.txt')


@pytest.mark.parametrize(
    ('arguments', 'problem'),
    [
        ([], 'give one of --workdir and --weights'),
        (['--weights=absent.npz'], 'absent.npz: No such file or directory'),
        (['--weights=a', '--workdir=b'], 'give one of --workdir and --weights'),
    ],
)
def test_wrong_arguments_are_one_line(arguments, problem, command, tmp_path):
    process = command('export', *arguments, f'--out={tmp_path}/w.safetensors', devices=1)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert stderr.strip().splitlines()[-1] == f'error: {problem}'
    assert not list(tmp_path.iterdir())


def test_metadata_are_json_without_surprises(weights):
    text = pretrained.encode_metadata(weights.metadata)
    assert json.loads(text)['options'] == {'widths': [8, 8], 'depths': [1, 1]}
