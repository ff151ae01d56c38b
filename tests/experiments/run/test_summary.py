import jax
import numpy as np
import pytest

from experiments.experiment import build
from experiments.run import batches, parallel, summary
from nfnets_jax import augment
from nfnets_jax.data import pipeline
from tests.experiments.conftest import tiny_config


@pytest.mark.parametrize(
    ('lines', 'expected'),
    [
        ([{'step': 1, 'train/loss': 2.0}], ''),
        (
            [
                {'step': 1, 'test/top1': 0.9, 'test_ema/top1': 0.25},
                {'step': 2000, 'test/top1': 0.1, 'test_ema/top1': 0.5},
                {'step': 3000, 'test/top1': 0.1, 'test_ema/top1': 0.5},
            ],
            'best test EMA top-1: 50.00% at step 2,000',
        ),
        ([{'step': 1, 'test/top1': 0.9, 'test/map': 0.25}], 'best test mAP: 25.00% at step 1'),
    ],
)
def test_the_best_evaluation_in_words(lines, expected):
    assert summary.describe_best(lines, 'test') == expected


@pytest.mark.parametrize(
    ('augment', 'expected'),
    [
        ({'label_smoothing': 0.0}, 'of augmented images; weight'),
        (
            {'label_smoothing': 0.1, 'mixup': 0.2, 'cutmix': 1.0},
            'images and includes label smoothing 0.1, labels mixed by MixUp and CutMix; weight',
        ),
    ],
)
def test_what_the_training_loss_includes(augment, expected):
    config = tiny_config()
    config.augment.update(augment)
    assert expected in summary.describe_loss(build(config))


def test_the_first_images_are_those_of_the_batch():
    for on_device in (False, True):
        config = tiny_config()
        config.data.on_device = on_device
        experiment = build(config)
        with parallel.using(experiment.devices):
            opened = batches.open_batches(experiment, 0, pipeline.UnreadableExamples(0))
            with opened as found:
                images = batches.some_images(next(found), most=3)
        assert images.shape == (3, *experiment.image_spec.shape)
        assert images.dtype == 'uint8'


@pytest.mark.parametrize('on_device', [False, True])
@pytest.mark.parametrize('changes', [{}, {'flip': True, 'mixup': 0.5}])
def test_augmented_images_are_those_that_the_network_sees(on_device, changes):
    config = tiny_config()
    config.data.on_device = on_device
    config.augment.update({'shift': 0} | changes)
    experiment = build(config)
    spec, size = experiment.image_spec, experiment.images_per_step
    plain = pipeline.train_batches(
        experiment.train_source, batch_size=size, seed=config.seed, transform=spec.train_transform
    )
    first = next(iter(plain))
    with parallel.using(experiment.devices):
        rows = size // parallel.device_count()
        opened = batches.open_batches(experiment, 0, pipeline.UnreadableExamples(0))
        with opened as found:
            images = batches.augmented_images(experiment, next(found), most=3)
    expected = first['image'][:3]
    if changes:
        keys = augment.example_keys(config.seed, 0, np.arange(rows))
        seen, _ = jax.jit(experiment.augmentation)(
            keys, first['image'][:rows], first['label'][:rows]
        )
        expected = np.rint(np.array(seen[:3], np.float32) * spec.std + np.array(spec.mean))
        assert np.any(expected != first['image'][:3])
    assert images.dtype == 'uint8'
    np.testing.assert_allclose(images, np.clip(expected, 0, 255), atol=1)
