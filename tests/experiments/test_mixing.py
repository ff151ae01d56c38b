"""Training where each example is mixed from two images of its own, as published."""

import chex
import jax
import numpy as np
import pytest

from experiments.experiment import build
from experiments.run import metric_writers, parallel
from experiments.run.batches import open_batches
from experiments.train import train
from experiments.train_step import init_state, make_train_step
from nfnets_jax.data import pipeline
from nfnets_jax.errors import UsageError
from tests.experiments.conftest import tiny_config
from tests.experiments.test_train import assert_resumes_exactly, assert_same_run, final_state

MIXED = {'augment__mixup': 0.2, 'augment__cutmix': 1.0, 'augment__mix_pairs': 'distinct'}
NOISE = {'name': 'noise', 'image_size': 8, 'classes': 10, 'examples': 256}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A run that was never stopped."""
    directory = tmp_path_factory.mktemp('runs') / 'whole'
    train(tiny_config(checkpoint__keep=3, **MIXED), directory)
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


def test_a_resumed_run_is_bit_for_bit_the_same(whole, tmp_path):
    assert_resumes_exactly(tiny_config(checkpoint__keep=3, **MIXED), whole, tmp_path / 'run')


def test_images_on_the_device_are_the_same_images(whole, tmp_path):
    train(tiny_config(data__on_device=True, checkpoint__keep=3, **MIXED), tmp_path / 'run')
    assert_same_run(whole, tmp_path / 'run')


def test_the_number_of_devices_changes_nothing(whole, command, tmp_path):
    options = [f'--config.{key.replace("__", ".")}={value}' for key, value in MIXED.items()]
    process = command('train', f'--workdir={tmp_path}/run', *options, devices=1)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    chex.assert_trees_all_close(
        final_state(whole).params, final_state(tmp_path / 'run').params, rtol=1e-4, atol=1e-5
    )


def test_pairs_of_the_batch_are_another_experiment(whole, tmp_path):
    train(tiny_config(**(MIXED | {'augment__mix_pairs': 'batch'})), tmp_path / 'run')
    losses = [
        metric_writers.read_metrics(run)[0]['train/loss'] for run in (whole, tmp_path / 'run')
    ]
    assert losses[0] != losses[1]
    with pytest.raises(UsageError, match="mix_pairs is 'distinct' there and 'batch' here"):
        train(tiny_config(**(MIXED | {'augment__mix_pairs': 'batch'})), whole)


def test_parts_of_a_batch_add_up_to_the_whole():
    def step(**changes):
        experiment = build(tiny_config(**MIXED, **changes))
        with open_batches(experiment, 0, pipeline.UnreadableExamples()) as batches:
            stop = parallel.shard(np.zeros(jax.device_count(), np.float32))
            state = parallel.replicate(init_state(experiment))
            state, _ = make_train_step(experiment)(state, next(batches) | {'stop': stop})
        return state.params

    chex.assert_trees_all_close(step(), step(accumulate=4), rtol=1e-5, atol=1e-6)


def test_a_batch_that_reads_more_images_than_there_are_is_refused():
    with pytest.raises(UsageError, match=r"mix_pairs='distinct': a step .*=200 reads 400 images"):
        build(tiny_config(data=NOISE, batch_size=200, **MIXED))
