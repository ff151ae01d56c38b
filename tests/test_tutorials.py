"""The notebooks in docs/tutorials/ run from top to bottom, and are committed with their results."""

import ast
import importlib
import pathlib

import pytest

nbformat = pytest.importorskip('nbformat')
nbclient = pytest.importorskip('nbclient')

FOLDER = pathlib.Path(__file__).parent.parent / 'docs' / 'tutorials'

# What makes each small enough for a test, in place of the cell tagged `parameters`.
TINY = {
    'agc_in_five_minutes': 'steps = 4; learning_rates = [0.1, 1.0]',
    'from_batch_norm_to_nf': 'epochs = 1; depth = 8; size = 8',
    'fine_tune_on_your_pictures': "pretraining = '4 steps'; steps = 4; images_per_class = 6",
}


def _read(name):
    return nbformat.read(FOLDER / f'{name}.ipynb', as_version=4)


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


def test_each_is_tested():
    assert sorted(path.stem for path in FOLDER.glob('*.ipynb')) == sorted(TINY)


@pytest.mark.parametrize('name', TINY)
def test_results_are_committed_and_small(name):
    notebook = _read(name)
    nbformat.validate(notebook)
    assert (FOLDER / f'{name}.ipynb').stat().st_size < 300_000
    counts = [cell.execution_count for cell in _code(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in _code(notebook) for output in cell.outputs]
    assert {output.output_type for output in outputs} == {'stream', 'display_data'}
    assert {output.name for output in outputs if output.output_type == 'stream'} == {'stdout'}


@pytest.mark.parametrize('name', TINY)
def test_what_it_imports_exists(name):
    code = '\n'.join(cell.source for cell in _code(_read(name)))
    tree = ast.parse('\n'.join(line for line in code.splitlines() if line[:1] != '%'))
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {'experiments.train', 'nfnets_jax'} & {node.module for node in froms}
    for node in froms:
        module = importlib.import_module(node.module)
        for alias in node.names:
            if not hasattr(module, alias.name):
                importlib.import_module(f'{node.module}.{alias.name}')


@pytest.mark.slow
@pytest.mark.parametrize('name', TINY)
def test_runs_at_a_tiny_size(name, tmp_path, monkeypatch):
    monkeypatch.setenv('IPYTHONDIR', str(tmp_path))
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    notebook = _read(name)
    (parameters,) = [c for c in notebook.cells if 'parameters' in c.metadata.get('tags', ())]
    parameters.source = TINY[name]
    where = {'metadata': {'path': str(FOLDER)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()
    assert all(cell.execution_count for cell in _code(notebook))
