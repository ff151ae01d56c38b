"""How well scores rank the examples that have a label above those that do not, class by class.

A class is undefined, NaN, unless some examples have it and others do not.
"""

import numpy as np
import scipy.stats


def average_precision(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the average precision of each class, float64 [K].

    It is the mean, over the examples that have the label, of the precision among the examples that
    score at least as high. Without interpolation, as in scikit-learn.

    Args:
      scores: float [N, K], any monotonic function of the probabilities.
      labels: [N, K], 1 where an example has the label, else 0.
    """

    def of_class(scores, has_label):
        among_all = scipy.stats.rankdata(-scores, 'max')[has_label]
        return np.mean(scipy.stats.rankdata(-scores[has_label], 'max') / among_all)

    return _by_class(of_class, scores, labels)


def roc_auc(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the area under the ROC curve of each class, float64 [K]; ties count half.

    It is the probability that an example with the label scores higher than one without.

    Args:
      scores, labels: as in `average_precision`.
    """

    def of_class(scores, has_label):
        positives = has_label.sum()
        ranks = scipy.stats.rankdata(scores)[has_label].sum()
        above = ranks - positives * (positives + 1) / 2
        return above / (positives * (len(scores) - positives))

    return _by_class(of_class, scores, labels)


def _by_class(of_class, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.array(
        [
            of_class(one, has_label) if 0 < has_label.sum() < len(has_label) else np.nan
            for one, has_label in zip(scores.T, labels.T == 1, strict=True)
        ]
    )
