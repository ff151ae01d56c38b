import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from experiments.run.ranking import average_precision, roc_auc


@pytest.mark.parametrize('decimals', [8, 1, 0], ids=['no_ties', 'ties', 'many_ties'])
def test_equal_scikit_learns(decimals):
    rng = np.random.default_rng(decimals)
    labels = (rng.uniform(size=(300, 6)) < [0.5, 0.2, 0.9, 0.01, 0.4, 0.1]).astype(np.uint8)
    scores = (rng.normal(size=labels.shape) + labels).round(decimals).astype(np.float32)
    for ours, theirs in (
        (average_precision, average_precision_score),
        (roc_auc, roc_auc_score),
    ):
        np.testing.assert_allclose(ours(scores, labels), theirs(labels, scores, average=None))


def test_a_class_that_all_or_no_examples_have_is_undefined():
    labels = np.array([[1, 0, 1], [1, 0, 0]])
    scores = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.2]])
    for metric in (average_precision, roc_auc):
        np.testing.assert_array_equal(metric(scores, labels), [np.nan, np.nan, 1])


def test_the_order_of_the_examples_changes_nothing():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (50, 3))
    scores = rng.integers(0, 9, (50, 3))
    order = rng.permutation(50)
    for metric in (average_precision, roc_auc):
        expected = metric(scores, labels)
        np.testing.assert_allclose(metric(scores[order], labels[order]), expected, rtol=1e-12)
