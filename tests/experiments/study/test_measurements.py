import types

import numpy as np
import pytest
from PIL import Image

from experiments.experiment import build
from experiments.study import measurements
from nfnets_jax.errors import UsageError
from tests.experiments.conftest import tiny_config


def test_the_memory_of_a_step_is_that_of_its_activations(monkeypatch):
    model = {'name': 'NF-ResNet-8', 'widths': (8,), 'depths': (1,)}
    compiled = measurements.Compiled()
    step = measurements.step_memory(tiny_config(model=model), None, compiled)
    layer = 64 / 4 * 8 * 8 * 8 * 4 / 2**20  # one device of four, float32
    # Three are kept for the backward pass at the least.
    assert 3 * layer < step['memory/step_mib'] < 30 * layer

    # Another seed and another learning rate are data to the same program.
    monkeypatch.setattr(measurements, 'make_train_step', None)
    other = tiny_config(model=model, seed=1, optimizer__learning_rate=0.5)
    assert measurements.step_memory(other, None, compiled) == step


def test_encoded_images_are_measured_as_evaluation_sees_them(tmp_path):
    for split, count in (('train', 4), ('test', 2)):
        for i in range(count):
            path = tmp_path / split / 'ab'[i % 2] / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (20, 10 + i), (9 * i, 5, 7)).save(path)
    config = tiny_config(batch_size=4)
    config.data = {'name': 'folder', 'path': str(tmp_path), 'image_size': 8, 'test_image_size': 8}
    experiment = build(config)
    images, labels = measurements._load_images(experiment, experiment.train_source, [1, 0])
    assert images.shape == (2, 8, 8, 3)
    reds = [int(experiment.train_source.where(i).rpartition('/')[2][0]) * 9 for i in (1, 0)]
    np.testing.assert_array_equal(images[:, 4, 4], [(red, 5, 7) for red in reds])
    np.testing.assert_array_equal(labels, [experiment.train_source[i]['label'] for i in (1, 0)])


def test_what_needs_one_label_is_refused_where_images_have_several():
    several, one = (types.SimpleNamespace(multi_label=x) for x in (True, False))
    measurements.check(['train', 'step_memory'], several)
    measurements.check(['train', 'loss_landscape'], one)
    with pytest.raises(UsageError, match="'loss_landscape' is for images with one label"):
        measurements.check(['train', 'loss_landscape'], several)
