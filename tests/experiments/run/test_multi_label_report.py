import csv
import json

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics

from experiments.run import multi_label_report
from experiments.run.predictions import Predictions
from nfnets_jax.data.sources import ArraySource

NAMES = ('cat', 'dog', 'f$x', 'owl \udcff')  # the last two are hard to write and to draw


@pytest.fixture(scope='module')
def predictions():
    rng = np.random.default_rng(0)
    labels = (rng.uniform(size=(200, 4)) < [0.5, 0.2, 0.05, 0]).astype(np.uint8)  # no owl
    logits = rng.normal(size=(200, 4)) + 2 * labels - 1.5
    return Predictions(logits.astype(np.float32), labels, np.arange(200))


@pytest.fixture(scope='module')
def probabilities(predictions):
    return 1 / (1 + np.exp(-predictions.logits.astype(np.float64)))


def test_scores_equal_scikit_learns(predictions, probabilities):
    labels, scores = predictions.labels, multi_label_report.class_scores(predictions)
    for k in range(3):
        pair = labels[:, k], probabilities[:, k]
        assert scores.average_precision[k] == pytest.approx(metrics.average_precision_score(*pair))
        assert scores.auc[k] == pytest.approx(metrics.roc_auc_score(*pair))
    assert np.isnan(scores.average_precision[3])
    precision, recall, f1, images = metrics.precision_recall_fscore_support(
        labels, probabilities >= 0.5, zero_division=0
    )
    np.testing.assert_array_equal(scores.images, images)
    np.testing.assert_allclose(scores.precision, precision)
    np.testing.assert_allclose(scores.recall, recall)
    np.testing.assert_allclose(scores.f1, f1)
    summary = multi_label_report.summarize(predictions)
    assert summary['map'] == pytest.approx(
        metrics.average_precision_score(labels[:, :3], probabilities[:, :3])
    )
    assert summary['macro_f1'] == pytest.approx(np.mean(f1[:3]))
    losses = [metrics.log_loss(labels[:, k], probabilities[:, k], labels=[0, 1]) for k in range(4)]
    assert summary['loss'] == pytest.approx(np.mean(losses))


def test_the_calibration_of_each_class_is_the_definitions(predictions, probabilities):
    found = multi_label_report.class_scores(predictions).calibration_error
    for k in range(4):
        error = 0.0
        for i in range(15):
            inside = (probabilities[:, k] > i / 15) & (probabilities[:, k] <= (i + 1) / 15)
            if inside.any():
                gap = predictions.labels[inside, k].mean() - probabilities[inside, k].mean()
                error += inside.mean() * abs(gap)
        assert found[k] == pytest.approx(error)


def test_every_file_is_written_and_read_back(predictions, probabilities, tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (200, 12, 10, 3), np.uint8)
    source = ArraySource(images, predictions.labels, NAMES, name='made')
    summary = multi_label_report.write_report(tmp_path, predictions, source, title='test')
    assert json.loads((tmp_path / 'summary.json').read_text()) == summary

    def read(name):
        with open(tmp_path / name, encoding='utf-8', newline='') as file:
            return list(csv.DictReader(file))

    assert [row['class'] for row in read('classes.csv')] == ['cat', 'dog', 'f$x', 'owl \\udcff']
    rows = read('predictions.csv')
    for row, labels, p in zip(rows, predictions.labels, probabilities, strict=True):
        names = [name if name in NAMES[:3] else 'owl \\udcff' for name in NAMES]
        assert row['labels'] == '|'.join(np.array(names)[labels == 1])
        assert row['predicted'] == '|'.join(np.array(names)[p >= 0.5])
        loss = metrics.log_loss(labels, np.stack([1 - p, p], 1), labels=[0, 1])
        assert float(row['loss']) == pytest.approx(loss, rel=1e-5)
    bins = [row for row in read('calibration.csv') if row['class'] == 'cat']
    assert sum(int(row['images']) for row in bins) == 200
    for row in bins:
        p = probabilities[:, 0]
        inside = (p > float(row['from']) - 1e-4) & (p <= float(row['to']) + 1e-4)
        assert int(row['images']) == inside.sum()
        share = predictions.labels[inside, 0].mean()
        assert float(row['share_with_label']) == pytest.approx(share, abs=1e-5)
    for name in ('calibration.png', 'worst.png'):
        with Image.open(tmp_path / name) as image:
            assert len(image.convert('RGB').getcolors(1 << 24)) > 10
