"""Every file of configs/studies, in every size that it has."""

import functools
import math
import pathlib
import runpy

import pytest

from experiments.config import check
from experiments.experiment import build
from experiments.study import config as study_config
from nfnets_jax.errors import UsageError

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(
    path.stem for path in (ROOT / 'configs' / 'studies').glob('*.py') if path.stem != 'settings'
)
SIZES = (
    *('digits', 'cifar10_small', 'cifar10', 'cifar10_updates', 'cifar10_randaugment'),
    *('caltech101_small', 'caltech101', 'imagenet'),
)
# What trials tell: training, and the measurements.
METRICS = {
    *('test/top1', 'test/loss', 'validation/top1', 'validation/loss', 'train/loss'),
    *('train/clipped_fraction', 'images_per_second'),
    *('dependence/logit_change', 'discrepancy/loss', 'memory/step_mib'),
    *(f'landscape/{x}' for x in ('loss_range', 'loss_min', 'loss_max', 'gradient_change', 'beta')),
    *('landscape/random_loss', 'landscape/random_rise'),
    *('signal/avg_var', 'signal/avg_sq_mean', 'signal/res_avg_var', 'signal/avg_var_decades'),
}


def load(name, size):
    module = runpy.run_path(str(ROOT / 'configs' / 'studies' / f'{name}.py'))
    try:
        study = module['get_config'](size)
    except UsageError as error:
        assert f'no size {size!r}' in str(error)  # noqa: PT017
        study = None
    assert (size in module['VARIANTS']) == (study is not None)
    return study


STUDIES = {
    f'{name}-{size}': study
    for name in FILES
    for size in SIZES
    if (study := load(name, size)) is not None
}


def test_every_experiment_of_the_report_is_there():
    assert len(FILES) == 13
    assert all(f'{name}-digits' in STUDIES for name in FILES)
    assert sum(name.endswith('-cifar10') for name in STUDIES) == 11
    suffix = '-cifar10_small'
    small = {name.removesuffix(suffix) for name in STUDIES if name.endswith(suffix)}
    assert small == set(FILES) - {'finetune', 'signal_propagation'}
    assert all(study.name == key.rpartition('-')[0] for key, study in STUDIES.items())


@functools.cache
def trials_of(key):
    return study_config.make_trials(STUDIES[key])  # It checks claims and charts, too.


SMALL = [key for key in STUDIES if key.endswith(('-digits', '_small'))]


@pytest.mark.parametrize(
    'key',
    [*SMALL, *(pytest.param(key, marks=pytest.mark.slow) for key in STUDIES if key not in SMALL)],
)
def test_a_study_says_what_a_report_needs(key):
    study = STUDIES[key]
    trials = trials_of(key)
    assert len({trial.id for trial in trials}) == len(trials)
    assert len(study.grid.seed) >= 3
    assert study.title
    assert study.question.endswith('?')
    assert study.setting
    assert study.claims
    assert study.charts
    for claim in study.claims:
        compare = claim['compare']
        assert compare.get('metric', study.metric) in METRICS
        for side in (compare['better'], compare['worse']):  # Its grid holds what it claims.
            assert any(side.items() <= trial.axes.items() for trial in trials), claim['text']
    summary = study_config.to_json(study)
    for claim in summary['claims']:
        sizes = [
            math.prod(
                len(values)
                for axis, values in summary['grids'][side.get('arm', study.arms[0]['name'])].items()
                if axis in study.tuned and axis not in side
            )
            for side in (claim['compare']['better'], claim['compare']['worse'])
        ]
        assert len(set(sizes)) == 1, f'{claim["text"]} tunes over {sizes}'
    titles = [chart['title'] for chart in study.charts]
    assert len(set(titles)) == len(titles)
    assert all(chart['y'] in METRICS for chart in study.charts)
    # Test images are evaluated at the end alone.
    curves = [chart['y'] for chart in study.charts if chart['kind'] == 'curves']
    assert not any(metric.startswith('test/') for metric in curves)
    assert study_config.to_json(study)['axes']['arm'] == [arm['name'] for arm in study.arms]
    if 'train' in study.measure:
        tuned = [{**study.grid.to_dict(), **arm['grid']} for arm in study.arms]
        if study.name == 'resnet_without_norm':  # The report's Adam has a single rate.
            tuned = [grid for grid in tuned if grid['learning_rate'] != (1e-3,)]
        tuned = tuned if study.tuned else []
        few = 1 if key.endswith('imagenet') else 2
        assert all(len(grid['learning_rate']) >= few for grid in tuned)
        if key.endswith(('digits', 'cifar10_small')):  # So that the best may have both sides tried.
            assert all(len(grid['learning_rate']) >= 3 for grid in tuned)


DIGITS = [key for key in STUDIES if key.endswith('-digits')]


_built: set[tuple[str, str]] = set()  # networks, and the data that they are for


@pytest.mark.parametrize('key', DIGITS)
def test_every_program_of_the_digits_size_can_be_run(key):
    """Building one traces its network, so that is done once for each network of all studies."""
    trials = trials_of(key)
    assert len(trials) <= 300
    for trial in {trial.program: trial for trial in trials}.values():
        check(trial.config)
        network = repr(trial.config.model), repr(trial.config.data)
        if network not in _built:
            build(trial.config)
            _built.add(network)


@pytest.mark.slow
@pytest.mark.parametrize('key', DIGITS)
def test_every_program_of_the_digits_size_can_be_built(key):
    for trial in {trial.program: trial for trial in trials_of(key)}.values():
        build(trial.config)


@pytest.mark.slow
@pytest.mark.parametrize('key', [key for key in STUDIES if not key.endswith('-digits')])
def test_every_program_of_the_larger_sizes_can_be_run(key):
    for trial in {t.axes['arm']: t for t in study_config.make_trials(STUDIES[key])}.values():
        pixels = trial.config.data.get('image_size', 32)
        trial.config.data = {'name': 'noise', 'image_size': pixels, 'examples': 4096}
        build(trial.config)


def test_the_commands_in_the_docstrings_are_those_of_the_files():
    for name in FILES:
        source = (ROOT / 'configs' / 'studies' / f'{name}.py').read_text()
        command = f'python -m experiments.study --config=configs/studies/{name}.py:digits'
        assert command in source
