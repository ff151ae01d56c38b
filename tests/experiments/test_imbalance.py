"""Runs on classes of very different sizes: balanced sampling, and weights of the classes."""

import contextlib

import jax
import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from experiments.experiment import build, describe_imbalance
from experiments.run import device_cached, evaluation, parallel
from experiments.run.batches import open_batches
from experiments.train import train
from experiments.train_step import init_state, make_eval_step, make_train_step
from nfnets_jax.data import pipeline
from nfnets_jax.data.sources import Digits
from nfnets_jax.errors import UsageError
from tests.experiments.conftest import tiny_config
from tests.experiments.test_mixing import MIXED
from tests.experiments.test_train import assert_resumes_exactly, assert_same_run

BALANCED = {'data__sampling': 'balanced'}
COUNTS = (120, 30, 7)


@pytest.fixture(scope='module')
def unequal(tmp_path_factory):
    """`config.data` of digits of which there are 120, 30 and 7 in training."""
    digits = Digits('train', image_size=8, classes=(0, 1, 2))
    chosen = np.concatenate(
        [np.flatnonzero(digits.labels == label)[:count] for label, count in enumerate(COUNTS)]
    )
    file = tmp_path_factory.mktemp('data') / 'unequal.npz'
    np.savez(
        file,
        train_images=digits.images[chosen],
        train_labels=digits.labels[chosen],
        test_images=digits.images[:90],
        test_labels=digits.labels[:90],
        class_names=['zero', 'one', 'two'],
    )
    return {'name': 'arrays', 'path': str(file)}


def balanced_config(unequal, **changes):
    """157 images in steps of 64, or 128 of mixed ones: step 3 is in the second or third epoch."""
    return tiny_config(data=unequal, checkpoint__keep=3, **BALANCED, **changes)


@pytest.fixture(scope='module')
def programs():
    """What the runs of this file share."""
    return {}


@pytest.fixture(scope='module')
def balanced(unequal, programs, tmp_path_factory):
    directory = tmp_path_factory.mktemp('runs') / 'balanced'
    train(balanced_config(unequal), directory, programs=programs, quiet=True)
    return directory


def test_a_resumed_balanced_run_is_bit_for_bit_the_same(unequal, balanced, programs, tmp_path):
    assert_resumes_exactly(balanced_config(unequal), balanced, tmp_path / 'resumed', programs)


@pytest.mark.slow
def test_a_resumed_balanced_run_of_mixed_images_on_the_device(unequal, programs, tmp_path):
    config = balanced_config(unequal, data__on_device=True, **MIXED)
    train(config, tmp_path / 'whole', programs=programs, quiet=True)
    assert_resumes_exactly(config, tmp_path / 'whole', tmp_path / 'resumed', programs)


@pytest.mark.slow
def test_a_run_on_the_device_is_the_same_run(unequal, balanced, tmp_path):
    train(balanced_config(unequal, data__on_device=True), tmp_path / 'run', quiet=True)
    assert_same_run(balanced, tmp_path / 'run')


def test_images_on_the_device_are_the_same_images(unequal):
    """Over the ends of epochs, from the first step and from the fourth."""
    gathered = parallel.parallelize(
        lambda step, batch: jax.lax.all_gather(
            device_cached.take(batch, step, 64), parallel.AXIS, tiled=True
        )
    )
    experiments = [build(balanced_config(unequal, data__on_device=x)) for x in (False, True)]
    for first in (0, 3):
        with contextlib.ExitStack() as stack:
            host, device = (
                stack.enter_context(open_batches(x, first, pipeline.UnreadableExamples()))
                for x in experiments
            )
            for step in range(first, 6):
                found = gathered(parallel.replicate(np.int32(step)), next(device))
                for key, rows in next(host).items():
                    np.testing.assert_array_equal(
                        found[key], np.asarray(rows).reshape(found[key].shape), key
                    )


def test_a_balanced_epoch_holds_all_classes_equally_often(unequal):
    experiment = build(tiny_config(data=unequal, batch_size=52, **BALANCED))
    with open_batches(experiment, 0, pipeline.UnreadableExamples()) as batches:
        labels = np.concatenate([np.asarray(next(batches)['label']).ravel() for _ in range(6)])
    assert np.ptp(np.bincount(labels[:156])) <= 2  # the epoch has one image more
    assert np.ptp(np.bincount(labels)) <= 2


def test_the_order_of_a_run_is_not_free_to_change(unequal, balanced):
    with pytest.raises(UsageError, match="sampling is 'balanced' there and 'shuffled' here"):
        train(tiny_config(data=unequal), balanced)


def test_weighted_loss_and_gradient_equal_the_formula(unequal):
    """Soft targets included: -sum_k w_k t_k log p_k, in float64, the mean over the batch."""
    changes = {'augment__mixup': 0.2, 'augment__label_smoothing': 0.1, 'accumulate': 2}
    experiment = build(tiny_config(data=unequal, class_weights='balanced', **changes))
    labels = experiment.train_source.labels
    expected = compute_class_weight('balanced', classes=np.arange(3), y=labels)
    np.testing.assert_allclose(experiment.class_weights, expected, rtol=1e-6)

    seen = []
    augmentation = experiment.augmentation

    def recorded(*args):
        images, targets = augmentation(*args)
        jax.debug.callback(lambda *x: seen.append(x), images, targets)
        return images, targets

    object.__setattr__(experiment, 'augmentation', recorded)
    with open_batches(experiment, 0, pipeline.UnreadableExamples()) as batches:
        stop = parallel.shard(np.zeros(jax.device_count(), np.float32))
        state = jax.device_get(init_state(experiment))
        _, metrics = make_train_step(experiment)(
            parallel.replicate(state), next(batches) | {'stop': stop}
        )
    jax.effects_barrier()
    assert len(seen) == jax.device_count()
    losses, apply = [], jax.jit(experiment.model.apply, static_argnums=4)
    for images, targets in seen:
        outputs, _ = apply(state.params, state.state, None, images, True)
        logits = np.asarray(outputs['logits'], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        losses.append(-(expected * np.asarray(targets, np.float64) * log_p).sum(1))
    assert float(metrics['loss']) == pytest.approx(np.mean(losses), rel=1e-5)


def test_evaluation_is_not_weighted(unequal):
    """Nothing has moved after a step at a rate of 0."""
    evaluated, losses = [], []
    for name in ('none', 'balanced'):
        config = tiny_config(data=unequal, class_weights=name, optimizer__learning_rate=0.0)
        experiment = build(config)
        stop = parallel.shard(np.zeros(jax.device_count(), np.float32))
        state = parallel.replicate(init_state(experiment))
        with open_batches(experiment, 0, pipeline.UnreadableExamples()) as batches:
            state, metrics = make_train_step(experiment)(state, next(batches) | {'stop': stop})
        losses.append(float(metrics['loss']))
        step = make_eval_step(experiment)
        evaluated.append(evaluation.evaluate(experiment, step, state.variables()))
    assert evaluated[0] == evaluated[1]
    assert losses[0] != losses[1]


def test_a_line_names_classes_that_are_very_unequal(unequal):
    told = "unequal classes: 'zero' has 120 training images, 'two' 7"
    assert list(describe_imbalance(build(tiny_config(data=unequal)))) == [
        f'{told}; consider --config.data.sampling=balanced or --config.class_weights=balanced'
    ]
    assert list(describe_imbalance(build(tiny_config(data=unequal, **BALANCED)))) == [
        f'{told}; with --config.data.sampling=balanced'
    ]
    assert not list(describe_imbalance(build(tiny_config())))
