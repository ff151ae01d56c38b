"""How axes, metrics and samples are written.

Spaces within a figure are ones at which no line is broken.
"""

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from experiments.report.statistics import Sample


class Table(NamedTuple):
    """Text in rows; the first cell of each names it."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def axis_label(axis: str) -> str:
    return axis.replace('_', ' ')


def is_percent(metric: str) -> bool:
    """Whether a metric is a fraction that people speak of in percent."""
    return metric.rpartition('/')[2] in ('top1', 'top5', 'clipped_fraction')


def scale(metric: str) -> float:
    return 100.0 if is_percent(metric) else 1.0


def metric_label(metric: str) -> str:
    """'test_ema/top1' -> 'test EMA top-1, %', 'memory/step_mib' -> 'memory step, MiB'."""
    words = metric.replace('/', ' ').replace('_', ' ').replace(' ema ', ' EMA ')
    words = words.replace('top1', 'top-1').replace('top5', 'top-5')
    words = words.replace(' mib', ', MiB').replace(' gib', ', GiB')
    return words + (', %' if is_percent(metric) else '')


def number(value: float, metric: str) -> str:
    """A value in the metric's unit, without the unit: 0.9712 -> '97.12' where in percent."""
    if math.isnan(value):
        return '-'
    value *= scale(metric)
    return f'{value:.2f}' if is_percent(metric) else f'{value:,.4g}' if abs(value) < 1e4 else (
        f'{value:,.0f}'
    )  # fmt: skip


def mean_and_error(sample: Sample, metric: str) -> str:
    """'97.12 ± 0.21 (3)': mean, standard error, number of seeds, and what diverged."""
    notes = [str(len(sample.values))]
    space = '\N{NO-BREAK SPACE}'
    if lost := sample.diverged + sample.uncounted:
        notes.append(f'{lost} diverged')
    error = sample.standard_error
    spread = '' if math.isnan(error) else f' ± {number(error, metric)}'
    return f'{number(sample.mean, metric)}{spread} ({", ".join(notes)})'.replace(' ', space)


def in_lines(label: str, width: int = 16) -> list[str]:
    """Breaks a label that has little room, between words."""
    return textwrap.wrap(label, width, break_long_words=False) or ['']
