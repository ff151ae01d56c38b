import pytest

from experiments.experiment import build
from experiments.run import batches, parallel, summary
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
