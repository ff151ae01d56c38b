"""Training where each example is mixed from two images of its own, as published."""

import chex
import jax
import numpy as np
import pytest

from experiments.experiment import build
from experiments.run import evaluation, metric_writers, parallel, step_metrics
from experiments.run.batches import open_batches
from experiments.train import train
from experiments.train_step import init_state, make_eval_step, make_train_step
from nfnets_jax.data import pipeline
from nfnets_jax.errors import UsageError
from nfnets_jax.weights.checkpoints import CheckpointReader
from tests.experiments.conftest import tiny_config
from tests.experiments.test_train import assert_resumes_exactly, assert_same_run

MIXED = {'augment__mixup': 0.2, 'augment__cutmix': 1.0, 'augment__mix_pairs': 'distinct'}
NOISE = {'name': 'noise', 'image_size': 8, 'classes': 10, 'examples': 256}


@pytest.fixture(scope='module')
def programs():
    """What the runs of this file share."""
    return {}


@pytest.fixture(scope='module')
def whole(programs, tmp_path_factory):
    """A run that was never stopped."""
    directory = tmp_path_factory.mktemp('runs') / 'whole'
    train(tiny_config(checkpoint__keep=3, **MIXED), directory, programs=programs, quiet=True)
    return directory


def test_every_image_of_an_epoch_is_read_once():
    """A step of 64 examples reads 128 images; epochs count examples, as the authors' do."""
    experiment = build(tiny_config(data=NOISE, duration='1 epochs', **MIXED))
    assert (experiment.total_steps, experiment.images_per_step) == (4, 128)
    with open_batches(experiment, 0, pipeline.UnreadableExamples()) as batches:
        for _ in range(2):
            read = [np.asarray(next(batches)['image']).reshape(128, -1) for _ in range(2)]
            found = sorted(image.tobytes() for image in np.concatenate(read))
            assert found == sorted(image.tobytes() for image in experiment.train_source.images)
            assert len(set(found)) == 256


def test_a_resumed_run_is_bit_for_bit_the_same(whole, programs, tmp_path):
    config = tiny_config(checkpoint__keep=3, **MIXED)
    assert_resumes_exactly(config, whole, tmp_path / 'run', programs)


def test_images_on_the_device_are_the_same_images(whole, tmp_path):
    config = tiny_config(data__on_device=True, checkpoint__keep=3, **MIXED)
    train(config, tmp_path / 'run', quiet=True)
    assert_same_run(whole, tmp_path / 'run')


def run_steps(count, **changes):
    """The state after so many steps of a run."""
    experiment = build(tiny_config(**(MIXED | changes)))
    step, state = make_train_step(experiment), parallel.replicate(init_state(experiment))
    stop = parallel.shard(np.zeros(parallel.device_count(), np.float32))
    with open_batches(experiment, 0, pipeline.UnreadableExamples()) as batches:
        for _ in range(count):
            state, _ = step(state, next(batches) | {'stop': stop})
    return jax.device_get(state)


def test_the_number_of_devices_changes_nothing(whole):
    with parallel.using(jax.devices()[:1]):
        one = run_steps(3)
        experiment = build(tiny_config(**MIXED))
        variables = parallel.replicate(one).variables()
        evaluated = evaluation.evaluate(experiment, make_eval_step(experiment), variables)
    four = CheckpointReader(whole / 'checkpoints').restore(3, one)
    for x, y in ((one.params, four.params), (one.ema_params, four.ema_params)):
        chex.assert_trees_all_close(x, y, rtol=1e-4, atol=1e-5)
    assert step_metrics.means(one.window) == pytest.approx(
        step_metrics.means(four.window), rel=1e-4
    )
    lines = metric_writers.read_metrics(whole)
    (loss,) = (x['test/loss'] for x in lines if x['step'] == 3 and 'test/loss' in x)
    assert evaluated['test/loss'] == pytest.approx(loss, rel=1e-4)


def test_pairs_of_the_batch_are_another_experiment(whole):
    state = run_steps(2, augment__mix_pairs='batch')
    line = metric_writers.read_metrics(whole)[0]
    assert line['step'] == state.step == 2
    assert line['train/loss'] != step_metrics.means(state.window)['loss']
    with pytest.raises(UsageError, match="mix_pairs is 'distinct' there and 'batch' here"):
        train(tiny_config(**(MIXED | {'augment__mix_pairs': 'batch'})), whole)


@pytest.mark.slow
def test_parts_of_a_batch_add_up_to_the_whole():
    whole, parts = run_steps(1), run_steps(1, accumulate=4)
    chex.assert_trees_all_close(whole.params, parts.params, rtol=1e-5, atol=1e-6)


def test_a_batch_that_reads_more_images_than_there_are_is_refused():
    with pytest.raises(UsageError, match=r"mix_pairs='distinct': a step .*=200 reads 400 images"):
        build(tiny_config(data=NOISE, batch_size=200, **MIXED))
