"""Numbers of trials and images of studies that are not run."""

import pytest

from experiments.study import dry_run
from nfnets_jax.errors import UsageError
from tests import processes
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
    with pytest.raises(UsageError, match=r'config\.data\.path=.*later.*: not a directory'):
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
