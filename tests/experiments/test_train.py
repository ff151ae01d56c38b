import json
import os
import re
import shutil
import signal
import time

import chex
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tensorboard.backend.event_processing import event_accumulator

from experiments.experiment import build
from experiments.run import metric_writers, workdir
from experiments.train import DivergedError, train
from experiments.train_step import init_state
from nfnets_jax.errors import UsageError
from nfnets_jax.optimizers import PUBLISHED_GROUPS as GROUPS
from nfnets_jax.weights.checkpoints import CheckpointReader
from tests.experiments.conftest import ONE_BLOCK, tiny_config
from tests.test_files import files_no_larger_than
from tests.test_schedules import falls


def final_state(directory):
    """The training state that a run ended with."""
    experiment = build(workdir.load_config(directory))
    template = jax.eval_shape(lambda: init_state(experiment))
    checkpoints = CheckpointReader(f'{directory}/checkpoints')
    return checkpoints.restore(experiment.total_steps, template)


def timeless(directory):
    """The lines of metrics.jsonl without what depends on the clock."""
    names = ('images_per_second', 'data_wait', 'tflops', 'mfu', 'memory_gib', 'compile_seconds')
    clocked = {f'train/{name}' for name in names}
    return [
        {name: value for name, value in line.items() if name not in clocked}
        for line in metric_writers.read_metrics(directory)
    ]


def newest_state(directory):
    """The newest state as it is stored, which needs no network to be built."""
    checkpoints = CheckpointReader(f'{directory}/checkpoints')
    return checkpoints.restore(checkpoints.steps()[-1])


def assert_same_run(directory, other):
    chex.assert_trees_all_equal(newest_state(directory), newest_state(other))
    assert timeless(directory) == timeless(other)


def assert_resumes_exactly(config, whole, directory, programs=None):
    """Asserts that a run of six steps, resumed at step 3, ends as `whole`, which never stopped."""
    shutil.copytree(whole, directory)
    shutil.rmtree(directory / 'checkpoints' / '6')
    (directory / 'summary.json').unlink()
    assert train(config, directory, programs=programs, quiet=True)['step'] == 6
    assert_same_run(whole, directory)


@pytest.fixture(scope='module')
def programs():
    """What the runs of this file share, each under the config that it is of."""
    return {}


@pytest.fixture(scope='module')
def whole(programs, tmp_path_factory):
    """A run that was never stopped, and its summary."""
    directory = tmp_path_factory.mktemp('runs') / 'whole'
    return directory, train(tiny_config(), directory, programs=programs)


def test_a_run_leaves_what_the_contract_names(whole):
    directory, summary = whole
    assert {'config.json', 'metrics.jsonl', 'curves.png', 'summary.json', 'checkpoints'} <= set(
        os.listdir(directory)
    )
    assert any(name.startswith('events.out.tfevents') for name in os.listdir(directory))
    events = event_accumulator.EventAccumulator(str(directory)).Reload()
    before_and_after = ['images_before_augmentation', 'images_after_augmentation']
    assert events.Tags()['images'] == before_and_after
    assert json.loads((directory / 'summary.json').read_text()) == summary
    assert summary['step'] == 6
    assert summary['final']['test/top1'] == metric_writers.read_metrics(directory)[-1]['test/top1']
    assert set(summary['versions']) >= {'jax', 'optax', 'dm-haiku', 'python'}
    assert summary['images_per_second'] > 0
    assert summary['devices'] == '4 x cpu'


def test_metrics_are_told_when_they_are_due(whole):
    lines = timeless(whole[0])
    assert [line['step'] for line in lines if 'train/loss' in line] == [2, 4, 6]
    assert [line['step'] for line in lines if 'test/loss' in line] == [3, 6]
    first = lines[0]
    assert first['train/loss'] == pytest.approx(np.log(10), abs=0.1), 'the classifier starts small'
    assert {'train/top1', 'train/learning_rate', 'train/clipped_fraction'} <= set(first)
    assert {'test/top5', 'test_ema/loss', 'test_ema/top1'} <= set(lines[1] | lines[2])


def test_a_finished_run_is_not_run_again(whole):
    directory, summary = whole
    before = {path: path.stat().st_mtime_ns for path in directory.rglob('*') if path.is_file()}
    config = workdir.load_config(directory)
    assert train(config, directory) == summary
    del before[directory / 'config.json']
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())


def test_the_same_seed_is_the_same_run_and_another_is_not(whole, programs, tiny, tmp_path):
    train(tiny(), tmp_path / 'again', programs=programs, quiet=True)
    assert_same_run(whole[0], tmp_path / 'again')
    train(tiny(seed=1), tmp_path / 'other', programs=programs, quiet=True)
    assert timeless(whole[0]) != timeless(tmp_path / 'other')


ADAM = {'optimizer__name': 'adam', 'optimizer__clip__name': 'global_norm'}
BATCH_NORM = {'model': {'name': 'ResNet-8', 'cross_replica_axis': 'devices', **ONE_BLOCK}}


@pytest.mark.parametrize(
    'changes',
    [
        {'precision': 'bfloat16', 'ema': 0.0, **ADAM, **BATCH_NORM},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {'precision': 'bfloat16', 'ema': 0.0, **ADAM},
                {'sam__rho': 0.05, 'sam__ascent_fraction': 0.5},
                BATCH_NORM,
                {'precision': 'bfloat16'},
                {'ema': 0.0},
                ADAM,
                {'model': {'name': 'ResNet-8', **ONE_BLOCK}},
            )
        ),
    ],
    ids=['bfloat16_adam_batchnorm_without_ema', 'bfloat16_adam_without_ema', 'sam', 'batchnorm']
    + ['bfloat16', 'without_ema', 'adam', 'batchnorm_per_device'],
)
def test_every_way_to_train(tiny, tmp_path, changes):
    config = tiny(duration=2, eval__every=2, checkpoint__every=2, **changes)
    summary = train(config, tmp_path / 'run', quiet=True)
    assert np.isfinite(summary['final']['test/loss'])
    state = final_state(tmp_path / 'run')
    chex.assert_tree_all_finite(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype('float32')}
    assert bool(state.ema_params) == bool(config.ema)


LONGER = {
    'duration': 100,
    'log_every': '10 steps',
    'checkpoint__every': 10,
    'eval__every': 50,
    'optimizer__learning_rate': 2,
    'optimizer__clip__clipping': 0.04,
}


@pytest.fixture(scope='module')
def longer(programs, tmp_path_factory):
    """A run of 100 steps that was never stopped."""
    directory = tmp_path_factory.mktemp('runs') / 'longer'
    train(tiny_config(**LONGER), directory, programs=programs, quiet=True)
    return directory


def test_it_learns(longer):
    assert metric_writers.read_metrics(longer)[-1]['test/top1'] > 0.5


def wait_for(process, condition):
    """Returns once the condition holds or the process has ended."""
    deadline = time.monotonic() + 300
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def newest_step(directory):
    names = os.listdir(directory / 'checkpoints') if (directory / 'checkpoints').exists() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


@pytest.fixture
def start(command):
    """A function that starts the longer run in a directory."""
    flags = [f'--config.{key.replace("__", ".")}={value}' for key, value in LONGER.items()]
    return lambda directory: command('train', f'--workdir={directory}', *flags)


def test_killed_at_any_moment_it_ends_where_the_uninterrupted_run_does(start, longer, tmp_path):
    directory = tmp_path / 'run'
    writing = re.compile(r'\d+.*tmp')

    def being_written():
        return newest_step(directory) > 20 and any(map(writing.fullmatch, os.listdir(checkpoints)))

    checkpoints = directory / 'checkpoints'
    killed_at = []
    for moment in (
        (directory / 'config.json').exists,  # before the first step
        being_written,  # in the middle of writing a checkpoint
        lambda: newest_step(directory) >= 60,
    ):
        process = start(directory)
        wait_for(process, moment)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, 'it was still running'
        killed_at.append(newest_step(directory))
    assert killed_at == sorted(killed_at)
    process = start(directory)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f'resuming {directory} at step {killed_at[-1]}' in err
    assert_same_run(directory, longer)


@pytest.mark.parametrize(
    'number', [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_asked_to_stop_it_saves_and_can_go_on(start, longer, programs, tmp_path, number):
    directory = tmp_path / 'run'
    process = start(directory)
    wait_for(process, lambda: newest_step(directory) >= 10)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    stopped_at = int(re.search(r'stopped; step (\d+) is saved', err)[1])
    assert newest_step(directory) == stopped_at < 100
    train(tiny_config(**LONGER), directory, programs=programs, quiet=True)
    assert_same_run(directory, longer)


def test_a_damaged_newest_checkpoint_is_told_and_left_behind(
    whole, programs, tiny, tmp_path, capsys
):
    shutil.copytree(whole[0], tmp_path / 'run')
    (tmp_path / 'run' / 'summary.json').unlink()
    (tmp_path / 'run' / 'checkpoints' / '6' / 'state' / '_METADATA').write_text('{')
    train(tiny(), tmp_path / 'run', programs=programs)
    said = capsys.readouterr().err
    assert 'damaged-6 is damaged' in said
    assert 'at step 3 of 6' in said
    assert (tmp_path / 'run' / 'checkpoints' / 'damaged-6').is_dir()
    assert_same_run(whole[0], tmp_path / 'run')


def test_where_no_checkpoint_can_be_read_the_run_is_left_alone(whole, tiny, tmp_path):
    shutil.copytree(whole[0], tmp_path / 'run')
    (tmp_path / 'run' / 'summary.json').unlink()
    for step in '36':
        (tmp_path / 'run' / 'checkpoints' / step / 'state' / '_METADATA').write_text('{')
    record = (tmp_path / 'run' / 'metrics.jsonl').read_text()
    with pytest.raises(UsageError, match='none of the checkpoints .* give another --workdir'):
        train(tiny(), tmp_path / 'run')
    assert (tmp_path / 'run' / 'metrics.jsonl').read_text() == record
    assert all((tmp_path / 'run' / 'checkpoints' / step).is_dir() for step in '36')


def test_on_a_full_disk_it_stops_and_goes_on_where_there_is_room(whole, programs, tiny, tmp_path):
    with (
        files_no_larger_than(12_000),
        pytest.raises(UsageError, match='a checkpoint cannot be written'),
    ):
        train(tiny(), tmp_path / 'run', programs=programs, quiet=True)
    assert not (tmp_path / 'run' / 'summary.json').exists()
    train(tiny(), tmp_path / 'run', programs=programs, quiet=True)
    assert_same_run(whole[0], tmp_path / 'run')


def test_divergence_stops_with_the_step_and_the_last_good_checkpoint(tiny, tmp_path):
    config = tiny(
        optimizer__learning_rate=1e30,
        optimizer__clip__name='none',
        optimizer__schedule__name='constant',
        optimizer__schedule__warmup='4 steps',
        checkpoint__every=1,
    )
    with pytest.raises(DivergedError, match=r'not finite at step (\d+); .*step (\d+)\. Try') as e:
        train(config, tmp_path / 'run', quiet=True)
    bad, good = map(int, re.search(r'at step (\d+); .*step (\d+)\.', str(e.value)).groups())
    assert newest_step(tmp_path / 'run') == good == bad - 1


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model__name': 'NF-ResNet-9'}, r"^config.model: unknown 'NF-ResNet-9' \(did you mean"),
        ({'model__widht': 2}, r"unknown key config.model.widht \(did you mean 'width'"),
        ({'model__cross_replica_axis': 'batch'}, r"cross_replica_axis='batch': must be 'devices'"),
        ({'data__name': 'digit'}, r"config.data.name='digit'.*'digits'"),
        ({'data__image_size': 4}, r'image_size=4'),
        ({'data__skip_bad': -1}, r'data.skip_bad=-1'),
        ({'augment__shift': -1}, r'config.augment.shift=-1'),
        ({'batch_size': 0}, r'config.batch_size=0: must be an integer of at least 1'),
        ({'batch_size': -8}, r'config.batch_size=-8: must be an integer of at least 1'),
        ({'batch_size': 66}, r'config.batch_size=66 is not divisible by the 4 devices'),
        ({'batch_size': 4000}, r'batch_size=4000 is larger than digits/train, which has 1442'),
        ({'batch_size': '64'}, r"config.batch_size='64': must be an integer of at least 1"),
        ({'duration': '-3 epochs'}, r"config.duration='-3 epochs'"),
        ({'duration': '3 parsecs'}, r"config.duration='3 parsecs': unknown unit 'parsecs'"),
        ({'duration': '10%'}, r"config.duration='10%'"),
        ({'eval__every': 0}, r'config.eval.every=0'),
        ({'checkpoint__keep': 0}, r'config.checkpoint.keep=0: must be an integer of at least 1'),
        ({'checkpoint': 5}, r'config.checkpoint=5: must be a mapping of fields: every, keep'),
        ({'seed': -1}, r'config.seed=-1: must be an integer of at least 0'),
        (
            {'seed': 2**31},
            r'config.seed=2147483648: must be an integer of at least 0 and below 2147483648',
        ),
        ({'ema': float('nan')}, r'config.ema=nan: must be a number of at least 0 and below 1'),
        ({'wandb__mode': 'onlin'}, r"config.wandb.mode='onlin' is unknown.*'online'"),
        ({'augment__mixup': 0.2, 'batch_size': 4}, r'config.augment.mixup .* 1$'),
        ({'ema': 1.0}, r'config.ema=1.0: must be a number of at least 0 and below 1'),
        ({'precision': 'float16'}, r"config.precision='float16' is unknown"),
        ({'eval__precision': 'float16'}, r"config.eval.precision='float16' is unknown"),
        ({'sam__rho': -0.1}, r'config.sam.rho=-0.1'),
        ({'sam__ascent_fraction': 0.0}, r'config.sam.ascent_fraction=0.0'),
        ({'sam__roh': 1.0}, r"unknown key config.sam.roh \(did you mean 'rho'"),
        ({'model': {'width': 2}}, r'config.model.name is missing'),
        ({'data': {'name': 3}}, r'config.data.name=3: must be a string'),
        (
            {'optimizer__groups': 3},
            r'config.optimizer.groups=3: must be a list, each entry a mapping of fields: match',
        ),
        ({'sed': 1}, r"unknown key config.sed \(did you mean 'seed'"),
        ({'optimizer__learning_rate': -1.0}, r'config.optimizer.learning_rate=-1.0'),
        ({'optimizer__lr': 1.0}, r"unknown key config.optimizer.lr .did you mean 'learning_rate'"),
        ({'optimizer__clip__name': 'agx'}, r"config.optimizer.clip.name='agx'.*'agc'"),
        ({'optimizer__groups': ({'match': 'x'},)}, r"config.optimizer.groups\[0\].match='x'"),
    ],
    ids=str,
)
def test_a_mistake_is_told_in_one_line_before_anything_is_written(tiny, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message) as error:
        train(tiny(**changes), tmp_path / 'run')
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'run').exists()


def test_a_missing_field_is_named(tiny, tmp_path):
    config = tiny().to_dict()
    del config['ema']
    with pytest.raises(UsageError, match='config.ema is missing'):
        train(ConfigDict(config), tmp_path / 'run')


FREEZE = ({'match': '.*block.*', 'freeze': True}, *GROUPS)
SKIPPING_SAM = {'skip_nonfinite': 1, 'sam__rho': 0.05}
ACCUMULATING_FROZEN = {'accumulate': 2, 'optimizer__groups': FREEZE}


def plateau_config(**changes):
    """The rate is so high that the loss rises, and falls by it."""
    config = tiny_config(log_every='1 steps', checkpoint__keep=3, **changes)
    config.optimizer.learning_rate = 256.0
    config.optimizer.schedule.update(
        name='plateau', warmup='2 steps', every='2 steps', patience=1, factor=0.5
    )
    return config


@pytest.fixture(scope='module')
def everything(programs, tmp_path_factory):
    """A run with all that a state can hold, and its config."""
    config = plateau_config(log_by_layer=True, **SKIPPING_SAM, **ACCUMULATING_FROZEN)
    directory = tmp_path_factory.mktemp('runs') / 'everything'
    train(config, directory, programs=programs, quiet=True)
    return config, directory


def test_metrics_by_layer_are_written(everything):
    lines = [x for x in metric_writers.read_metrics(everything[1]) if 'train/loss' in x]
    clipped = [name for name in lines[-1] if name.startswith('train/clipped_fraction/')]
    assert len(clipped) > 2
    for line in lines:
        by_layer = [line[name] for name in clipped]
        assert min(by_layer) <= line['train/clipped_fraction'] <= max(by_layer)
        ratios = [line[name.replace('clipped_fraction', 'gradient_to_weight')] for name in clipped]
        assert max(ratios) > 0


def assert_falls_by_the_logged_loss(directory):
    lines = [x for x in timeless(directory) if 'train/loss' in x]
    scales = falls([x['train/loss'] for x in lines], period=2, patience=1, factor=0.5)
    assert min(scales) < 1
    expected = [64 * min(1, i / 2) * scale for i, scale in enumerate(scales)]
    np.testing.assert_allclose([x['train/learning_rate'] for x in lines], expected, rtol=1e-5)


def test_plateau_falls_by_the_logged_loss_and_resumes_exactly(everything, programs, tmp_path):
    """Resumed at step 3, in the middle of a period."""
    config, whole = everything
    assert_resumes_exactly(config, whole, tmp_path / 'resumed', programs)
    assert_falls_by_the_logged_loss(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    'changes', [SKIPPING_SAM, ACCUMULATING_FROZEN], ids=['skipping_sam', 'accumulating_frozen']
)
def test_plateau_goes_with_some_of_it(changes, tmp_path):
    config, programs = plateau_config(**changes), {}
    train(config, tmp_path / 'whole', programs=programs, quiet=True)
    assert_resumes_exactly(config, tmp_path / 'whole', tmp_path / 'resumed', programs)
    assert_falls_by_the_logged_loss(tmp_path / 'whole')
