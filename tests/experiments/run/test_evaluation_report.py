import csv
import json

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics

from experiments.run import evaluation_report
from experiments.run.predictions import Predictions
from nfnets_jax.data.sources import ArraySource

NAMES = ('cat', 'dog', 'f$x', 'owl \udcff')  # the last two are hard to write and to draw


@pytest.fixture(scope='module')
def predictions():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)  # no owl
    logits = rng.normal(size=(200, 4)) + 1.5 * np.eye(4)[labels]
    return Predictions(logits.astype(np.float32), labels.astype(np.int32), np.arange(200))


def probabilities(predictions):
    exponentials = np.exp(predictions.logits.astype(np.float64))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def test_scores_equal_scikit_learns(predictions):
    labels, predicted = predictions.labels, predictions.predicted
    confusion = evaluation_report.confusion_matrix(predictions)
    np.testing.assert_array_equal(
        confusion, metrics.confusion_matrix(labels, predicted, labels=range(4))
    )
    precision, recall, f1, images = metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(4), zero_division=0
    )
    scores = evaluation_report.class_scores(confusion)
    np.testing.assert_array_equal(scores.images, images)
    np.testing.assert_allclose(scores.precision, precision)
    np.testing.assert_allclose(scores.recall, recall)
    np.testing.assert_allclose(scores.f1, f1)
    summary = evaluation_report.summarize(predictions)
    assert summary['top1'] == metrics.accuracy_score(labels, predicted)
    with pytest.warns(UserWarning, match='y_pred contains classes not in y_true'):
        balanced = metrics.balanced_accuracy_score(labels, predicted)
    assert summary['mean_class_accuracy'] == pytest.approx(balanced)
    assert summary['macro_f1'] == pytest.approx(np.mean(f1[:3]))
    assert summary['loss'] == pytest.approx(
        metrics.log_loss(labels, probabilities(predictions), labels=range(4))
    )


def test_calibration_is_the_definitions(predictions):
    confidence = probabilities(predictions).max(axis=1)
    error = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            gap = predictions.is_correct[inside].mean() - confidence[inside].mean()
            error += inside.mean() * abs(gap)
    assert evaluation_report.calibration(predictions).error == pytest.approx(error)


def test_certain_and_right_predictions_have_no_calibration_error():
    labels = np.arange(4)
    certain = Predictions(200 * np.eye(4, dtype=np.float32), labels, labels)
    assert evaluation_report.calibration(certain).error == 0


def test_every_file_is_written_and_read_back(predictions, tmp_path):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (200, 12, 10, 3), np.uint8)
    source = ArraySource(images, predictions.labels, NAMES, name='made')
    summary = evaluation_report.write_report(tmp_path / 'report', predictions, source, title='test')
    assert json.loads((tmp_path / 'report' / 'summary.json').read_text()) == summary

    def read(name):
        with open(tmp_path / 'report' / name, encoding='utf-8', newline='') as file:
            return list(csv.DictReader(file))

    by_class = read('classes.csv')
    assert [row['class'] for row in by_class] == ['cat', 'dog', 'f$x', 'owl \\udcff']
    assert sum(int(row['images']) for row in by_class) == 200
    rows = read('predictions.csv')
    assert [row['image'] for row in rows[:2]] == ['made[0]', 'made[1]']
    right = [row['label'] == row['predicted'] for row in rows]
    np.testing.assert_array_equal(right, predictions.is_correct)
    for name in ('confusion.png', 'calibration.png', 'worst.png'):
        with Image.open(tmp_path / 'report' / name) as image:
            assert len(image.convert('RGB').getcolors(1 << 24)) > 10


@pytest.mark.parametrize('classes', [2, 1000])
def test_two_and_a_thousand_classes(classes, tmp_path):
    labels = np.arange(4) % 2
    logits = np.zeros((4, classes), np.float32)
    logits[:, 0] = 1
    source = ArraySource(np.zeros((4, 8, 8, 3), np.uint8), labels, tuple(map(str, range(classes))))
    summary = evaluation_report.write_report(
        tmp_path, Predictions(logits, labels, np.arange(4)), source
    )
    assert summary['top1'] == summary['mean_class_accuracy'] == 0.5


def test_a_full_disk_is_one_line(predictions, tmp_path, monkeypatch):
    source = ArraySource(np.zeros((200, 8, 8, 3), np.uint8), predictions.labels, NAMES)

    def refuse(*arguments):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('os.fsync', refuse)
    with pytest.raises(ValueError, match=r'classes\.csv cannot be written: No space left'):
        evaluation_report.write_report(tmp_path, predictions, source)
