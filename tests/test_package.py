"""The package: light to import, whole when installed."""

import importlib.metadata
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import venv

import pytest

import nfnets_jax
from nfnets_jax import extras

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


# Runs each program of the standard input, a JSON list, in a fork: JAX is imported once for all, in
# those after the first that needs it. Prints the status, output and errors of each.
PROGRAMS = """
import json, os, sys, tempfile, traceback
hidden, programs = json.load(sys.stdin)
results = []
for before, program in programs:
    exec(before)
    # Makes imports fail as if the packages were not installed.
    sys.modules |= dict.fromkeys(hidden)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            status = 0
            try:
                exec(compile(program, '<string>', 'exec'), {'__name__': '__main__'})
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for stream in (out, err):
            stream.seek(0)
        results.append([status, out.read().decode(), err.read().decode()])
print(json.dumps(results))
"""


def run_all(python, programs, hidden=(), **kwargs):
    """Returns [status, output, errors] of each (what is imported before the fork, program)."""
    given = json.dumps([hidden, programs])
    return json.loads(run(python, PROGRAMS, input=given, **kwargs))


def loaded_by(python, module, **kwargs):
    code = f'import json, sys, {module}; print(json.dumps(sorted(sys.modules)))'
    return set(json.loads(run(python, code, **kwargs)))


@pytest.fixture(scope='module')
def loaded():
    """The modules that are loaded once each of LIGHT is imported."""
    code = 'import json, sys, {}; print(json.dumps(sorted(sys.modules)))'
    # Before all but the first, JAX is there: it brings none of what must not be loaded.
    programs = [
        ['' if module == LIGHT[0] else 'import jax', code.format(module)] for module in LIGHT
    ]
    done = run_all(sys.executable, programs, cwd=ROOT)
    assert [err for _, _, err in done] == [''] * len(LIGHT)
    return {name: set(json.loads(out)) for name, (_, out, _) in zip(LIGHT, done, strict=True)}


@pytest.mark.parametrize('module', LIGHT)
def test_import_is_light(module, loaded):
    loaded = loaded[module]
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


MODELS = "pip install 'nfnets_jax[models]'"
# Each line runs where the extra `models` is not installed; it prints what follows it.
WITHOUT_MODELS = {
    'help(nfnets_jax)': [MODELS, 'adaptive_grad_clip', 'NFNet('],
    'print(dir(nfnets_jax))': ["'list_models'", "'adaptive_grad_clip'"],
    'import inspect; print(inspect.getmembers(nfnets_jax))': ["('list_models'"],
    'from nfnets_jax import *; print(sam_value_and_grad, NFNet)': ['sam_value_and_grad', 'NFNet'],
    "import rlcompleter; print(rlcompleter.Completer({'n': nfnets_jax}).attr_matches('n.list'))": [
        'n.list_models'
    ],
    'print(nfnets_jax.list_models.__doc__)': [MODELS],
}
UNAVAILABLE = {
    'nfnets_jax.list_models()': 'nfnets_jax.list_models: haiku is not installed: ' + MODELS,
    'from nfnets_jax import NFNet; NFNet(10)': 'nfnets_jax.NFNet: haiku is not installed: '
    + MODELS,
    "nfnets_jax.from_pretrained('x')": 'haiku is not installed: ' + MODELS,
    'import nfnets_jax.models': 'haiku is not installed: ' + MODELS,
    'import nfnets_jax.models.nfnet': 'haiku is not installed: ' + MODELS,
    'import nfnets_jax.layers': 'haiku is not installed: ' + MODELS,
    'import nfnets_jax.weights.pretrained': 'is not installed: ' + MODELS,
    'import nfnets_jax.weights.export': 'is not installed: ' + MODELS,
    'import nfnets_jax.weights.weight_files': 'safetensors is not installed: ' + MODELS,
    'import nfnets_jax.weights.checkpoints': 'orbax is not installed: pip install '
    "'nfnets_jax[train]'",
    'import nfnets_jax.data.pipeline': "pip install 'nfnets_jax[train]'",
    'import nfnets_jax.data.preprocessing': "cv2 is not installed: pip install 'nfnets_jax[train]'",
}
HIDDEN = ('haiku', 'safetensors', 'orbax', 'grain', 'cv2')


def check_without_extras(python, hidden=(), **kwargs):
    codes = [*WITHOUT_MODELS, *UNAVAILABLE]
    programs = [['import jax, optax', f'import nfnets_jax\n{code}'] for code in codes]
    done = dict(zip(codes, run_all(python, programs, hidden, **kwargs), strict=True))
    for code, printed in WITHOUT_MODELS.items():
        status, out, err = done[code]
        assert status == 0, err
        for words in printed:
            assert words in out, code
    for code, message in UNAVAILABLE.items():
        _, _, err = done[code]
        *_, last = err.splitlines()
        assert last.startswith('ModuleNotFoundError: '), code
        assert last.endswith(message), code
        # The import that failed is not shown beside it.
        assert 'During handling' not in err


def test_without_extras():
    check_without_extras(sys.executable, HIDDEN, cwd=ROOT)


def test_commands_without_extras():
    """A command says in one line what to install."""
    code = (
        f'import runpy, sys; sys.modules |= dict.fromkeys({HIDDEN})\n'
        "runpy.run_module('experiments.train', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr == "error: haiku is not installed: pip install 'nfnets_jax[models]'\n"


def test_every_optional_package_has_its_extra():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    distributions = importlib.metadata.packages_distributions()
    # Not 'tpu' and 'cuda': JAX's own extras bring what these name.
    for extra in ('models', 'train', 'tracking', 'onnx'):
        wanted = {
            re.match(r'[\w.-]+', requirement)[0].lower().replace('-', '_')
            for requirement in project['optional-dependencies'][extra]
        } - {'nfnets_jax'}
        ours = {name for name, its in extras.EXTRAS.items() if its == extra}
        assert len(ours) == len(wanted), extra
        for name in ours & distributions.keys():
            found = {d.lower().replace('-', '_') for d in distributions[name]}
            assert found & wanted, name


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'adaptive_clip'"):
        _ = nfnets_jax.adaptive_clip


@pytest.mark.slow
def test_the_source_distribution_has_what_its_tests_need(tmp_path):
    tracked = subprocess.run(
        ['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split('\0')
    for name in filter(None, tracked):
        (tmp_path / 'source' / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / 'source' / name)
    venv.create(tmp_path / 'venv', with_pip=True)
    python = tmp_path / 'venv' / 'bin' / 'python'
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', 'setuptools>=70'], check=True)
    build = 'import setuptools.build_meta as b; print(b.build_sdist("..").rstrip())'
    name = run(python, build, cwd=tmp_path / 'source').splitlines()[-1]
    shutil.unpack_archive(tmp_path / name, tmp_path, filter='data')
    unpacked = tmp_path / name.removesuffix('.tar.gz')
    missing = [f for f in tracked if f and f[0] != '.' and not (unpacked / f).exists()]
    assert not missing
    subprocess.run(
        [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', 'tests/test_files.py'],
        cwd=unpacked,
        check=True,
    )


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
    check_without_extras(python, cwd=tmp_path)
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
