"""A report of a network's predictions on one split: by class, confusions, calibration, mistakes.

summary.json      accuracy, mean accuracy of the classes, macro F1, loss, calibration error
classes.csv       images, precision, recall and F1 of each class
confusion.csv     rows: labels, columns: predictions, entries: numbers of images
confusion.png     the same, each row divided by its sum
calibration.png   accuracy against confidence
predictions.csv   each image with its label and its most probable class
worst.png         the images whose label was given the least probability
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import haiku as hk
import numpy as np
from matplotlib.figure import Figure

from experiments.experiment import Experiment
from experiments.run import curves, multi_label_report, parallel
from experiments.run.predictions import LogitsFn, Predictions, make_predict_step, predict
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

_WRITTEN_CLASSES = 20  # up to here every entry of confusion.png has its number
_NAMED_CLASSES = 60  # up to here its rows and columns have the names of their classes


def calibration(predictions: Predictions) -> Calibration:
    """Returns the calibration of the most probable classes."""
    confidences = np.exp(predictions.log_probabilities.max(axis=1))
    return calibrate(confidences, predictions.is_correct)


def confusion_matrix(predictions: Predictions) -> np.ndarray:
    """Returns the numbers of examples, int64 [classes, classes]: row label, column prediction."""
    classes = predictions.logits.shape[1]
    pairs = predictions.labels * classes + predictions.predicted
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


class ClassScores(NamedTuple):
    """Scores of every class, [classes]; 0 where a class has no images or no predictions."""

    images: np.ndarray
    precision: np.ndarray
    recall: np.ndarray  # the accuracy on the images of the class
    f1: np.ndarray


def class_scores(confusion: np.ndarray) -> ClassScores:
    """Returns the scores that follow from a confusion matrix."""
    hits, images, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    return ClassScores(images, *precision_recall_f1(hits, images, predicted))


def summarize(predictions: Predictions) -> dict[str, float]:
    """Returns the figures of summary.json. Means over classes leave out those without images."""
    scores = class_scores(confusion_matrix(predictions))
    there = scores.images > 0
    return {
        'images': len(predictions.labels),
        'top1': float(predictions.is_correct.mean()),
        'mean_class_accuracy': float(scores.recall[there].mean()),
        'macro_f1': float(scores.f1[there].mean()),
        'loss': float(predictions.losses.mean()),
        'calibration_error': calibration(predictions).error,
    }


def report_split(
    experiment: Experiment,
    logits_fn: LogitsFn,
    variables: Mapping[str, tuple[hk.Params, hk.State]],
    split: str,
    directory: str | os.PathLike,
) -> None:
    """Predicts a split, in every process, and writes its report, in process 0.

    Args:
      experiment: the experiment with the data.
      logits_fn: see `make_predict_step`.
      variables: from `TrainState.variables`, placed by `parallel.replicate`; the last are used,
        those of the moving average if there is one.
      split: one of `experiment.splits`.
      directory: see `write_report`.
    """
    name, averaged = list(variables.items())[-1]
    found = predict(experiment, make_predict_step(logits_fn), {name: averaged}, split)[name]
    if parallel.is_primary():
        write = multi_label_report.write_report if found.multi_label else write_report
        title = f'{experiment.config.model.name}, {split}'
        pixels = experiment.image_spec.pixels
        write(directory, found, experiment.splits[split], title=title, pixels=pixels)


def write_report(
    directory: str | os.PathLike,
    predictions: Predictions,
    source: Source,
    *,
    title: str = '',
    pixels: PixelFormat = RGB,
) -> dict[str, float]:
    """Writes the report of one split into a directory; files of an earlier report are replaced.

    Args:
      directory: made where there is none.
      predictions: on the examples of `source`.
      source: gives names of classes and files, and the images of worst.png.
      title: of the figures.
      pixels: of the images.

    Returns:
      What summary.json holds.

    Raises:
      UsageError: a file cannot be written.
    """
    path = files.make_directory(directory)
    names, confusion, summary = (
        source.class_names,
        confusion_matrix(predictions),
        summarize(predictions),
    )
    scores = class_scores(confusion)
    write_csv(
        path / 'classes.csv',
        ('class', *scores._fields),
        zip(names, *(column.tolist() for column in scores), strict=True),
    )
    write_csv(
        path / 'confusion.csv',
        ('label', *names),
        ((name, *row) for name, row in zip(names, confusion.tolist(), strict=True)),
    )
    write_csv(
        path / 'predictions.csv',
        ('image', 'label', 'predicted', 'probability', 'probability_of_label'),
        _prediction_rows(predictions, source),
    )
    curves.write_figure(path / 'confusion.png', draw_confusion(confusion, names, title))
    curves.write_figure(path / 'calibration.png', draw_calibration(calibration(predictions), title))
    curves.write_figure(path / 'worst.png', draw_worst(predictions, source, title, pixels))
    files.atomic_write(path / 'summary.json', json.dumps(summary, indent=2) + '\n')
    return summary


def _prediction_rows(predictions: Predictions, source: Source) -> Iterable[tuple[Any, ...]]:
    rows = zip(
        predictions.indices,
        predictions.labels,
        predictions.predicted,
        predictions.log_probabilities,
        strict=True,
    )
    for index, label, predicted, log_probabilities in rows:
        yield (
            source.where(int(index)),
            source.class_names[label],
            source.class_names[predicted],
            f'{np.exp(log_probabilities[predicted]):.6g}',
            f'{np.exp(log_probabilities[label]):.6g}',
        )


def draw_confusion(confusion: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """Draws a confusion matrix, each row divided by its sum."""
    classes = len(confusion)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(0.42 * classes, 4.5, 14)) + 1.5
    figure = Figure(figsize=(side, side), dpi=120, layout='constrained')
    axes = figure.subplots()
    axes.imshow(shares, cmap='Blues', vmin=0, vmax=1, interpolation='nearest')
    axes.set_title(title, loc='left', fontsize=12)
    axes.set_xlabel('prediction')
    axes.set_ylabel('label')
    if classes <= _NAMED_CLASSES:
        short = [name if len(name) <= 18 else f'{name[:17]}…' for name in map(printable, names)]
        axes.set_xticks(range(classes), short, rotation=90, fontsize=8)
        axes.set_yticks(range(classes), short, fontsize=8)
    if classes <= _WRITTEN_CLASSES:
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                color = 'white' if shares[row, column] > 0.5 else 'black'
                axes.text(column, row, f'{count}', ha='center', va='center', color=color, size=8)
    return figure


def draw_worst(
    predictions: Predictions, source: Source, title: str, pixels: PixelFormat = RGB
) -> Figure:
    """Draws the images whose label was given the least probability, the worst first."""
    wrong = np.flatnonzero(~predictions.is_correct)
    worst = wrong[np.argsort(-predictions.losses[wrong], kind='stable')][:WORST]

    def caption(row: int) -> str:
        label, predicted = (
            printable(source.class_names[index])[:24]
            for index in (predictions.labels[row], predictions.predicted[row])
        )
        probability = np.exp(predictions.log_probabilities[row].max())
        return f'{label}\nnot {predicted} ({probability:.0%})'

    heading = 'the worst mistakes' if len(worst) else 'no mistakes'
    indices, captions = predictions.indices[worst], map(caption, worst)
    return draw_images(source, indices, captions, f'{title}  {heading}', pixels)
