"""curves.png: what happened in a run, at a glance."""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Okabe and Ito's colours, which stay apart for colour-blind readers.
_BLUE, _ORANGE, _GREEN, _PURPLE = '#0072B2', '#D55E00', '#009E73', '#CC79A7'
_GREY = '#666666'

_FEW_POINTS = 30  # up to here every point is marked, and nothing smoothed


class _Series(NamedTuple):
    metric: str
    label: str
    colour: str
    noisy: bool = False  # a mean over few examples: smoothed, with the raw values faint


class _Panel(NamedTuple):
    title: str
    series: tuple[_Series, ...]
    value: str  # the format of a value in a label
    percent: bool = False
    log: bool = False  # where the values span more than a decade


_PANELS = (
    _Panel(
        'Loss',
        (
            _Series('train/loss', 'train', _BLUE, noisy=True),
            _Series('test/loss', 'test', _ORANGE),
            _Series('test_ema/loss', 'test EMA', _GREEN),
        ),
        '{:.3f}',
        log=True,
    ),
    _Panel(
        'Top-1 accuracy',
        (
            _Series('train/top1', 'train', _BLUE, noisy=True),
            _Series('test/top1', 'test', _ORANGE),
            _Series('test_ema/top1', 'test EMA', _GREEN),
        ),
        '{:.1f}%',
        percent=True,
    ),
    _Panel('Learning rate', (_Series('train/learning_rate', '', _PURPLE),), '{:.3g}'),
    _Panel(
        'Units clipped',
        (_Series('train/clipped_fraction', 'mean', _BLUE, noisy=True),),
        '{:.1f}%',
        percent=True,
    ),
)


def draw_curves(
    metrics: Sequence[Mapping[str, float]], path: str | os.PathLike, *, title: str = ''
) -> None:
    """Draws loss, top-1, learning rate and clipped fraction over the steps of a run.

    Args:
        metrics: as from `writers.read_metrics`: each with `step` and some of the metrics;
            what is missing or not finite is left out.
        path: the PNG file, written whole or not at all.
        title: stands above the panels.
    """
    figure = Figure(figsize=(12, 7.5), dpi=120, layout='constrained')
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    if title:
        figure.suptitle(title, fontsize=15, fontweight='bold')
    all_axes = figure.subplots(2, 2, sharex=True).flat
    for axes, panel in zip(all_axes, _PANELS, strict=True):
        _draw_panel(axes, panel, metrics)
    for axes in figure.axes[2:]:
        axes.set_xlabel('step')
    path = pathlib.Path(path)
    beside = path.with_name(path.name + '.tmp')
    figure.savefig(beside, format='png')
    os.replace(beside, path)


def _draw_panel(axes: Axes, panel: _Panel, metrics: Sequence[Mapping[str, float]]) -> None:
    axes.set_title(panel.title, loc='left', fontsize=12)
    axes.spines[['top', 'right']].set_visible(False)
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
        axes.plot(steps, shown, color=series.colour, linewidth=1.8, marker='.' if few else '')
        values.append(raw)
        ends.append((shown[-1], f'{series.label} {panel.value.format(shown[-1])}', series.colour))
    if not ends:
        axes.text(0.5, 0.5, 'not recorded', transform=axes.transAxes, ha='center', color=_GREY)
        axes.set_yticks([])
        return
    _scale_values(axes, panel, np.concatenate(values))
    _label_ends(axes, ends)


def _points(
    metrics: Sequence[Mapping[str, float]], name: str, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps at which a metric was recorded as a finite number, and its values."""
    points = [
        (record['step'], scale * record[name])
        for record in metrics
        if name in record and math.isfinite(record[name])
    ]
    steps, values = np.array(points, float).reshape(-1, 2).T
    return steps, values


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Returns the mean over a window of a twentieth of the points, narrower towards the ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0], np.cumsum(values)])
    centres = np.arange(len(values))
    # As wide on either side, lest the curve be drawn towards the middle at its ends.
    reach = np.minimum(np.minimum(centres, centres[::-1]), half)
    return (sums[centres + reach + 1] - sums[centres - reach]) / (2 * reach + 1)


def _scale_values(axes: Axes, panel: _Panel, values: np.ndarray) -> None:
    if panel.log and values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale('log')
    elif panel.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}%'))
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -2), min(max(high, low + 1), 102))
    else:
        axes.set_ylim(bottom=min(0, values.min()))


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes each series' name and last value beside its end, moved apart where they would touch."""
    to_axes = axes.transData + axes.transAxes.inverted()
    left = axes.get_xlim()[0]
    heights = np.array([to_axes.transform((left, value))[1] for value, _, _ in ends])
    order = np.argsort(heights)
    apart = 0.075
    placed = heights[order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + apart)
    # Pushed up only, they would leave their lines behind: put each heap back around its middle.
    placed -= np.mean(placed - heights[order])
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + apart)
    for height, index in zip(placed, order, strict=True):
        _, text, colour = ends[index]
        axes.text(
            1.015, height, text.strip(), color=colour, transform=axes.transAxes, va='center',
            fontsize=10, fontweight='bold',
        )  # fmt: skip
