"""Draws curves.png: loss, accuracy, learning rate and clipping over the steps of a run."""

import io
import itertools
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from nfnets_jax import files

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY = '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#56B4E9'
_GREY = '#666666'

FIGURE_SUFFIXES = tuple(f'.{name}' for name in FigureCanvasBase.filetypes)
_FEW_POINTS = 30  # Up to this many points, each is marked and none is smoothed.


class _Series(NamedTuple):
    metric: str
    label: str
    colour: str
    noisy: bool = False  # a mean over few examples: smoothed, on faint raw values


class _Panel(NamedTuple):
    title: str
    series: tuple[_Series, ...]
    value: str  # format of a value in a label
    percent: bool = False
    log: bool = False  # logarithmic if the values span more than a decade


def _of_splits(metric: str) -> tuple[_Series, ...]:
    """Returns the series of a metric in training and on each split, raw and averaged."""
    return (
        _Series(f'train/{metric}', 'train', _BLUE, noisy=True),
        _Series(f'validation/{metric}', 'validation', _PURPLE),
        _Series(f'validation_ema/{metric}', 'validation EMA', _SKY),
        _Series(f'test/{metric}', 'test', _ORANGE),
        _Series(f'test_ema/{metric}', 'test EMA', _GREEN),
    )


_RANKING = (
    _Panel('Mean average precision', _of_splits('map'), '{:.1f}%', percent=True),
    _Panel('Area under the ROC curve', _of_splits('auc'), '{:.1f}%', percent=True),
)
_PANELS = (
    _Panel('Loss', _of_splits('loss'), '{:.3f}', log=True),
    _Panel('Top-1 accuracy', _of_splits('top1'), '{:.1f}%', percent=True),
    _Panel('Learning rate', (_Series('train/learning_rate', 'lr', _PURPLE),), '{:.3g}'),
    _Panel(
        'Clipped fraction',
        (_Series('train/clipped_fraction', 'clipped', _BLUE, noisy=True),),
        '{:.1f}%',
        percent=True,
    ),
)


class _Map(NamedTuple):
    title: str
    metric: str  # followed by '/' and a layer
    percent: bool = False


_MAPS = (
    _Map('Clipped fraction by layer', 'train/clipped_fraction', percent=True),
    _Map('Gradient norm / weight norm by layer', 'train/gradient_to_weight'),
)


def draw_curves(
    metrics: Sequence[Mapping[str, float]], path: str | os.PathLike, **words: str
) -> None:
    """Writes `curves` to a PNG file, whole or not at all."""
    write_figure(path, curves(metrics, **words))


def write_figure(path: str | os.PathLike, figure: Figure) -> None:
    """Writes a figure atomically, in the format of the suffix, one of FIGURE_SUFFIXES."""
    content = io.BytesIO()
    figure.savefig(content, format=pathlib.Path(path).suffix[1:])
    files.atomic_write(path, content.getvalue())


def curves(
    metrics: Sequence[Mapping[str, float]], *, title: str = '', best: str = '', note: str = ''
) -> Figure:
    """Draws loss, top-1, learning rate and clipped fraction over the steps of a run.

    Where images have several labels, average precision and area under the ROC curve too; with
    `log_by_layer`, clipped fraction and gradient norm over weight norm of each layer.

    Args:
        metrics: lines of `metric_writers.read_metrics`; missing and non-finite values are left out.
        title: title above the panels: network, data and run.
        best: the best evaluation, below the title.
        note: a sentence below the panels: what the training loss includes.
    """
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    several = any(name.endswith('/map') for record in metrics for name in record)
    panels = (*_PANELS[:2], *(_RANKING if several else ()), *_PANELS[2:])
    maps = [panel for panel in _MAPS if _layers(metrics, panel.metric)]
    rows = (len(panels) + len(maps) + 1) // 2
    figure = Figure(figsize=(12, 3.75 * rows), dpi=120, layout=layout)
    if title or best:
        figure.suptitle('\n'.join(filter(None, (title, best))), fontsize=13)
    if note:
        figure.supxlabel(note, fontsize=9, color=_GREY)
    all_axes = figure.subplots(rows, 2, sharex=True)
    for axes, panel in itertools.zip_longest(all_axes.flat, (*panels, *maps)):
        if isinstance(panel, _Map):
            _draw_map(axes, panel, metrics)
        elif panel:
            _draw_panel(axes, panel, metrics)
        else:
            axes.set_axis_off()
    for axes in all_axes[-1]:
        axes.set_xlabel('step')
    return figure


def _draw_panel(axes: Axes, panel: _Panel, metrics: Sequence[Mapping[str, float]]) -> None:
    axes.set_title(panel.title, loc='left', fontsize=12)
    axes.spines[['top', 'right']].set_visible(False)
    axes.margins(x=0.02)
    axes.grid(axis='y', color='#dddddd', linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f'{step:,.0f}'))
    scale = 100 if panel.percent else 1
    ends, values = [], []
    for series in panel.series:
        steps, raw = _points(metrics, series.metric, scale)
        if not len(steps):
            continue
        few = len(steps) <= _FEW_POINTS
        shown = _smoothed(raw) if series.noisy and not few else raw
        if shown is not raw:
            axes.plot(steps, raw, color=series.colour, alpha=0.2, linewidth=0.8)
            smoothed = f'{series.label}: moving average of the faint line'
            axes.set_title(smoothed, loc='right', fontsize=9, color=_GREY)
        axes.plot(steps, shown, color=series.colour, linewidth=1.8, marker='.' if few else '')
        values.append(raw)
        ends.append((shown[-1], f'{series.label} {panel.value.format(shown[-1])}', series.colour))
    if not ends:
        axes.text(0.5, 0.5, 'not recorded', transform=axes.transAxes, ha='center', color=_GREY)
        axes.set_yticks([])
        return
    _scale_values(axes, panel, np.concatenate(values))
    _label_ends(axes, ends)


def _layers(metrics: Sequence[Mapping[str, float]], metric: str) -> list[str]:
    """Returns the layers that a metric was recorded of, numbered ones in order."""
    found = {name for record in metrics for name in record if name.startswith(f'{metric}/')}
    layers = (name.removeprefix(f'{metric}/') for name in found)
    return sorted(
        layers, key=lambda x: [int(y) if y.isdigit() else y for y in re.split(r'(\d+)', x)]
    )


def _draw_map(axes: Axes, panel: _Map, metrics: Sequence[Mapping[str, float]]) -> None:
    """Draws a row of colors for each layer over the steps."""
    axes.set_title(panel.title, loc='left', fontsize=12)
    layers = _layers(metrics, panel.metric)
    records = [record for record in metrics if f'{panel.metric}/{layers[0]}' in record]
    steps = [record['step'] for record in records]
    names = [f'{panel.metric}/{layer}' for layer in layers]
    values = np.array([[record.get(name) for record in records] for name in names], float)
    scale = {'vmin': 0, 'vmax': 1} if panel.percent else {'norm': LogNorm()}
    if not panel.percent:
        values = np.where(values > 0, values, np.nan)
    edges = [0, *steps]
    mesh = axes.pcolormesh(edges, np.arange(len(layers) + 1), values, cmap='viridis', **scale)
    beside = axes.inset_axes((1.02, 0, 0.04, 1))  # where the other panels have their labels
    axes.figure.colorbar(mesh, cax=beside, format=PercentFormatter(1) if panel.percent else None)
    axes.set_yticks(np.arange(len(layers)) + 0.5, layers, fontsize=8)
    axes.invert_yaxis()


def _points(
    metrics: Sequence[Mapping[str, float]], name: str, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps at which a metric was recorded and is finite, and its values."""
    points = [
        (record['step'], scale * record[name])
        for record in metrics
        if name in record and math.isfinite(record[name])
    ]
    steps, values = np.array(points, float).reshape(-1, 2).T
    return steps, values


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Returns the mean over a moving window of about a twentieth of the points."""
    half = max(1, len(values) // 40)
    centres = np.arange(len(values))
    # Symmetric at the start, where curves are steep. At the end only backwards, so that the last
    # value, which the label shows, is a mean as well.
    back = np.minimum(centres, half)
    ahead = np.minimum(back, centres[::-1])
    sums = np.concatenate([[0], np.cumsum(values)])
    return (sums[centres + ahead + 1] - sums[centres - back]) / (ahead + back + 1)


def _scale_values(axes: Axes, panel: _Panel, values: np.ndarray) -> None:
    if panel.log and values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale('log')
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
        axes.yaxis.set_minor_locator(NullLocator())
    elif panel.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}%'))
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -2), min(high, 102))
    else:
        low, high = min(0, values.min()), values.max()
        axes.set_ylim(low, high + 0.05 * ((high - low) or 1))


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes name and last value beside the end of each line, without overlap."""
    to_axes = axes.transData + axes.transAxes.inverted()
    left = axes.get_xlim()[0]
    heights = np.array([to_axes.transform((left, value))[1] for value, _, _ in ends])
    order = np.argsort(heights)
    apart = 0.075
    placed = heights[order]
    for _ in range(100):
        for i in range(1, len(placed)):
            overlap = max(0, apart - (placed[i] - placed[i - 1]))
            placed[i - 1 : i + 1] += (-overlap / 2, overlap / 2)
    for height, index in zip(placed, order, strict=True):
        _, text, colour = ends[index]
        axes.text(
            1.015, height, text, color=colour, transform=axes.transAxes, va='center',
            fontsize=10, fontweight='bold',
        )  # fmt: skip
