"""The package: light to import, whole when installed."""

import json
import pathlib
import shutil
import subprocess
import sys
import venv

import pytest

import nfnets_jax

ROOT = pathlib.Path(__file__).parent.parent
HEAVY = ['haiku', 'tensorflow', 'tensorflow_datasets', 'grain', 'orbax', 'flax', 'ml_collections']
# Importing each of these must load none of the heavy packages.
LIGHT = ['nfnets_jax', 'nfnets_jax.agc', 'nfnets_jax.sam', 'nfnets_jax.unit_axes']


def run(python, code, **kwargs):
    result = subprocess.run(
        [str(python), '-c', code], capture_output=True, text=True, check=False, **kwargs
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def loaded_by(python, module, **kwargs):
    code = f'import json, sys, {module}; print(json.dumps(sorted(sys.modules)))'
    return set(json.loads(run(python, code, **kwargs)))


@pytest.mark.parametrize('module', LIGHT)
def test_import_is_light(module):
    loaded = loaded_by(sys.executable, module, cwd=ROOT)
    assert module in loaded
    assert not loaded.intersection(HEAVY)
    ours = {name for name in loaded if name.split('.')[0] == 'nfnets_jax'}
    assert ours <= {*LIGHT, 'nfnets_jax.errors'}
    if module == 'nfnets_jax':
        assert 'jax' not in loaded
    if module == 'nfnets_jax.sam':
        assert 'optax' not in loaded


@pytest.mark.parametrize('name', nfnets_jax.__all__)
def test_public_names_exist(name):
    assert getattr(nfnets_jax, name) is not None
    assert name in dir(nfnets_jax)


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'adaptive_clip'"):
        _ = nfnets_jax.adaptive_clip


@pytest.mark.slow
def test_installs_into_an_empty_environment(tmp_path):
    """`pip install .` brings what `import nfnets_jax.agc` needs, and no more."""
    source = tmp_path / 'source'  # A copy, as setuptools builds in the source tree.
    shutil.copytree(ROOT / 'nfnets_jax', source / 'nfnets_jax')
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    venv.create(tmp_path / 'venv', with_pip=True)
    python = tmp_path / 'venv' / 'bin' / 'python'
    subprocess.run(
        [python, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', source],
        check=True,
    )
    # Not in the repository, where the source would be found.
    loaded = loaded_by(python, 'nfnets_jax.agc, nfnets_jax.sam', cwd=tmp_path)
    assert not loaded.intersection(HEAVY)
    assert 'nfnets_jax.agc' in loaded
    files = json.loads(
        run(
            python,
            'import importlib.metadata as m, json;'
            "print(json.dumps([str(f) for f in m.files('nfnets_jax')]))",
            cwd=tmp_path,
        )
    )
    assert 'nfnets_jax/py.typed' in files
    assert not [f for f in files if f.startswith(('tests', 'experiments', 'configs'))]
