"""Numbers of trials and images of studies that are not run."""

import functools
import re
import runpy

import pytest

from experiments.run import planned_data
from experiments.study import dry_run
from nfnets_jax.errors import UsageError
from tests import processes
from tests.experiments.conftest import ROOT
from tests.experiments.study.test_command import tiny_study

SIX_STEPS = 6 * 64


def test_a_whole_grid_has_one_number():
    assert dry_run.describe(tiny_study()) == (
        f'tiny (digits): 5 trials; 1 compiled programs\n{5 * SIX_STEPS:,} images to train on'
    )


def test_a_search_has_two_and_needs_no_data(tmp_path):
    study = tiny_study(search='coarse')
    study.grid.seed = (0, 1, 2)
    study.base.data = {'name': 'tfds', 'dataset': 'cifar10', 'data_dir': str(tmp_path)}
    study.base.duration = '2 epochs'
    two_epochs = round(2 * 50_000 / 64) * 64
    assert dry_run.describe(study) == (  # The diverging arm has a single seed.
        'tiny (digits): 3 trials in the search, at most 7 in all; 1 compiled programs\n'
        f'{3 * two_epochs:,} images to train on in the search, at most {7 * two_epochs:,} in all'
    )


def test_pretraining_counts_once():
    study = tiny_study()
    study.pretrain = study.base.copy_and_resolve_references()
    study.pretrain.duration = '10 steps'
    assert dry_run.describe(study).endswith(f'\n{5 * SIX_STEPS + 10 * 64:,} images to train on')


def test_a_study_of_networks_that_are_not_trained_trains_on_nothing():
    study = tiny_study(measure=('signal_propagation',), metric='signal/avg_var')
    assert dry_run.describe(study).endswith('\n0 images to train on')


def test_what_cannot_be_counted_is_told(tmp_path):
    study = tiny_study()
    study.base.data = {'name': 'folder', 'path': str(tmp_path / 'later')}
    with pytest.raises(
        UsageError, match=r'^trial agc-.*: config\.base\.data\.path=.*later.*: not a directory'
    ):
        dry_run.describe(study)
    study = tiny_study()
    study.pretrain = study.base.copy_and_resolve_references()
    study.pretrain.batch_size = 10_000
    with pytest.raises(UsageError, match=r'^config\.pretrain\.batch_size=10000 is larger'):
        dry_run.describe(study)


def test_the_command_writes_nothing(tmp_path):
    config = tmp_path / 'tiny.py'
    config.write_text('from tests.experiments.study.test_command import tiny_study as get_config\n')
    directory = tmp_path / 'study'
    ended = processes.run(
        ['-m', 'experiments.study', f'--config={config}', f'--workdir={directory}', '--dry_run']
        + ['--seeds=1']
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == (
        f'tiny (digits): 3 trials; 1 compiled programs\n{3 * SIX_STEPS:,} images to train on\n'
    )
    assert not directory.exists()


def not_run():
    """Returns the cells of the guide's table of studies that have not been run."""
    text = (ROOT / 'docs' / 'studies.md').read_text(encoding='utf-8')
    (table,) = re.findall(
        r'^\| study \| trials in the search .*\n\|[-|]+\n((?:\|.*\n)+)', text, re.M
    )
    return [re.split(r' *\| *', line)[1:-1] for line in table.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize('cells', not_run(), ids=lambda cells: cells[0])
def test_the_guide_tells_how_much_has_not_been_run(cells):
    name, size = cells[0].strip('`').split(':')
    study = runpy.run_path(str(ROOT / 'configs' / 'studies' / f'{name}.py'))['get_config'](size)
    caltech = {'examples': 101 * 30, 'classes': 101} if size == 'caltech101' else {}
    open_source = functools.partial(planned_data.open_source, **caltech)
    trials, images = dry_run.describe(study, open_source).splitlines()
    trials, images = numbers(trials.partition(': ')[2].partition(';')[0]), numbers(images)
    assert [int(x) for x in cells[1:3]] == [trials[0], trials[-1]]
    millions = [float(x) for x in cells[3:5]]
    assert millions == [round(images[0] / 1e6, 1), round(images[-1] / 1e6, 1)]
    hours = [x * 1e6 / float(cells[5]) / 3600 for x in millions]
    assert [int(x) for x in cells[6:]] == [round(x) for x in hours]


def numbers(text):
    return [int(n.replace(',', '')) for n in re.findall(r'[\d,]*\d', text)]
