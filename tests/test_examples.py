"""Every example runs, shows what it says, and is short."""

import functools
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

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


def python(*arguments, cwd, **options):
    """Runs Python as a shell does, without the path that pytest has added."""
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=cwd, env=environment, **options,
    )  # fmt: skip


def test_runs_as_a_file_elsewhere(tmp_path):
    done = python(os.path.relpath(FOLDER / 'agc_optax.py', tmp_path), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout


@pytest.mark.slow  # The library is found as by the one above; what they do is tested above that.
@pytest.mark.parametrize('name', [*LOOPS, 'agc_sharded'])
def test_each_runs_as_a_file(name):
    status, out, err = run_files('examples')[name]
    assert status == 0, err
    assert out
    assert not err


def runnable(folder):
    names = [file.stem for file in sorted((ROOT / folder).glob('*.py'))]
    return [name for name in names if '__main__' in (ROOT / folder / f'{name}.py').read_text()]


# Forks a process that has imported what the files need, except for this repository's packages; each
# fork runs a file as Python does, with the file's directory first on the path.
RUN_FILES = """
import atexit, gc, json, os, runpy, sys, tempfile
imports, arguments, files = json.load(sys.stdin)
for name in imports:
    __import__(name)
gc.freeze()
results = []
for file in files:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv, sys.path[0] = [file, *arguments], os.path.dirname(file)
            code = 0
            try:
                runpy.run_path(file, run_name='__main__')
            except SystemExit as ending:
                code = ending.code or 0
            atexit._run_exitfuncs()
            sys.stdout.flush()
            os._exit(code)  # Taking the modules down takes longer than the file.
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for stream in (out, err):
            stream.seek(0)
        results.append([status, out.read().decode(), err.read().decode()])
print(json.dumps(results))
"""
OF_COMMANDS = [name for name in processes.IMPORTS if 'experiments' not in name]
OF_COMMANDS += ['haiku', 'ml_collections', 'optax', 'tensorflow_datasets']
# Files that run every day, and those that run weekly: what they import first, their arguments.
GROUPS = {
    'examples': (['equinox', 'flax.nnx', 'optax'], [], [*LOOPS, 'agc_sharded']),
    'experiments': (['haiku', 'ml_collections', 'optax'], ['--help'], ['__main__']),
    'benchmarks': (['optax'], ['--help'], ['dispatch']),
}


@functools.cache
def run_files(folder, weekly=False):
    """Returns {name: [status, output, errors]} of the files of a folder."""
    imports, arguments, names = GROUPS[folder]
    if weekly:
        imports, names = OF_COMMANDS, [x for x in runnable(folder) if x not in names]
    files = [str(ROOT / folder / f'{name}.py') for name in names]
    with tempfile.TemporaryDirectory() as elsewhere:
        given = json.dumps([imports, arguments, files])
        done = python('-c', RUN_FILES, cwd=elsewhere, input=given)
    assert done.returncode == 0, done.stderr
    return dict(zip(names, json.loads(done.stdout), strict=True))


def each(folder):
    """Returns parameters: each file of a folder, those that are not in its group marked slow."""
    return [
        pytest.param(name, marks=() if name in GROUPS[folder][2] else pytest.mark.slow)
        for name in runnable(folder)
    ]


@pytest.mark.parametrize('name', each('experiments'))
def test_a_command_runs_as_a_file(name):
    """It says the same as `python -m experiments.NAME` in the repository does."""
    status, out, err = run_files('experiments', name not in GROUPS['experiments'][2])[name]
    as_module = processes.run(['-m', f'experiments.{name}', '--help'], cwd=ROOT)
    for said, errors in ((out, err), (as_module.stdout, as_module.stderr)):
        assert 'Traceback' not in errors
        assert 'options:' in said or name == '__main__'  # It lists the others.
    assert (status, out) == (as_module.returncode, as_module.stdout)


def test_a_command_runs_as_a_file_of_a_shell(tmp_path):
    done = python(ROOT / 'experiments' / 'train.py', '--help', cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, '')
    assert 'options:' in done.stdout
    assert done.stdout == processes.run(['-m', 'experiments.train', '--help'], cwd=ROOT).stdout


@pytest.mark.parametrize('name', each('benchmarks'))
def test_a_benchmark_runs_as_a_file(name):
    _, out, err = run_files('benchmarks', name not in GROUPS['benchmarks'][2])[name]
    assert 'Traceback' not in err
    assert out.count(f'python -m benchmarks.{name}') >= 2
