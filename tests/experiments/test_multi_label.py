"""Several labels for an image, from the arrays to the classes that are named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from experiments import classify
from experiments.evaluate import evaluate
from experiments.experiment import build, describe_data, describe_imbalance
from experiments.export import export_weights
from experiments.run import curves, evaluation, metric_writers, parallel, workdir
from experiments.run.batches import open_batches
from experiments.train import train
from experiments.train_step import init_state, make_eval_step, make_train_step
from nfnets_jax import augment
from nfnets_jax.data import pipeline
from nfnets_jax.errors import UsageError
from nfnets_jax.weights import pretrained
from nfnets_jax.weights.checkpoints import CheckpointReader
from tests.experiments.conftest import tiny_config
from tests.experiments.test_distributed import Job
from tests.experiments.test_mixing import MIXED
from tests.experiments.test_train import assert_resumes_exactly, assert_same_run, final_state

NAMES = ('top', 'middle', 'bottom', 'never')
CHANGES = {'augment__shift': 0, 'checkpoint__keep': 3}


def make_images(count, seed):
    """Noise with bright bands, and which of the three each image has; nothing is of class 3."""
    rng = np.random.default_rng(seed)
    labels = (rng.uniform(size=(count, 4)) < [0.5, 0.3, 0.04, 0]).astype(np.uint8)
    images = rng.integers(0, 120, (count, 8, 8, 3))
    for band in range(3):
        images[:, 3 * band : 3 * band + 2] += 120 * labels[:, band, None, None, None]
    return images.astype(np.uint8), labels


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp('data') / 'bands.npz'
    arrays = {}
    for split, count, seed in (('train', 150, 0), ('val', 70, 1), ('test', 90, 2)):
        arrays[f'{split}_images'], arrays[f'{split}_labels'] = make_images(count, seed)
    np.savez(file, class_names=NAMES, **arrays)
    return {'name': 'arrays', 'path': str(file)}


@pytest.fixture(scope='module')
def run(data, tmp_path_factory):
    directory = tmp_path_factory.mktemp('runs') / 'run'
    return directory, train(tiny_config(data=data, **CHANGES), directory, quiet=True)


@pytest.fixture(scope='module')
def final(run):
    """The experiment of the run, the state it ended with, and a function that applies it."""
    experiment = build(workdir.load_config(run[0]))
    return experiment, final_state(run[0]), jax.jit(experiment.model.apply, static_argnums=4)


@pytest.fixture(scope='module')
def predictions(final):
    """The logits of the final average, in one plain forward pass, and the labels."""
    experiment, state, apply = final
    source = experiment.test_source
    images = augment.normalize(source.images)
    outputs, _ = apply(state.ema_params, state.ema_state, None, images, False)
    return np.asarray(outputs['logits'], np.float64), source.labels


def test_figures_equal_scikit_learns(run, predictions):
    _, summary = run
    logits, labels = predictions
    there = slice(3)  # no image is of class 3
    final = summary['final']
    expected = {
        'map': average_precision_score(labels[:, there], logits[:, there]),
        'auc': roc_auc_score(labels[:, there], logits[:, there]),
        'top1': np.mean(labels[np.arange(90), logits.argmax(1)]),
        'loss': np.mean(
            [
                log_loss(labels[:, k], 1 / (1 + np.exp(-logits[:, k])), labels=[0, 1])
                for k in range(4)
            ]
        ),
    }
    for name, value in expected.items():
        assert final[f'test_ema/{name}'] == pytest.approx(value, rel=1e-5), name
    assert 'test/top5' not in final


def test_mirror_images_average_the_probabilities(run, final):
    """The loss is that of the mean of the sigmoids."""
    directory, _ = run
    experiment, state, apply = final
    source = experiment.test_source
    p = []
    for images in (source.images, source.images[:, :, ::-1]):
        outputs, _ = apply(
            state.ema_params, state.ema_state, None, augment.normalize(images), False
        )
        p.append(1 / (1 + np.exp(-np.asarray(outputs['logits'], np.float64))))
    mean, t = np.mean(p, axis=0), source.labels
    expected = -np.mean(t * np.log(mean) + (1 - t) * np.log(1 - mean))
    found = evaluate(str(directory), flip=True)
    assert found['test_ema/loss'] == pytest.approx(expected, rel=1e-5)


def test_the_report_agrees_with_the_metrics(run, tmp_path):
    directory, _ = run
    metrics = evaluate(str(directory), report=str(tmp_path))
    summary = json.loads((tmp_path / 'summary.json').read_text())
    assert summary['images'] == 90
    for name in ('map', 'auc', 'top1', 'loss'):
        assert summary[name] == metrics[f'test_ema/{name}']
    assert len((tmp_path / 'predictions.csv').read_text().splitlines()) == 91


@pytest.mark.parametrize('batch_size', [None, 7, 64])
def test_figures_do_not_depend_on_the_batch_size(run, batch_size):
    directory, summary = run
    found = evaluate(str(directory), batch_size=batch_size, split='validation')
    assert found.pop('step') == 6
    assert found == pytest.approx({name: summary['final'][name] for name in found}, rel=1e-5)


def test_figures_do_not_depend_on_the_number_of_processes(run, command):
    """Two with two devices each; the last batch of 20 is half padding."""
    directory, summary = run
    flags = ('--json', '--batch_size=20')
    (status, out, err), _ = Job(command, 2, directory, *flags, name='evaluate').wait()
    assert status == 0, err
    found = json.loads(out)
    assert found.pop('step') == 6
    assert found == pytest.approx({name: summary['final'][name] for name in found}, rel=1e-5)


def test_the_best_checkpoint_is_chosen_by_average_precision(run):
    directory, summary = run
    scores = CheckpointReader(directory / 'checkpoints').scores()
    lines = metric_writers.read_metrics(directory)
    by_step = {r['step']: r['validation_ema/map'] for r in lines if 'validation_ema/map' in r}
    assert scores == by_step
    assert summary['best']['validation_ema/map'] == max(by_step.values())


def test_what_is_told(run, data):
    _, summary = run
    line = evaluation.describe_accuracy(summary['final'])
    final = {name: f'{value:.2%}' for name, value in summary['final'].items()}
    assert line.endswith(
        f'test mAP {final["test/map"]}, AUC {final["test/auc"]}, top-1 {final["test/top1"]} '
        f'(EMA {final["test_ema/map"]}, {final["test_ema/auc"]}, {final["test_ema/top1"]})'
    )
    experiment = build(tiny_config(data=data))
    (described,) = describe_data(experiment)
    assert described.startswith('data: 4 classes, of which an image may have several; 150 training')
    (unequal,) = describe_imbalance(experiment)
    counts = experiment.train_source.labels.sum(0)
    assert unequal == (
        f"unequal classes: 'top' has {counts[0]} training images, 'never' 0; consider "
        '--config.class_weights=balanced'
    )


def test_curves_show_the_ranking(run):
    directory, _ = run
    figure = curves.curves(metric_writers.read_metrics(directory))
    titles = [axes.get_title(loc='left') for axes in figure.axes]
    assert titles[1:4] == [
        'Top-1 accuracy',
        'Mean average precision',
        'Area under the ROC curve',
    ]


OPTIONS = {'class_weights': 'balanced', 'augment__label_smoothing': 0.1, **CHANGES, **MIXED}


@pytest.fixture(scope='module')
def on_device(data, tmp_path_factory):
    """A run that is mixed, weighted and on the devices, its config and programs."""
    config, programs = tiny_config(data=data, data__on_device=True, **OPTIONS), {}
    directory = tmp_path_factory.mktemp('runs') / 'on_device'
    train(config, directory, programs=programs, quiet=True)
    return directory, config, programs


def test_a_resumed_run_is_bit_for_bit_the_same(on_device, tmp_path):
    directory, config, programs = on_device
    assert_resumes_exactly(config, directory, tmp_path / 'resumed', programs)


@pytest.mark.slow
def test_images_on_the_device_are_the_same_images(on_device, data, tmp_path):
    train(tiny_config(data=data, **OPTIONS), tmp_path / 'host', quiet=True)
    assert_same_run(on_device[0], tmp_path / 'host')


def test_training_metrics_are_those_of_the_formula(data, tmp_path):
    """The first step, which changes nothing before it is measured."""
    options = {'class_weights': 'balanced', 'batch_size': 148, 'log_every': '1 steps', **CHANGES}
    config = tiny_config(data=data, duration='1 steps', augment__label_smoothing=0.2, **options)
    train(config, tmp_path / 'run', quiet=True)
    line = metric_writers.read_metrics(tmp_path / 'run')[0]

    experiment = build(config)
    state = init_state(experiment)
    with open_batches(experiment, 0, pipeline.UnreadableExamples()) as batches:
        batch = next(batches)
    images, labels = (
        np.asarray(batch[key]).reshape(148, *batch[key].shape[2:]) for key in ('image', 'label')
    )
    apply = jax.jit(experiment.model.apply, static_argnums=4)
    outputs, _ = apply(state.params, state.state, None, augment.normalize(images), True)
    x = np.asarray(outputs['logits'], np.float64)
    t = labels * 0.8 + 0.1
    counts = experiment.train_source.labels.sum(0)
    w = np.array([counts.sum() / (3 * count) if count else 1 for count in counts])
    losses = w * t * np.log1p(np.exp(-x)) + (1 - t) * np.log1p(np.exp(x))
    assert line['train/loss'] == pytest.approx(losses.mean(), rel=1e-5)
    assert line['train/top1'] == pytest.approx(labels[np.arange(148), x.argmax(1)].mean())


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))


def test_sam_climbs_by_the_loss_of_several_labels(data):
    """The norm of the mean over the devices of each one's gradient at w + rho g / |g|."""
    experiment = build(tiny_config(data=data, sam__rho=0.1, batch_size=64, **CHANGES))
    state = jax.device_get(init_state(experiment))
    with open_batches(experiment, 0, pipeline.UnreadableExamples()) as batches:
        batch = next(batches) | {'stop': parallel.shard(np.zeros(jax.device_count(), np.float32))}
    _, metrics = make_train_step(experiment)(parallel.replicate(state), batch)

    @jax.jit
    @jax.grad
    def gradient(params, images, labels):
        images = augment.normalize(images)
        x = experiment.model.apply(params, state.state, None, images, True)[0]['logits']
        return jnp.mean(jnp.where(labels == 1, jnp.log1p(jnp.exp(-x)), jnp.log1p(jnp.exp(x))))

    of_devices = []
    for images, labels in zip(*map(np.asarray, (batch['image'], batch['label'])), strict=True):
        first = gradient(state.params, images, labels)
        first = jax.device_get(first)
        scale = 0.1 / norm(first)
        there = jax.tree.map(lambda w, g, scale=scale: w + scale * g, state.params, first)
        of_devices.append(jax.device_get(gradient(there, images, labels)))
    expected = norm(jax.tree.map(lambda *g: sum(g) / len(g), *of_devices))
    assert float(metrics['gradient_norm']) == pytest.approx(expected, rel=1e-4)
    assert float(metrics['gradient_norm']) != pytest.approx(norm(first), rel=1e-2)


def test_a_table_is_evaluated_like_the_arrays(run, tmp_path):
    """The same images and labels; one more image is not there, and is skipped."""
    directory, summary = run
    lines = [','.join(('path', *NAMES, 'split'))]
    for split, count, seed in (('train', 150, 0), ('test', 90, 2)):
        for i, (image, label) in enumerate(zip(*make_images(count, seed), strict=True)):
            lines.append(','.join(map(str, (f'{split}{i}.png', *label, split))))
            Image.fromarray(image).save(tmp_path / f'{split}{i}.png')
    table = tmp_path / 'table.csv'
    table.write_text('\n'.join([*lines, 'none.png,1,0,1,0,test']))
    data = {'name': 'table', 'path': str(table), 'label_columns': NAMES, 'skip_bad': 1}
    sizes = {'image_size': 8, 'test_image_size': 8, 'test_mode': 'resize_crop_1.0'}
    experiment = build(tiny_config(data=data | sizes, **CHANGES))
    variables = parallel.replicate(final_state(directory).variables())
    found = evaluation.evaluate(experiment, make_eval_step(experiment), variables)
    assert found.pop('test/skipped_pictures') == 1
    assert found == pytest.approx({name: summary['final'][name] for name in found}, rel=1e-6)


def test_weights_know_that_images_have_several_labels(run, predictions, tmp_path):
    directory, _ = run
    weights = pretrained.load_pretrained(directory)
    assert weights.metadata.multi_label
    export_weights(weights, tmp_path / 'w.safetensors')
    assert pretrained.load_metadata(tmp_path / 'w.safetensors').multi_label
    assert '4 classes (multi-label), ' in pretrained.describe(weights)
    logits, _ = predictions
    images, _ = make_images(90, 2)
    paths = []
    for i in range(3):
        paths.append(tmp_path / f'{i}.png')
        Image.fromarray(images[i]).save(paths[-1])
    for threshold in (None, 0.2, 0.999):
        found = classify.classify(weights, paths, top=2, threshold=threshold)
        for (_, guesses), row in zip(found, logits, strict=False):
            p = 1 / (1 + np.exp(-row))
            order = np.argsort(-p)
            shown = order[:2] if threshold is None else order[p[order] >= threshold]
            assert [guess.label for guess in guesses] == list(shown)
            probabilities = [guess.probability for guess in guesses]
            np.testing.assert_allclose(probabilities, p[shown], rtol=1e-4)


def test_earlier_metadata_speak_of_one_label(run):
    text = json.loads(pretrained.encode_metadata(pretrained.Metadata(num_classes=3)))
    del text['multi_label']
    assert not pretrained.decode_metadata(json.dumps(text), 'model.json').multi_label
    with pytest.raises(UsageError, match='multi_label is 1'):
        pretrained.decode_metadata(json.dumps(text | {'multi_label': 1}), 'model.json')


def test_no_class_can_be_drawn_equally_often(data):
    with pytest.raises(UsageError, match=r"data.sampling='balanced': images of .* several labels"):
        build(tiny_config(data=data, data__sampling='balanced'))
