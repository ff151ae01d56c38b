"""Parts of reports: tables, calibration, and images with a line about each."""

import csv
import io
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from nfnets_jax import files
from nfnets_jax.data.preprocessing import decode
from nfnets_jax.data.sources import Source
from nfnets_jax.pixel_format import RGB, PixelFormat

_BLUE, _GREY = '#0072B2', '#666666'
_THUMBNAIL = 160  # pixels
WORST = 24  # images in worst.png


class Calibration(NamedTuple):
    """How often what has a probability is so: accuracy against confidence.

    Attributes:
      counts: predictions in each bin, int64 [bins]; the bins divide [0, 1] evenly.
      confidences: mean confidence in each bin, float64 [bins], NaN in empty ones.
      accuracies: share of right predictions in each bin, likewise.
    """

    counts: np.ndarray
    confidences: np.ndarray
    accuracies: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error (Guo et al., arXiv 1706.04599, equation 3)."""
        gaps = np.abs(self.accuracies - self.confidences)
        return float(np.nansum(self.counts * gaps) / self.counts.sum())


def calibrate(probabilities: np.ndarray, outcomes: np.ndarray, num_bins: int = 15) -> Calibration:
    """Returns the calibration of predictions, in bins (i / num_bins, (i + 1) / num_bins].

    Args:
      probabilities: float [N].
      outcomes: [N], 1 or True where what was predicted is so.
      num_bins: the number of bins.
    """
    bins = np.clip(np.ceil(probabilities * num_bins).astype(int) - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid='ignore'):
        return Calibration(
            counts,
            np.bincount(bins, probabilities, num_bins) / counts,
            np.bincount(bins, outcomes, num_bins) / counts,
        )


def precision_recall_f1(
    hits: np.ndarray, images: np.ndarray, predicted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns three scores of each class, 0 where it has no predictions, no images or neither.

    Args:
      hits: [classes], images of the class that are predicted to be of it.
      images: [classes], images of the class.
      predicted: [classes], images that are predicted to be of the class.
    """
    return (
        hits / np.maximum(predicted, 1),
        hits / np.maximum(images, 1),
        2 * hits / np.maximum(images + predicted, 1),
    )


def write_csv(path: pathlib.Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(header)
    writer.writerows(rows)
    files.atomic_write(path, text.getvalue())


def draw_calibration(found: Calibration, title: str) -> Figure:
    """Draws accuracy against confidence, and how many examples each bin has."""
    figure = Figure(figsize=(5.5, 6.5), dpi=120, layout='constrained')
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    left = np.arange(len(found.counts)) / len(found.counts)
    width = 1 / len(found.counts)
    upper.set_title(f'{title}  calibration error {found.error:.1%}', loc='left', fontsize=12)
    upper.plot((0, 1), (0, 1), color=_GREY, linestyle='--', linewidth=1, label='calibrated')
    upper.plot(found.confidences, found.accuracies, color=_BLUE, marker='o', label='observed')
    upper.set(ylabel='accuracy', ylim=(0, 1.02))
    upper.legend(frameon=False)
    lower.bar(left, found.counts, width, align='edge', color=_BLUE, edgecolor='white')
    lower.set(xlabel='confidence', ylabel='images', xlim=(0, 1))
    for axes in (upper, lower):
        axes.spines[['top', 'right']].set_visible(False)
    return figure


def draw_images(
    source: Source,
    indices: Iterable[int],
    captions: Iterable[str],
    title: str,
    pixels: PixelFormat = RGB,
) -> Figure:
    """Draws examples of a source in a grid, each below its caption.

    Of images with other channels than gray or RGB it draws the first three, or the first.
    """
    indices, columns = list(indices), 6
    lines = max(1, -(-len(indices) // columns))
    figure = Figure(figsize=(2.1 * columns, 2.6 * lines + 0.4), dpi=100, layout='constrained')
    figure.suptitle(title.strip(), fontsize=12)
    grid = figure.subplots(lines, columns).ravel()
    for axes in grid:
        axes.axis('off')
    for axes, index, caption in zip(grid, indices, captions, strict=False):
        bands = decode(source[int(index)]['image'], pixels)
        shown = bands[..., :3] if pixels.channels >= 3 else np.repeat(bands[..., :1], 3, axis=-1)
        image = Image.fromarray(shown)
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        axes.imshow(np.asarray(image))
        axes.set_title(caption, fontsize=8)
    return figure


def printable(name: str) -> str:
    """Returns a name that matplotlib can draw: no formulas, no undecodable bytes."""
    return name.encode(errors='backslashreplace').decode().replace('$', r'\$')
