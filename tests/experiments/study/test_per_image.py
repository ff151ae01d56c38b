import json
import shutil

import numpy as np
import pytest

from experiments.evaluate import evaluate
from experiments.run import metric_writers
from experiments.study import measurements, per_image
from tests.experiments.conftest import tiny_config


def test_bits_come_back(tmp_path):
    assert per_image.read(tmp_path) == {}
    bits = np.random.default_rng(0).random(355) < 0.9
    per_image.write(tmp_path, {'test': per_image.Correct(bits, 'abc')})
    assert (tmp_path / per_image.PER_IMAGE_FILE).stat().st_size < 1500
    found = per_image.read(tmp_path)
    np.testing.assert_array_equal(found['test'].is_correct, bits)
    assert found['test'].images == 'abc'


CONFIG = tiny_config(data__validation_fraction=0.2, ema=0.9)


@pytest.fixture(scope='module')
def trial(tmp_path_factory):
    """The directory of a trial, and its metrics; nothing was predicted after its training."""
    directory = tmp_path_factory.mktemp('trial') / 'run'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurements, 'predict', None)
        return directory, measurements.training(CONFIG, directory, measurements.Compiled())


def test_a_trial_keeps_which_images_it_classifies(trial):
    directory, metrics = trial
    found = per_image.read(directory)
    assert {split: len(one.is_correct) for split, one in found.items()} == {
        'test': 355,
        'test_ema': 355,
        'validation': 288,
        'validation_ema': 288,
    }
    data = json.loads((directory / 'data.json').read_text())['splits']
    for split, one in found.items():
        assert one.is_correct.mean() == pytest.approx(metrics[f'{split}/top1'], abs=1e-6)
        assert one.images == data[split.removesuffix('_ema')]['checksum']
    assert evaluate(str(directory))['test/top1'] == metrics['test/top1']
    steps = [r['step'] for r in metric_writers.read_metrics(directory) if 'test/top1' in r]
    assert steps == [6], 'test images are evaluated once, at the end'


def test_the_predictions_of_a_trial_are_computed_once(trial, tmp_path, monkeypatch):
    shutil.copytree(trial[0], tmp_path / 'run')
    file = tmp_path / 'run' / per_image.PER_IMAGE_FILE
    written = file.read_bytes()
    again = []
    predict = measurements.predict
    monkeypatch.setattr(measurements, 'predict', lambda *args: again.append(1) or predict(*args))

    # A trial that was interrupted after its last evaluation predicts; its file is the same.
    file.unlink()
    measurements.training(CONFIG, tmp_path / 'run', measurements.Compiled())
    assert len(again) == 2, 'test and validation'
    assert file.read_bytes() == written
