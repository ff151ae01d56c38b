"""Every example runs, shows what it says, and is short."""

import importlib
import os
import pathlib
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

from examples import spectrograms
from nfnets_jax.weights import pretrained
from tests import processes

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / 'examples'
LOOPS = ['agc_optax', 'agc_flax_nnx', 'agc_equinox', 'sam_loop']


@pytest.mark.parametrize('name', LOOPS)
def test_loop_learns(name, capsys):
    losses = importlib.import_module(f'examples.{name}').main()
    assert losses[-1] < 0.6 * losses[0]
    out = capsys.readouterr().out
    if name != 'sam_loop':
        assert 'gradient norm <= clipping * max(parameter norm, 0.001)' in out


def test_sharded_clips_whole_units():
    expected, by_jit, by_hand = importlib.import_module('examples.agc_sharded').main()
    chex.assert_trees_all_close(by_jit, expected, rtol=1e-5)
    chex.assert_trees_all_close(by_hand, expected, rtol=1e-5)


@pytest.mark.slow
def test_spectrograms_are_told_apart_by_weights_of_color_images(tmp_path, capsys):
    metadata = pretrained.Metadata(model='test_nfnet', num_classes=5)
    model = pretrained.network(metadata)
    variables = model.init(jax.random.key(0), np.zeros((1, 64, 64, 3), np.float32), True)
    pretrained.save_weights(tmp_path / 'W', pretrained.Weights(*variables, metadata))
    losses, precision = spectrograms.main(tmp_path / 'W', steps=12, clips=16)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert precision.shape == (4,)
    assert 'average precision: rising 0.' in capsys.readouterr().out


def test_each_is_short_and_tested():
    files = sorted(file for file in FOLDER.glob('*.py') if file.stem != 'nfnets_jax')
    assert [file.stem for file in files] == sorted([*LOOPS, 'agc_sharded', 'spectrograms'])
    for file in files:
        limit = 80 if file.stem == 'spectrograms' else 60
        assert len(file.read_text().splitlines()) < limit, file.name


def python(*arguments, cwd):
    """Runs Python as a shell does, without the path that pytest has added."""
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=cwd, env=environment,
    )  # fmt: skip


# Where a script is started is not on its path, so one example stands for all in the other places.
@pytest.mark.parametrize(
    ('name', 'place'),
    [(name, 'elsewhere') for name in (*LOOPS, 'agc_sharded')]
    + [('agc_optax', 'repository'), ('agc_optax', 'examples')],
)
def test_runs_as_a_file(name, place, tmp_path):
    cwd = {'repository': ROOT, 'examples': FOLDER, 'elsewhere': tmp_path}[place]
    done = python(os.path.relpath(FOLDER / f'{name}.py', cwd), cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not done.stderr


def runnable(folder):
    names = [file.stem for file in sorted((ROOT / folder).glob('*.py'))]
    return [name for name in names if '__main__' in (ROOT / folder / f'{name}.py').read_text()]


@pytest.mark.parametrize('name', runnable('experiments'))
def test_a_command_runs_as_a_file(name, tmp_path):
    """It says the same as `python -m experiments.NAME` in the repository does."""
    as_file = python(ROOT / 'experiments' / f'{name}.py', '--help', cwd=tmp_path)
    as_module = processes.run(['-m', f'experiments.{name}', '--help'], cwd=ROOT)
    for done in (as_file, as_module):
        assert 'Traceback' not in done.stderr
        assert 'options:' in done.stdout or name == '__main__'  # It lists the others.
    assert (as_file.returncode, as_file.stdout) == (as_module.returncode, as_module.stdout)


@pytest.mark.parametrize('name', runnable('benchmarks'))
def test_a_benchmark_runs_as_a_file(name, tmp_path):
    done = python(ROOT / 'benchmarks' / f'{name}.py', '--help', cwd=tmp_path)
    assert 'Traceback' not in done.stderr
    assert done.stdout.count(f'python -m benchmarks.{name}') >= 2
