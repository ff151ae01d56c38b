"""The direction of imports: commands -> training -> parts of the runner -> library, without cycles.

Only imports at the top of a module count: those inside of functions run late, and are few.
"""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ('nfnets_jax', 'experiments', 'configs', 'benchmarks')
ROOMS = ('experiments.run', 'experiments.launch', 'experiments.study', 'experiments.report')
# What the rooms of `experiments` may import from the top of it: how a run is configured and built.
FOUNDATION = {'experiments.config', 'experiments.experiment', 'experiments.train_step'}
# Imports of a command by a room: the study runs the functions behind two of the commands.
EXCEPTIONS = {
    ('experiments.study.command', 'experiments.train'),  # trains once for all trials, at first
    ('experiments.study.measurements', 'experiments.train'),  # trains each trial
    ('experiments.study.measurements', 'experiments.signal_propagation'),  # measures a trial
}


def module_name(path):
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


def find_modules():
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob('*.py'))
    return {module_name(path): path for path in paths}


def run_at_import(node):
    """Yields the nodes under `node` that importing its module runs: none inside of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from run_at_import(child)


def imports(source, package, modules):
    """Returns which of `modules` a source in `package` imports at its top."""
    found = set()
    for node in run_at_import(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split('.')[: len(package.split('.')) - node.level + 1]
            base = '.'.join((above if node.level else []) + ([node.module] if node.module else []))
            for alias in node.names:
                name = f'{base}.{alias.name}'
                found.add(name if name in modules else base)
    return found & modules.keys()


def graph():
    modules = find_modules()
    return {
        name: imports(
            path.read_text(),
            name if path.name == '__init__.py' else name.rpartition('.')[0],
            modules,
        )
        for name, path in modules.items()
    }


def is_within(module, package):
    return module == package or module.startswith(f'{package}.')


GRAPH = graph()


def test_imports_are_found():
    modules = {'a.b': None, 'a.c': None, 'a.d': None, 'a.e': None, 'a.lazy': None}
    source = """
import a.b, os
from a import c as renamed
if True:
    from a.d import name
from . import e
def function():
    import a.lazy
"""
    assert imports(source, 'a', modules) == {'a.b', 'a.c', 'a.d', 'a.e'}
    assert 'nfnets_jax.unit_axes' in GRAPH['nfnets_jax.agc']


def test_library_imports_no_runner():
    upward = {
        (module, found)
        for module, imported in GRAPH.items()
        if is_within(module, 'nfnets_jax')
        for found in imported
        if not is_within(found, 'nfnets_jax')
    }
    assert not upward


def test_runner_imports_no_configs():
    upward = {
        (module, found)
        for module, imported in GRAPH.items()
        if is_within(module, 'experiments')
        for found in imported
        if is_within(found, 'configs') or is_within(found, 'benchmarks')
    }
    assert not upward


@pytest.mark.parametrize('room', ROOMS)
def test_rooms_import_no_commands(room):
    in_rooms = {module for module in GRAPH if any(is_within(module, each) for each in ROOMS)}
    commands = {module for module in GRAPH if is_within(module, 'experiments')} - in_rooms
    commands -= FOUNDATION | {'experiments'}
    assert {'experiments.train', 'experiments.evaluate'} <= commands
    upward = {
        (module, found)
        for module in in_rooms
        if is_within(module, room)
        for found in GRAPH[module] & commands
    }
    # Equal, so that an exception that is no longer needed is removed from the list.
    assert upward == {pair for pair in EXCEPTIONS if is_within(pair[0], room)}


def test_no_import_cycle():
    # Raises CycleError, which names the modules of the cycle.
    graphlib.TopologicalSorter(GRAPH).prepare()
