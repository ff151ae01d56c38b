"""Runs begun by version 0.1.0, stored at step 3 of 6 with the parameters that it ended with.

Each archive holds the run's directory and `expected.npz`, the arrays `params|...` and
`ema_params|...` of the checkpoint at step 6, computed on four CPU devices.
"""

import pathlib
import tarfile

import jax
import numpy as np
import pytest

from configs.finetune import head_only
from experiments.evaluate import evaluate
from experiments.train import train
from nfnets_jax.weights.checkpoints import CheckpointReader
from tests.experiments.conftest import tiny_config

ARCHIVES = pathlib.Path(__file__).with_name('runs_of_0.1.0')
CHANGES = {
    'agc': {},
    'frozen': {'optimizer__groups': head_only(), 'batch_size': 32},
    'batch_norm_adam': {
        'model': {'name': 'ResNet-8', 'widths': (8,), 'depths': (1,)},
        'optimizer__name': 'adam',
        'optimizer__clip__name': 'none',
    },
}


@pytest.mark.parametrize(
    'name', ['agc', *(pytest.param(x, marks=pytest.mark.slow) for x in CHANGES if x != 'agc')]
)
def test_a_run_of_an_earlier_version_resumes_and_ends_where_it_did(name, tmp_path, capsys):
    with tarfile.open(ARCHIVES / f'{name}.tar.gz') as archive:
        archive.extractall(tmp_path, filter='data')
    directory = tmp_path / name
    assert evaluate(str(directory))['step'] == 3

    train(tiny_config(checkpoint__keep=2, **CHANGES[name]), directory)

    assert 'at step 3 of 6' in capsys.readouterr().err
    checkpoints = CheckpointReader(directory / 'checkpoints')
    assert checkpoints.steps() == [3, 6]
    state = checkpoints.restore(6)
    ended = {
        jax.tree_util.keystr(path, simple=True, separator='|'): leaf
        for path, leaf in jax.tree.leaves_with_path(state)
    }
    with np.load(directory / 'expected.npz') as expected:
        for key, value in expected.items():
            # To rounding, which another processor or compiler may do otherwise.
            np.testing.assert_allclose(ended[key], value, rtol=2e-4, atol=2e-6, err_msg=key)
