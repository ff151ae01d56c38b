"""Writes the report as PNG images and Markdown, for a repository."""

import io
import itertools
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from experiments.report import charts, interactive, results, summaries, tables
from experiments.report.reading import Study
from experiments.report.wording import Table, in_lines
from nfnets_jax import files
from nfnets_jax.errors import UsageError

_COLORS = [interactive.palette('light')[f'c{i}'] for i in range(charts.NUM_COLORS)]
_DASHES = ('-', '--', ':', '-.')


def write(studies: Sequence[Study], directory: str | os.PathLike, *, made: str) -> list[str]:
    """Writes README.md, the page of each study, its images and tables; returns their names.

    The README is a screen: question, answers, and a link to the page. It is written last, so it
    never links to a missing file. The directory is created.
    """
    path = pathlib.Path(directory)
    slugs = list(map(slug, studies))
    try:
        path.mkdir(parents=True, exist_ok=True)
        written: list[str] = []
        for study, own in zip(studies, slugs, strict=True):
            figures, number = [], itertools.count(1)
            for spec in study.charts:
                shown = charts.build(study, spec)
                figures += [] if shown else [f'{escape(summaries.missing(spec))}\n']
                for chart in shown:
                    figures.append(f'### {escape(chart.title)}\n')
                    if isinstance(chart, charts.XY) and chart.kind == 'table':
                        figures.append(_markdown(chart.table()))
                        continue
                    name = f'{own}-{next(number)}-{_slug(chart.title)}.png'
                    _write_image(path / name, draw(chart))
                    written.append(name)
                    figures.append(f'![{escape(chart.alt_text())}]({name})\n')
            written += tables.write(study, path, f'{own}-')
            text = '\n'.join([_section(study, figures, own), _method(), f'{escape(made)}\n'])
            files.atomic_write(path / f'{own}.md', text)
            written.append(f'{own}.md')
        files.atomic_write(path / 'README.md', _overview(studies, slugs, made))
    except OSError as error:
        raise UsageError(f'--static={directory} cannot be written: {error.strerror}') from error
    return [*written, 'README.md']


def slug(study: Study) -> str:
    """Returns what the names of a study's files begin with: 'agc-nf-digits'."""
    return _slug(f'{study.name}-{study.size}')


def check_slugs(studies: Sequence[Study]) -> None:
    """Raises a UsageError if the files of two studies would have the same names."""
    slugs = list(map(slug, studies))
    if repeated := {name for name in slugs if slugs.count(name) > 1}:
        raise UsageError(
            f'--workdir: two of the studies would both be written as {min(repeated)}-*: make a '
            'report of each, in different directories'
        )


def _slug(text: str) -> str:
    return re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')[:60]


def _write_image(path: pathlib.Path, figure: Figure) -> None:
    buffer = io.BytesIO()
    # Leave out the software's version, so that the same figure gives the same file.
    figure.savefig(buffer, format='png', dpi=120, metadata={'Software': None})
    files.atomic_write(path, buffer.getvalue())


def _overview(studies: Sequence[Study], slugs: Sequence[str], made: str) -> str:
    """Returns the README: for each study its question, and for each claim answer and confidence."""
    rows = [
        [f'[{escape(study.title)}]({own}.md)', *map(escape, cells)]
        for study, own in zip(studies, slugs, strict=True)
        for cells in summaries.answers(study)
    ]
    header = ['question', 'claim', 'answer', 'difference', 'confidence']
    table = '\n'.join('| ' + ' | '.join(row) + ' |' for row in [header, ['---'] * 5, *rows])
    intro = 'A row for each claim. How results are judged stands at the end of each page.'
    return f'# Results\n\n{intro}\n\n{table}\n\n{escape(made)}\n'


def _section(study: Study, figures: Sequence[str], own: str) -> str:
    tunings = results.tunings(study)
    lines = [f'# {escape(study.title)}', '', f'*{escape(study.question)}*', '']
    lines += [escape(study.setting), '', summaries.progress(study), '']
    if study.claims:
        header = ['claim', 'source', 'outcome', 'evidence']
        judged = results.judge(study)
        rows = [
            [j.claim.text, j.claim.source, summaries.verdict(j), summaries.outcome(study, j)]
            for j in judged
        ]
        lines += ['## Claims and outcomes', '', _markdown(Table(header, rows))]
    if tunings:
        lines += ['## Results', '', _markdown(summaries.results_table(study, tunings))]
        lines += [summaries.EDGES, ''] if summaries.has_edges(tunings) else []
    lines += ['## Figures', '', *figures] if figures else []
    if any(trial.state != 'complete' for trial in study.trials):
        table = summaries.trials_table(study, only_unsuccessful=True)
        lines += ['## Trials that did not complete', '', _markdown(table)]
    commands = '\n'.join(study.commands).replace('```', "'''")
    lines += ['## How it was made', '', f'```\n{commands}\n```', '']
    lines += [f'- {name}: {escape(fact)}' for name, fact in summaries.provenance(study).items()]
    lines += [f'- [every trial]({own}-{tables.TRIALS_FILE})']
    return '\n'.join([*lines, ''])


def _method() -> str:
    return '\n'.join(['## How results are judged', '', *(f'{p}\n' for p in summaries.METHOD)])


def escape(text: str) -> str:
    """Escapes a text for Markdown, in one line."""
    return re.sub(r'([\\`*_\[\]<>|#])', r'\\\1', ' '.join(text.split()))


def _markdown(table: Table) -> str:
    rows = [table.header, ['---'] * len(table.header), *table.rows]
    cells = [[c if row is rows[1] else escape(c) for c in row] for row in rows]
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in cells) + '\n'


def draw(chart: charts.Chart) -> Figure:
    """Draws a chart on a white background."""
    figure = Figure(figsize=(8, 4.5), layout='constrained')
    axes = figure.subplots()
    axes.set_title(chart.title, loc='left', fontsize=12, parse_math=False)
    if isinstance(chart, charts.Heatmap):
        _heatmap(axes, chart)
    elif isinstance(chart, charts.Parallel):
        _parallel(axes, chart)
    else:
        (_bars if chart.kind == 'bars' else _lines)(axes, chart)
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(axis='y', color='#dddddd', linewidth=0.8)
        axes.set_axisbelow(True)
    if handles := axes.get_legend_handles_labels()[0]:
        for columns in range(min(3, len(handles)), 0, -1):
            below: dict[str, Any] = {
                'loc': 'outside lower center',
                'ncols': columns,
                'frameon': False,
            }
            legend = figure.legend(handles=handles, **below)
            if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
                break
            legend.remove()
    return figure


def _lines(axes: Axes, chart: charts.XY) -> None:
    for series in chart.series:
        color = _COLORS[series.color % len(_COLORS)]
        xs = chart.positions(series)
        means = np.array([mark.mean for mark in series.marks])
        errors = np.array([mark.error for mark in series.marks])
        dash = _DASHES[series.dash % len(_DASHES)]
        look: dict[str, Any] = {
            'color': color,
            'linestyle': dash,
            'marker': '.',
            'label': series.name or None,
        }
        if chart.kind == 'curves':
            axes.plot(xs, means, **look)
            axes.fill_between(xs, means - errors, means + errors, color=color, alpha=0.2, lw=0)
        else:
            axes.errorbar(xs, means, errors, capsize=3, **look)
        lost = [(x, m.mean) for x, m in zip(xs, series.marks, strict=True) if m.diverged]
        for x, y in lost + [(x, y) for x, y, _ in series.ends]:
            axes.plot(x, y, marker='X', markersize=9, color=color, markeredgecolor='black')
    if chart.log_x:
        axes.set_xscale('log')
        if chart.kind == 'line':
            values = chart.numbers()
            axes.set_xticks(values, [f'{value:g}' for value in values])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_minor_formatter(NullFormatter())
    if chart.log_y:
        axes.set_yscale('log')
    if chart.x_ticks is not None:
        _categories(axes, chart.x_ticks)


def _categories(axes: Axes, labels: Sequence[str]) -> None:
    width = min(16, 80 // len(labels))  # A figure is about 80 letters wide.
    axes.set_xticks(range(len(labels)), ['\n'.join(in_lines(label, width)) for label in labels])
    axes.set_xlim(-0.5, len(labels) - 0.5)  # Show every category, also without data.


def _bars(axes: Axes, chart: charts.XY) -> None:
    own_colors = all(len(series.marks) == 1 for series in chart.series)
    width = 0.8 / (1 if own_colors else max(1, len(chart.series)))
    for i, series in enumerate(chart.series):
        shift = 0 if own_colors else (i - (len(chart.series) - 1) / 2) * width
        axes.bar(
            np.array(chart.positions(series)) + shift,
            [mark.mean for mark in series.marks],
            width,
            yerr=[mark.error for mark in series.marks],
            color=_COLORS[series.color % len(_COLORS)],
            hatch=('', '//', '..', 'xx')[series.dash % 4],
            capsize=3,
            label=None if own_colors else series.name or None,
        )
    _categories(axes, chart.x_ticks or ())


def _heatmap(axes: Axes, chart: charts.Heatmap) -> None:
    means = np.array(chart.means, float)
    colors = LinearSegmentedColormap.from_list('heat', interactive.HEAT)
    bounds: dict[str, Any] = {'vmin': chart.low, 'vmax': chart.high}
    image = axes.imshow(means, cmap=colors, aspect='auto', origin='lower', **bounds)
    axes.figure.colorbar(image, label=chart.value_label)
    axes.set_xticks(range(len(chart.columns)), chart.columns)
    axes.set_yticks(range(len(chart.rows)), chart.rows)
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
    for (row, column), mean in np.ndenumerate(means):
        text = interactive.cell_lines(chart.texts[row][column])
        color = 'white' if interactive.is_dark(chart.shade(mean)) else 'black'
        axes.text(column, row, text, ha='center', va='center', color=color, fontsize=9)


def _parallel(axes: Axes, chart: charts.Parallel) -> None:
    named: set[int] = set()
    for thread in chart.threads:
        label = chart.names[thread.series] if thread.series not in named else None
        named.add(thread.series)
        color = _COLORS[chart.colors[thread.series] % len(_COLORS)]
        axes.plot(thread.heights, color=color, alpha=0.5, linewidth=1, label=label)
    for i, (_, ticks) in enumerate(chart.dimensions):
        axes.axvline(i, color='black', linewidth=0.8)
        for height, text in ticks:
            box = {'facecolor': 'white', 'edgecolor': 'none', 'alpha': 0.8, 'pad': 1}
            text = '\n'.join(in_lines(text))
            axes.text(i + 0.03, height, text, fontsize=8, va='center', bbox=box, parse_math=False)
    axes.set_xticks(range(len(chart.dimensions)), [label for label, _ in chart.dimensions])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
