import functools
import json

import jax
import pytest

from experiments import preflight, train_step
from experiments.experiment import build
from experiments.run import accelerators, parallel, planned_data, targets
from experiments.run.batches import eval_batch_size
from nfnets_jax.errors import UsageError
from tests.experiments.run.test_targets import needs

PLAN = {'examples': None, 'classes': None}


@pytest.fixture
def examine(tiny, tmp_path, monkeypatch):
    """A function (name of a target, memory of its devices, config) -> report of a tiny network."""
    monkeypatch.setenv('NFNETS_JAX_CACHE', str(tmp_path))

    def report(name, memory=None, **changes):
        target = targets.open_target(name)
        target = target._replace(memory=memory or target.memory)
        return preflight.preflight(tiny(**changes), target, PLAN, lambda program, seconds: None)

    return report


@needs('libtpu', 'tpu')
def test_a_tiny_network_on_a_tpu(examine, monkeypatch):
    report = examine('v5e:2x4')
    assert (report['devices'], report['processes'], report['examples_per_device']) == (8, 2, 8)
    assert report['fits']
    assert report['evaluation']['fits']
    assert [x['kind'] for x in report['collectives']] == ['all-reduce']
    parameters = sum(x['bytes'] for x in report['collectives']) / 4
    assert 1000 < parameters < 3000
    assert sum(report['parts'].values()) == pytest.approx(report['cycles'])
    assert {'augmentation', 'stem', 'stage 1', 'clipping and update'} <= set(report['parts'])
    assert report['images_per_second'] * report['step_seconds'] == pytest.approx(64)
    assert report['step_seconds'] == pytest.approx(report['cycles'] / 1.503e9, rel=1e-3)
    assert report['hours'] > 6 * report['step_seconds'] / 3600
    lines = '\n'.join(preflight.describe(report))
    assert 'fits' in lines
    assert '/ 0.82' in lines
    # The second time nothing is compiled.
    monkeypatch.setattr(targets, '_compile', None)
    assert examine('v5e:2x4') == report


def one_device(memory):
    """A target that needs no compiler of its own."""
    devices = jax.devices()[:1]
    return targets.Target('v5e:1x1', accelerators.DEVICES[2], devices, 1, memory, 1.5e9, {})


def test_data_that_nothing_is_known_of_ask_for_their_numbers(tiny, tmp_path):
    config = tiny(data={'name': 'tfds', 'dataset': 'mnist', 'data_dir': str(tmp_path)})
    with pytest.raises(UsageError, match=r'not found in .* give --examples and --classes'):
        preflight.preflight(config, one_device(1e9), PLAN, lambda program, seconds: None)


@pytest.mark.parametrize(
    ('available', 'flags', 'compiled'),
    [
        (10.0, None, ['1']),
        # In parts by as little as does, those that cannot do left out.
        (6.0, ['--config.accumulate=2'], ['1', '2']),
        (2.6, ['--config.accumulate=4'], ['1', '4']),
        # Recomputed, where parts of eight examples and loops do not do.
        (1.1, ['--config.model.remat=true'], ['1', '1 scan', '1 remat']),
        (
            0.4,
            ['--config.accumulate=4', '--config.model.remat=true'],
            ['1', '1 scan', '1 remat', '4 remat'],
        ),
        (0.001, [], ['1', '1 scan', '1 remat']),
    ],
)
def test_what_makes_it_fit(available, flags, compiled, tiny, monkeypatch):
    """The search alone: a compiler that needs 10 GB for all, 9 as a loop, and 1 recomputed."""
    found = []

    def examine(experiment, target, waiting):
        config = experiment.config
        kind = next((k for k in ('remat', 'scan') if config.model.get(k)), '')
        found.append(f'{config.accumulate} {kind}'.strip())
        needed = {'': 10e9, 'scan': 9e9, 'remat': 1e9}[kind] / config.accumulate
        memory = {'arguments': 0.0, 'temporaries': needed, 'code': 0.0}
        return {'fits': needed <= target.memory, 'memory': memory}

    monkeypatch.setattr(preflight, '_examine', examine)
    target = one_device(available * 1e9)
    report = preflight.preflight(tiny(batch_size=32), target, PLAN, lambda program, seconds: None)
    assert found == compiled
    assert report['fits'] == (flags is None)
    assert report.get('flags', []) == (flags or [])
    assert ('with_flags' in report) == bool(flags)


@needs('jax_cuda12_plugin', 'cuda')
def test_a_tiny_network_on_gpus(examine):
    report = examine('H100:8')
    assert report['fits']
    assert [x['kind'] for x in report['collectives']] == ['all-reduce']
    assert report['kernels'] > 50
    assert report['kinds']['cuDNN calls']['kernels'] > 5
    assert sum(report['parts'].values()) == pytest.approx(report['bytes_accessed'])
    assert 'kernels a step' in '\n'.join(preflight.describe(report))
    json.dumps(report)


@needs('libtpu', 'tpu')
def test_a_batch_that_does_not_divide(examine):
    with pytest.raises(UsageError, match='config.batch_size=60 is not divisible by the 8 devices'):
        examine('v5e:2x4', batch_size=60)


@needs('libtpu', 'tpu')
def test_data_on_the_devices(examine):
    report = examine('v5e:2x2', data__on_device=True)
    assert report['memory']['arguments'] > 1000 * 8 * 8 * 3
    assert report['fits']


WIDE = {'name': 'folder', 'path': 'elsewhere', 'image_size': (12, 20), 'test_image_size': (16, 28)}
PLANNED = {'examples': 128, 'classes': 3}


def wide(tiny, channels):
    config = tiny(data=WIDE)
    config.model.channels = channels
    return config


@pytest.mark.parametrize('channels', [1, 3, pytest.param(5, marks=pytest.mark.slow)])
def test_the_programs_have_the_shapes_of_images_that_are_not_square(tiny, channels):
    open_source = functools.partial(planned_data.open_source, **PLANNED)
    with parallel.using(jax.devices()[:1]):
        experiment = build(wide(tiny, channels), open_source=open_source)
        train, test = preflight.train_batch(experiment), preflight.eval_batch(experiment)
        batch_size = experiment.config.batch_size
        assert train['image'].shape == (1, batch_size, 12, 20, channels)
        assert test['image'].shape == (1, eval_batch_size(experiment), 16, 28, channels)
        programs = train_step.compile_programs(experiment, {})
        state = preflight._state(experiment)
        _, metrics = jax.eval_shape(programs.train_step, state, train)
        assert 'loss' in str(jax.tree.structure(metrics))
        sums = jax.eval_shape(programs.eval_step, state.variables(), test)
        assert jax.tree.leaves(sums)


@needs('libtpu', 'tpu')
def test_images_that_are_not_square_on_a_tpu(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv('NFNETS_JAX_CACHE', str(tmp_path))
    target = targets.open_target('v5e:1x1')
    report = preflight.preflight(wide(tiny, 1), target, PLANNED, lambda program, seconds: None)
    assert report['fits']
    assert report['evaluation']['fits']
