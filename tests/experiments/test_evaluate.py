import dataclasses
import json
import pathlib
import shutil
import signal
import threading

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from experiments.evaluate import EVALUATIONS_FILE, evaluate, evaluate_weights, watch
from experiments.experiment import build
from experiments.run import evaluation, metric_writers, parallel, workdir
from experiments.train import train
from experiments.train_step import init_state, make_eval_step, make_logits_fn
from nfnets_jax import augment
from nfnets_jax.errors import UsageError
from nfnets_jax.weights import pretrained
from nfnets_jax.weights.checkpoints import CheckpointReader
from tests.experiments.conftest import tiny_config
from tests.experiments.test_train import wait_for


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp('runs') / 'run'
    config = tiny_config(optimizer__learning_rate=2.0, optimizer__clip__clipping=0.1)
    return directory, train(config, directory, quiet=True)['final']


@pytest.mark.parametrize('batch_size', [None, 7, 356, 10_000])
def test_the_figures_are_those_of_training_whatever_the_batch_size(run, batch_size):
    directory, final = run
    results = evaluate(directory, batch_size=batch_size)
    assert results.pop('step') == 6
    for name, value in results.items():
        if 'top' in name or batch_size is None:
            assert value == final[name]
        else:
            assert value == pytest.approx(final[name], rel=1e-5)


def test_the_figures_are_right(run):
    """Against the plain forward pass over all test pictures at once, in numpy."""
    directory, final = run
    experiment = build(workdir.load_config(directory))
    template = jax.eval_shape(lambda: init_state(experiment))
    state = CheckpointReader(directory / 'checkpoints').restore(6, template)
    source = experiment.test_source
    images = augment.normalize(np.stack([source[i]['image'] for i in range(len(source))]))
    labels = np.array([source[i]['label'] for i in range(len(source))])
    apply = jax.jit(experiment.model.apply, static_argnums=4)
    outputs, _ = apply(state.ema_params, state.ema_state, None, images, False)
    logits = np.asarray(outputs['logits'], np.float64)
    ranked = np.argsort(-logits, axis=1)
    assert final['test_ema/top1'] == np.mean(ranked[:, 0] == labels)
    assert final['test_ema/top5'] == np.mean(np.any(ranked[:, :5] == labels[:, None], axis=1))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    assert final['test_ema/loss'] == pytest.approx(float(np.mean(np.asarray(losses))), rel=1e-5)


def test_the_best_and_a_given_checkpoint(run):
    directory, _ = run
    at_step_3 = evaluate(directory, '3')
    told = next(line for line in metric_writers.read_metrics(directory) if 'test/top1' in line)
    assert at_step_3 == told
    best = evaluate(directory, 'best')
    assert best['test_ema/top1'] == max(
        line['test_ema/top1']
        for line in metric_writers.read_metrics(directory)
        if 'test/top1' in line
    )


def test_the_command_prints_it(run, command):
    directory, final = run
    process = command('evaluate', f'--workdir={directory}', '--json', devices=1)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    printed = json.loads(out)
    assert printed['test/top1'] == final['test/top1']
    assert printed['test_ema/top5'] == final['test_ema/top5']


def test_evaluation_changes_nothing(run):
    directory, _ = run
    before = {path: path.stat().st_mtime_ns for path in directory.rglob('*')}
    evaluate(directory)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob('*')} == before


def test_the_training_images_can_be_evaluated(run):
    results = evaluate(run[0], split='train')
    assert set(results) >= {'step', 'train/loss', 'train/top1', 'train_ema/top5'}
    assert evaluation.describe_accuracy(results).startswith('train top-1 ')


def test_mistakes(run, tmp_path):
    directory, _ = run
    with pytest.raises(UsageError, match=r"checkpoint '4': .* has latest, best, 3, 6"):
        evaluate(directory, '4')
    with pytest.raises(UsageError, match='holds no run'):
        evaluate(tmp_path)
    (tmp_path / 'config.json').write_text((directory / 'config.json').read_text())
    with pytest.raises(UsageError, match='holds no checkpoint yet'):
        evaluate(tmp_path)


def test_a_damaged_checkpoint_is_one_line(run, tmp_path):
    shutil.copytree(run[0], tmp_path / 'run')
    (tmp_path / 'run' / 'checkpoints' / '6' / 'state' / '_METADATA').unlink()
    with pytest.raises(UsageError, match=r'checkpoint 6 of .* is damaged .*--checkpoint=STEP'):
        evaluate(tmp_path / 'run')


def test_watching_evaluates_each_checkpoint_once_until_the_run_is_complete(run, tmp_path):
    directory = tmp_path / 'run'
    shutil.copytree(run[0], directory)
    found = list(watch(directory, seconds=0))
    told = [line for line in metric_writers.read_metrics(directory) if 'test/top1' in line]
    assert found == told
    lines = (directory / EVALUATIONS_FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == told
    (directory / EVALUATIONS_FILE).write_text(lines[0] + '\n')
    assert list(watch(directory, seconds=0)) == told[1:], 'what was evaluated is passed over'


def test_two_that_watch_keep_each_others_lines(run, tmp_path):
    directory = tmp_path / 'run'
    shutil.copytree(run[0], directory)
    plain, flipped = (watch(directory, seconds=0, flip=flip) for flip in (False, True))
    found = [next(watching) for watching in (plain, flipped, flipped, plain)]
    assert [(one['step'], one.get('tta')) for one in found] == [
        *[(3, None), (3, 'flip')],
        *[(6, 'flip'), (6, None)],
    ]
    lines = (directory / EVALUATIONS_FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == found
    assert found[1]['test_ema/loss'] != found[0]['test_ema/loss']
    assert [list(watch(directory, seconds=0, flip=flip)) for flip in (False, True)] == [[], []]


def test_watching_waits_and_passes_over_what_is_damaged(run, tmp_path, capsys):
    directory = tmp_path / 'run'
    shutil.copytree(run[0], directory)
    (directory / 'checkpoints' / '3' / 'state' / '_METADATA').unlink()
    (directory / 'summary.json').rename(tmp_path / 'summary.json')
    watching = watch(directory, seconds=0.01)
    assert next(watching)['step'] == 6
    assert 'checkpoint 3 is damaged' in capsys.readouterr().err
    timer = threading.Timer(0.1, (tmp_path / 'summary.json').rename, [directory / 'summary.json'])
    timer.start()
    assert list(watching) == []


def is_asleep(process):
    """Whether a process waits; True without Linux, where nothing tells."""
    stat = pathlib.Path('/proc', str(process.pid), 'stat')
    return not stat.exists() or stat.read_text().rpartition(')')[2].split()[0] == 'S'


def test_watching_ends_with_ctrl_c_in_one_line(command, tmp_path):
    process = command('evaluate', f'--workdir={tmp_path}/none', '--watch')
    assert process.stderr.readline() == f'waiting for a run in {tmp_path}/none\n'
    # A signal that came before the write has returned would have the line written again.
    wait_for(process, lambda: is_asleep(process))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (130, '', 'interrupted\n')


def test_the_sums_ignore_padding(run):
    directory, _ = run
    experiment = build(workdir.load_config(directory))
    step = make_eval_step(experiment)
    variables = parallel.replicate(init_state(experiment).variables())
    example = experiment.test_source[0]
    batch = {
        'image': np.stack([example['image']] * 8),
        'label': np.full(8, example['label'], np.int32),
        'index': np.arange(8, dtype=np.int32),
        'mask': np.array([1, 1, 1, 0, 0, 0, 0, 0], np.float32),
    }
    assert float(step(variables, parallel.shard(batch))['sums']['']['count']) == 3


def test_evaluation_computes_in_its_own_precision(tmp_path):
    """Trained in bfloat16, tested in float32: the figures are those of a float32 forward pass."""
    config = tiny_config(precision='bfloat16', eval__precision='float32', ema=0.0)
    trained = train(config, tmp_path / 'run', quiet=True)['final']
    assert evaluate(tmp_path / 'run')['test/loss'] == trained['test/loss']
    experiment = build(workdir.load_config(tmp_path / 'run'))
    state = CheckpointReader(tmp_path / 'run' / 'checkpoints').restore(
        6, jax.eval_shape(lambda: init_state(experiment))
    )

    def loss(precision):
        experiment.config.eval.precision = precision
        placed = parallel.replicate(state.variables())
        return evaluation.evaluate(experiment, make_eval_step(experiment), placed)['test/loss']

    assert loss('training') == loss('bfloat16') != trained['test/loss']


def test_the_report_is_of_the_moving_average_and_agrees_with_the_metrics(run, tmp_path):
    directory, _ = run
    metrics = evaluate(directory, report=str(tmp_path / 'report'))
    summary = json.loads((tmp_path / 'report' / 'summary.json').read_text())
    assert summary['images'] == 355
    assert summary['top1'] == metrics['test_ema/top1']
    assert summary['loss'] == pytest.approx(metrics['test_ema/loss'], rel=1e-5)
    lines = (tmp_path / 'report' / 'predictions.csv').read_text().splitlines()
    assert [line.split(',')[0] for line in lines[1:3]] == ['digits/test[0]', 'digits/test[1]']


@pytest.mark.parametrize('named', [True, False])
def test_weights_are_evaluated_on_data_of_their_classes(named, run, tmp_path):
    """As the run is, and without names of classes, whose directories are then their numbers."""
    directory, _ = run
    weights = pretrained.load_pretrained(directory)
    names = [f'digit {i}' if named else str(i) for i in range(10)]
    metadata = dataclasses.replace(weights.metadata, class_names=tuple(names) if named else ())
    pretrained.save_weights(tmp_path / 'w.safetensors', weights._replace(metadata=metadata))
    source = build(workdir.load_config(directory)).test_source
    examples = [source[i] for i in range(24)]
    for i, example in enumerate(examples):
        path = tmp_path / 'images' / names[example['label']] / f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(example['image']).save(path)
    found = evaluate_weights(str(tmp_path / 'w.safetensors'), str(tmp_path / 'images'))
    network = pretrained.network(weights.metadata)
    images = augment.normalize(np.stack([example['image'] for example in examples]))
    apply = jax.jit(network.apply, static_argnums=4)
    logits = apply(weights.params, weights.state, None, images, False)[0]['logits']
    labels = np.array([example['label'] for example in examples])
    assert found['test/top1'] == np.mean(np.argmax(logits, 1) == labels)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    assert found['test/loss'] == pytest.approx(float(np.mean(losses)), rel=1e-5)
    assert 'step' not in found


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--weights=w.npz'], 'give --data, the images to evaluate on'),
        (['--weights=w.npz', '--workdir=r'], 'give one of --workdir and --weights'),
        ([], 'give one of --workdir and --weights'),
        (['--weights=w.npz', '--data=d', '--watch'], 'are of a run: give --workdir'),
        (['--workdir=r', f'--report={__file__}'], f'--report={__file__} is a file: give a dir'),
    ],
)
def test_weights_and_runs_are_not_mixed_up(arguments, message, command):
    done = command('evaluate', *arguments)
    _, err = done.communicate()
    assert (done.returncode, message in err) == (2, True)


def test_flips_average_the_probabilities(run):
    directory, final = run
    experiment = build(workdir.load_config(directory), training=False)
    state = init_state(experiment)
    images = np.stack([experiment.test_source[i]['image'] for i in range(8)])
    logits, flipped, both = (
        jax.jit(make_logits_fn(experiment, flip=flip))(state.params, state.state, shown)
        for flip, shown in ((False, images), (False, images[:, :, ::-1]), (True, images))
    )
    expected = (jax.nn.softmax(logits) + jax.nn.softmax(flipped)) / 2
    np.testing.assert_allclose(jax.nn.softmax(both), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.nn.logsumexp(both, axis=-1), 0, atol=1e-6)
    assert evaluate(directory, flip=True)['test_ema/loss'] != final['test_ema/loss']


def test_images_of_one_size_are_not_evaluated_at_another(run):
    directory, _ = run
    with pytest.raises(UsageError, match=r'config\.data\.test_image_size=24'):
        evaluate(directory, image_size=24)
