"""Formats axes, metrics and samples as text, with no-break spaces inside a number."""

import math
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from experiments.report.statistics import Sample


class Table(NamedTuple):
    """Rows of text; the first cell of a row is its header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def axis_label(axis: str) -> str:
    return axis.replace('_', ' ')


def is_percent(metric: str) -> bool:
    """Returns whether a metric is a fraction that is shown in percent."""
    return metric.rpartition('/')[2] in ('top1', 'top5', 'map', 'auc', 'clipped_fraction')


def is_exact(metric: str) -> bool:
    """Returns whether a metric is the same in every run, so that seeds say nothing about it."""
    return metric.startswith('memory/') or metric == 'parameters'


def scale(metric: str) -> float:
    return 100.0 if is_percent(metric) else 1.0


def metric_label(metric: str) -> str:
    """Returns 'test EMA top-1, %' for 'test_ema/top1', 'memory step, MiB' for 'memory/step_mib'."""
    words = metric.replace('/', ' ').replace('_', ' ').replace(' ema ', ' EMA ')
    words = words.replace('top1', 'top-1').replace('top5', 'top-5')
    words = words.replace(' mib', ', MiB').replace(' gib', ', GiB')
    return words + (', %' if is_percent(metric) else '')


def number(value: float, metric: str) -> str:
    """Returns a value in the metric's unit, without the unit: '97.12' for a top-1 of 0.9712."""
    if math.isnan(value):
        return '-'
    if is_percent(metric):
        return f'{value * scale(metric):.2f}'
    return f'{value:,.4g}' if abs(value) < 1e4 else f'{value:,.0f}'


def mean_and_error(sample: Sample, metric: str) -> str:
    """Returns '97.12 ± 0.21 (3)': mean, standard error, number of seeds, and '1 diverged'."""
    if is_exact(metric):
        return number(sample.mean, metric)
    notes = [str(len(sample.values))]
    space = '\N{NO-BREAK SPACE}'
    if lost := sample.diverged + sample.uncounted:
        notes.append(f'{lost} diverged')
    error = sample.standard_error
    spread = '' if math.isnan(error) else f' ± {number(error, metric)}'
    return f'{number(sample.mean, metric)}{spread} ({", ".join(notes)})'.replace(' ', space)


def in_lines(label: str, width: int = 16) -> list[str]:
    """Breaks a label into lines of `width` characters, between words."""
    return textwrap.wrap(label, width, break_long_words=False) or ['']
