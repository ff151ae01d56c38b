"""A report of the predictions on one split where an image may have several labels.

summary.json      mean average precision, AUC, top-1, loss, macro F1, calibration error
classes.csv       images, average precision, AUC, precision, recall, F1, calibration of each class
calibration.csv   for each class: how many images have it, by the probability it was given
calibration.png   the same, over all classes
predictions.csv   each image with its labels, the classes of at least 50 % and its loss
worst.png         the images with the largest loss

Precision, recall and F1 are of the classes with a probability of at least 50 %.
"""

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.run import curves
from experiments.run.evaluation import multi_label_metrics
from experiments.run.predictions import Predictions
from experiments.run.report_parts import (
    WORST,
    Calibration,
    calibrate,
    draw_calibration,
    draw_images,
    precision_recall_f1,
    printable,
    write_csv,
)
from nfnets_jax import files
from nfnets_jax.data.sources import Source
from nfnets_jax.pixel_format import RGB, PixelFormat

_THRESHOLD = 0.5  # probability from which a class counts as predicted


class ClassScores(NamedTuple):
    """Scores of every class, [classes]; average precision and AUC are NaN where undefined."""

    images: np.ndarray
    average_precision: np.ndarray
    auc: np.ndarray
    precision: np.ndarray  # 0 where nothing is predicted
    recall: np.ndarray  # 0 where no image has the class
    f1: np.ndarray
    calibration_error: np.ndarray


def class_scores(predictions: Predictions) -> ClassScores:
    """Returns the scores of every class."""
    labels, predicted = predictions.labels == 1, _predicted(predictions)
    images, hits = labels.sum(axis=0), (labels & predicted).sum(axis=0)
    return ClassScores(
        images,
        predictions.average_precision,
        predictions.roc_auc,
        *precision_recall_f1(hits, images, predicted.sum(axis=0)),
        np.array([each.error for each in calibrations(predictions)]),
    )


def calibrations(predictions: Predictions) -> list[Calibration]:
    """Returns the calibration of every class: its probability against having it."""
    probabilities = np.exp(predictions.log_probabilities)
    return [calibrate(*pair) for pair in zip(probabilities.T, predictions.labels.T, strict=True)]


def summarize(predictions: Predictions) -> dict[str, float]:
    """Returns the figures of summary.json. Means over classes leave out those without images."""
    scores = class_scores(predictions)
    return {
        'images': len(predictions.labels),
        **multi_label_metrics(predictions),
        'macro_f1': float(scores.f1[scores.images > 0].mean()),
        'calibration_error': float(scores.calibration_error.mean()),
    }


def write_report(
    directory: str | os.PathLike,
    predictions: Predictions,
    source: Source,
    *,
    title: str = '',
    pixels: PixelFormat = RGB,
) -> dict[str, float]:
    """Writes the report of one split, as `evaluation_report.write_report` does for one label."""
    path = files.make_directory(directory)
    names, scores, summary = source.class_names, class_scores(predictions), summarize(predictions)
    write_csv(
        path / 'classes.csv',
        ('class', *scores._fields),
        zip(names, *(column.tolist() for column in scores), strict=True),
    )
    write_csv(
        path / 'calibration.csv',
        ('class', 'from', 'to', 'images', 'mean_probability', 'share_with_label'),
        _calibration_rows(names, calibrations(predictions)),
    )
    write_csv(
        path / 'predictions.csv',
        ('image', 'labels', 'predicted', 'loss'),
        _prediction_rows(predictions, source),
    )
    every = calibrate(np.exp(predictions.log_probabilities).ravel(), predictions.labels.ravel())
    curves.write_figure(path / 'calibration.png', draw_calibration(every, title))
    worst = np.argsort(-predictions.losses, kind='stable')[:WORST].tolist()
    captions = (_caption(predictions, names, row) for row in worst)
    heading = f'{title}  the largest losses'
    figure = draw_images(source, predictions.indices[worst], captions, heading, pixels)
    curves.write_figure(path / 'worst.png', figure)
    files.atomic_write(path / 'summary.json', json.dumps(summary, indent=2) + '\n')
    return summary


def _predicted(predictions: Predictions) -> np.ndarray:
    return np.exp(predictions.log_probabilities) >= _THRESHOLD


def _calibration_rows(
    names: Sequence[str], found: Sequence[Calibration]
) -> Iterator[tuple[Any, ...]]:
    for name, each in zip(names, found, strict=True):
        bins = len(each.counts)
        for i in np.flatnonzero(each.counts):
            probability, share = each.confidences[i], each.accuracies[i]
            ends = f'{i / bins:.4g}', f'{(i + 1) / bins:.4g}'
            yield name, *ends, each.counts[i], f'{probability:.6g}', f'{share:.6g}'


def _prediction_rows(predictions: Predictions, source: Source) -> Iterator[tuple[Any, ...]]:
    columns = predictions.indices, predictions.labels, _predicted(predictions), predictions.losses
    for index, labels, predicted, loss in zip(*columns, strict=True):
        named = ('|'.join(_named(source.class_names, each)) for each in (labels, predicted))
        yield source.where(int(index)), *named, f'{loss:.6g}'


def _caption(predictions: Predictions, names: Sequence[str], row: int) -> str:
    """Returns the labels of an image that are not predicted, and the classes that are wrongly."""
    labels, predicted = predictions.labels[row] == 1, _predicted(predictions)[row]
    parts = (('missed', labels & ~predicted), ('wrongly', predicted & ~labels))
    return '\n'.join(
        f'{word} {printable(", ".join(_named(names, those)))}'[:28]
        for word, those in parts
        if those.any()
    )


def _named(names: Sequence[str], those: np.ndarray) -> list[str]:
    return [names[i] for i in np.flatnonzero(those).tolist()]
