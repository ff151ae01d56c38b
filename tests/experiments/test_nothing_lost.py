"""What fails beside training costs no step; the start says what is trained on what."""

import json
import shutil

import pytest

from experiments import evaluate as evaluate_command
from experiments.evaluate import evaluate
from experiments.run import curves, evaluation, metric_writers, workdir
from experiments.train import train
from nfnets_jax.data import pipeline
from nfnets_jax.errors import UsageError
from nfnets_jax.weights.checkpoints import CheckpointReader
from tests.experiments.run.test_data_record import config_of, write_images
from tests.experiments.test_train import assert_same_run, timeless


@pytest.fixture(scope='module')
def programs():
    """What the runs of this file share."""
    return {}


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return tmp_path_factory.mktemp('place') / 'data'


def fill(place):
    """Writes the data anew, whatever became of them."""
    shutil.rmtree(place, ignore_errors=True)
    for split in ('train', 'test'):
        write_images(place / split, 'b', 'd')
    return place


@pytest.fixture
def data(place):
    """Always in the same place, which is part of the config that programs are of."""
    return fill(place)


def four_steps(data, **changes):
    """Every second is evaluated and saved."""
    config = config_of(data, **changes)
    config.eval.every = config.checkpoint.every = '2 steps'
    return config


@pytest.fixture
def go(data, tmp_path, programs):
    """Trains in a directory."""

    def run(name='run', quiet=True, **changes):
        config = four_steps(data, **changes)
        return train(config, tmp_path / name, programs=programs, quiet=quiet)

    return run


@pytest.fixture(scope='module')
def whole(place, programs, tmp_path_factory):
    """A run that nothing happened to."""
    directory = tmp_path_factory.mktemp('runs') / 'whole'
    train(four_steps(fill(place)), directory, programs=programs, quiet=True)
    return directory


def saved(tmp_path, name='run'):
    checkpoints = CheckpointReader(tmp_path / name / 'checkpoints')
    return checkpoints.steps(), checkpoints.best()


def truncate(path):
    path.write_bytes(path.read_bytes()[:60])


def test_an_unreadable_test_image_costs_no_step_and_may_then_be_skipped(data, go, tmp_path):
    truncate(data / 'test/d/1.png')
    with pytest.raises(UsageError, match=r'd/1\.png: .*; step 2 is saved, and the same command'):
        go()
    assert saved(tmp_path) == ([2], None)
    with pytest.raises(UsageError, match=r'd/1\.png'):
        go()  # Before another step: the evaluation is made up for.
    assert saved(tmp_path) == ([2], None)
    summary = go(skip_bad=1)
    assert summary['final']['test/skipped_pictures'] == 1
    assert [line['step'] for line in timeless(tmp_path / 'run') if 'test/top1' in line] == [2, 4]
    go('whole', skip_bad=1)
    # The step that was logged before nothing could be skipped does not count what was.
    lines = [timeless(tmp_path / name) for name in ('run', 'whole')]
    for line in [line for run in lines for line in run]:
        line.pop('train/skipped_pictures', None)
    assert lines[0] == lines[1]
    assert saved(tmp_path) == saved(tmp_path, 'whole')


def test_an_unreadable_training_image_costs_no_step(whole, go, tmp_path, monkeypatch):
    real = pipeline.Prefetch.__next__

    def fails(self):
        if 'position' in (batch := real(self)):
            seen.append(batch)
            if len(seen) == 4:
                raise UsageError('bad.png: cannot be read')
        return batch

    seen = []
    monkeypatch.setattr(pipeline.Prefetch, '__next__', fails)
    with pytest.raises(UsageError, match='cannot be read; step 3 is saved'):
        go()
    monkeypatch.undo()
    assert saved(tmp_path)[0] == [2, 3]
    go()
    assert_same_run(tmp_path / 'run', whole)


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), RuntimeError('a bug')])
def test_metrics_that_cannot_be_written_cost_no_step(whole, go, tmp_path, monkeypatch, error):
    real = metric_writers._TensorBoard.write

    def fails(self, step, scalars):
        if step == 4:
            raise error
        real(self, step, scalars)

    monkeypatch.setattr(metric_writers._TensorBoard, 'write', fails)
    with pytest.raises((UsageError, RuntimeError), match='cannot be written|a bug'):
        go()
    assert saved(tmp_path)[0] == [2, 4]
    assert not (tmp_path / 'run' / 'summary.json').exists()
    monkeypatch.undo()
    go()
    assert_same_run(tmp_path / 'run', whole)


def test_curves_that_cannot_be_drawn_are_told_and_the_run_is_complete(
    go, tmp_path, monkeypatch, capsys
):
    def fails(*args, **options):
        raise RuntimeError('no font')

    monkeypatch.setattr(curves, 'draw_curves', fails)
    summary = go(quiet=False)
    assert 'curves.png cannot be drawn: no font\n' in capsys.readouterr().err
    assert json.loads((tmp_path / 'run' / 'summary.json').read_text()) == summary


def test_the_start_says_what_is_trained_on_what(data, go, tmp_path, capsys):
    go(quiet=False)
    told = capsys.readouterr().err.splitlines()
    network, images, steps, run, compiling, compiled = told[:6]
    assert network == 'network: SmallCNN, 37,314 parameters'
    assert images.startswith('data: 2 classes; 8 training images')
    assert '8 test images' in images
    assert str(data) in images
    assert steps == 'steps: 4 of 4 images (2 epochs) in float32, on 4 devices (cpu)'
    assert run == f'run: {tmp_path}/run'
    assert compiling == 'compiling'
    assert compiled.startswith('compiled in ')


def test_the_start_is_told_before_anything_is_compiled(data, tmp_path, monkeypatch, capsys):
    def stops(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr('experiments.train.init_state', stops)
    monkeypatch.setattr('experiments.train.compile_programs', stops)
    with pytest.raises(KeyboardInterrupt):
        train(config_of(data), tmp_path / 'run')
    assert capsys.readouterr().err.startswith('network: ')


def test_a_quiet_run_says_nothing(data, tmp_path, programs, capsys):
    train(four_steps(data), tmp_path / 'run', quiet=True, programs=programs)
    assert capsys.readouterr().err == ''


# Validation data: three splits.


@pytest.fixture(scope='module')
def validated(tmp_path_factory):
    """A run with a validation split, and its summary."""
    root = tmp_path_factory.mktemp('validated')
    for split, count in (('train', 4), ('validation', 3), ('test', 2)):
        write_images(root / 'data' / split, 'b', 'd', count=count)
    config = config_of(root / 'data')
    config.eval.every = config.checkpoint.every = '1 steps'
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        real = evaluation.evaluate

        def counted(experiment, step, variables, split, *rest):
            calls.append(split)
            return real(experiment, step, variables, split, *rest)

        patch.setattr('experiments.train.evaluate', counted)
        summary = train(config, root / 'run', quiet=True)
    return root / 'run', summary, calls


def test_the_best_is_chosen_on_validation_data_and_the_test_data_seen_once(validated):
    directory, summary, calls = validated
    assert calls == ['validation'] * 4 + ['test']
    lines = metric_writers.read_metrics(directory)
    watched = [line for line in lines if 'validation/top1' in line]
    assert [line['step'] for line in watched] == [1, 2, 3, 4]
    assert [line['step'] for line in lines if 'test/top1' in line] == [4]
    best = max(watched, key=lambda line: (line['validation_ema/top1'], -line['step']))
    assert summary['best'] == best
    assert {'validation/top1', 'test/top1', 'test_ema/loss'} <= set(summary['final'])
    assert saved(directory.parent)[1] == best['step']


@pytest.mark.parametrize('split', ['validation', 'test'])
def test_either_split_is_evaluated_as_in_training(validated, split):
    directory, summary, _ = validated
    results = evaluate(directory, split=split)
    del results['step']
    assert results
    for name, value in results.items():
        assert name.startswith(split)
        assert summary['final'][name] == value


def test_the_default_is_the_test_and_a_watched_job_is_watched_on_validation(validated):
    directory, _, _ = validated
    assert 'test/top1' in evaluate(directory)
    lines = [line for line in metric_writers.read_metrics(directory) if 'validation/top1' in line]
    assert list(evaluate_command.watch(directory, seconds=0)) == [
        line for line in lines if line['step'] in saved(directory.parent)[0]
    ]


def test_both_are_told(validated):
    line = evaluation.describe_accuracy(validated[1]['final'])
    assert line.startswith('validation top-1 ')
    assert '; test top-1 ' in line


def test_a_split_that_is_not_there_is_named(validated):
    with pytest.raises(UsageError, match=r"--split=valid: .*did you mean 'validation'"):
        evaluate(validated[0], split='valid')


# Two spellings of one config.


@pytest.mark.parametrize(
    ('then', 'now'),
    [
        ({'duration': '40 epochs'}, {'duration': '40 epoch'}),
        ({'duration': 500}, {'duration': '500 steps'}),
        ({'optimizer.schedule.warmup': '50%'}, {'optimizer.schedule.warmup': '50 %'}),
        (
            {'optimizer.schedule.boundaries': ['30%', '2 epochs']},
            {'optimizer.schedule.boundaries': ['30 %', '2.0 epochs']},
        ),
        ({'optimizer.schedule.every': '1 epoch'}, {'optimizer.schedule.every': '1.0 epochs'}),
        ({'ema': 1}, {'ema': 1.0}),
        ({'model.name': 'NFNet-F0'}, {'model.name': 'dm_nfnet_f0'}),
        ({'data.name': 'noise'}, {'data.name': 'noise', 'data.classes': 10}),
        ({'data.name': 'digits'}, {'data.name': 'digits', 'data.skip_bad': 0}),
    ],
)
def test_two_spellings_are_one_experiment(then, now):
    assert not workdir.differences(then, now)


@pytest.mark.parametrize(
    ('then', 'now', 'message'),
    [
        ({'duration': '40 epochs'}, {'duration': '40 steps'}, "'40 epochs' there and '40 steps'"),
        (
            {'data.name': 'noise'},
            {'data.name': 'noise', 'data.classes': 11},
            'data.classes is 10 there and 11 here',
        ),
        (
            {'data.name': 'folder'},
            {'data.name': 'folder', 'data.skip_bad': 1},
            'data.skip_bad is 0 there and 1 here',
        ),
    ],
)
def test_a_difference_tells_the_default_of_what_is_not_there(then, now, message):
    (difference,) = workdir.differences(then, now)
    assert message in difference
