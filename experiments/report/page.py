"""Renders the report as one self-contained HTML page: no network, no other file."""

import functools
import html
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from plotly.offline import get_plotlyjs

from experiments.report import charts, interactive, results, summaries
from experiments.report.reading import Study
from experiments.report.statistics import Verdict
from experiments.report.wording import Table

_HERE = pathlib.Path(__file__).parent

_FEW = 8  # longest table, in rows, that is not folded
_LONG = 40  # longest cell, in characters, that is not wrapped as text

# Fetch nothing, whatever a study's texts hold; Plotly makes images from data: and blob:.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)


def render(studies: Sequence[Study], *, command: str, made: str) -> str:
    """Returns the page.

    Args:
      studies: shown in this order.
      command: the command line that makes this page.
      made: time and versions.
    """
    judgements = [results.judge(study) for study in studies]
    title = 'Normalizer-Free networks: claimed, and found'
    places = [f's{i}' for i in range(1, len(studies) + 1)]
    verdicts = [[j.comparison.verdict for j in js] for js in judgements]
    body = [
        _overview(studies, places, verdicts),
        *map(_study, studies, places, judgements),
        '<section aria-labelledby="method"><h2 id="method">How results are judged</h2>',
        *(f'<p>{_e(paragraph)}</p>' for paragraph in summaries.METHOD),
        f'</section><footer class="muted"><p>This page was made by</p><pre>{_e(command)}</pre>'
        f'<p>{_e(made)}</p></footer>',
    ]
    palettes = {theme: interactive.palette(theme) for theme in ('light', 'dark')}
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_e(title)}</title>
<link rel="icon" href="data:,">
<style>
{_colors(palettes)}
{_asset('page.css')}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<header><h1>{_e(title)}</h1></header>
<noscript><p class="notice">The figures need JavaScript; the tables under them say the same.</p>
</noscript>
<main id="main">
{''.join(body)}
</main>
<script id="palettes" type="application/json">{_json(palettes)}</script>
<script>{get_plotlyjs()}</script>
<script>
{_asset('page.js')}</script>
</body>
</html>
"""


_e = html.escape


def _json(value: Any) -> str:
    """Returns JSON that cannot end the script element around it."""
    return json.dumps(value, allow_nan=False).replace('<', '\\u003c')


@functools.cache
def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding='utf-8')


def _colors(palettes: dict[str, dict[str, str]]) -> str:
    def variables(theme: str) -> str:
        return ' '.join(f'--{name}: {color};' for name, color in palettes[theme].items())

    return (
        f':root {{ {variables("light")} }}\n'
        f'@media screen and (prefers-color-scheme: dark) {{ :root {{ {variables("dark")} }} }}'
    )


def _overview(
    studies: Sequence[Study], places: Sequence[str], verdicts: Sequence[Sequence[Verdict]]
) -> str:
    """Returns a table of contents with counts of the verdicts; '' for a single study."""
    if len(studies) == 1:
        return ''
    header = ['study', 'trials', *(f'{summaries.SYMBOLS[v]} {v.value}' for v in Verdict)]
    rows = ''.join(
        f'<tr><th scope="row"><a href="#{place}">{_e(study.title)}</a></th>'
        f'<td>{sum(t.state in ("complete", "diverged") for t in study.trials)} of '
        f'{len(study.trials)}</td>'
        + ''.join(f'<td>{found.count(verdict) or ""}</td>' for verdict in Verdict)
        + '</tr>'
        for study, place, found in zip(studies, places, verdicts, strict=True)
    )
    head = ''.join(f'<th scope="col">{_e(name)}</th>' for name in header)
    content = (
        '<table><caption>Claims by outcome</caption>'
        f'<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    )
    return f'<nav aria-label="Studies">{_scrolling(content, "Overview")}</nav>'


def _study(study: Study, place: str, judgements: Sequence[results.Judgement]) -> str:
    tunings = results.tunings(study)
    parts = [
        f'<section class="study" aria-labelledby="{place}"><h2 id="{place}">{_e(study.title)}</h2>',
        f'<p class="question">{_e(study.question)}</p><p>{_e(study.setting)}</p>',
        f'<p class="{"muted" if summaries.is_complete(study) else "notice"}">'
        f'{_e(_progress(study))}</p>',
    ]
    if judgements:
        parts.append('<h3>Claims and outcomes</h3><ul class="claims">')
        parts += [_claim(study, judgement) for judgement in judgements]
        parts.append('</ul>')
    if study.charts:
        parts.append('<h3>Figures</h3>')
    for i, spec in enumerate(study.charts, start=1):
        shown = charts.build(study, spec)
        parts += [_figure(chart, f'{place}-{i}-{j}') for j, chart in enumerate(shown, start=1)]
        if not shown:
            parts.append(f'<p class="muted">{_e(summaries.missing(spec))}</p>')
    if tunings:
        caption = 'Mean ± standard error (seeds), at the tuned values'
        parts += ['<h3>Results</h3>', _table(summaries.results_table(study, tunings), caption)]
        if summaries.has_edges(tunings):
            parts.append(f'<p class="notice">{_e(summaries.EDGES)}</p>')
        grid = _table(summaries.grid_table(study, tunings), 'The whole grid')
        parts.append(_details('The whole grid, before tuning', grid))
    if any(trial.state != 'complete' for trial in study.trials):
        table = summaries.trials_table(study, only_unsuccessful=True)
        lost = _table(table, 'States and errors')
        if len(table.rows) <= _FEW:
            parts += ['<h3>Trials that did not complete</h3>', lost]
        else:
            parts.append(_details(f'The {len(table.rows)} trials that did not complete', lost))
    parts.append(_details('All trials', _table(summaries.trials_table(study), 'All trials')))
    facts = ''.join(
        f'<dt>{_e(k)}</dt><dd>{_e(v)}</dd>' for k, v in summaries.provenance(study).items()
    )
    commands = _e('\n'.join(study.commands))
    parts.append(f'<h3>How it was made</h3><pre>{commands}</pre><dl>{facts}</dl></section>')
    return ''.join(parts)


def _progress(study: Study) -> str:
    text = summaries.progress(study)
    if not summaries.is_complete(study):
        text += ' What follows is what there is so far.'
    return text


def _claim(study: Study, judgement: results.Judgement) -> str:
    verdict = judgement.comparison.verdict
    kind = verdict.value.replace(' ', '-')
    return (
        f'<li><p><span class="verdict {kind}"><span aria-hidden="true">'
        f'{summaries.SYMBOLS[verdict]}</span> {_e(summaries.verdict(judgement))}</span></p>'
        f'<p>{_e(judgement.claim.text)} <span class="source">({_e(judgement.claim.source)})</span>'
        f'</p><p class="muted">{_e(summaries.outcome(study, judgement))}</p></li>'
    )


def _figure(chart: charts.Chart, place: str) -> str:
    """Returns a figure, its legend of buttons, and its data as a table for screen readers."""
    title = f'<h4 id="{place}">{_e(chart.title)}</h4>'
    if isinstance(chart, charts.XY) and chart.kind == 'table':
        return f'{title}{_table(chart.table(), "")}'
    plot = f'<div class="plot" role="img" aria-label="{_e(chart.alt_text())}"></div>'
    if isinstance(chart, charts.Parallel):  # Wider than a phone.
        plot = _scrolling(plot, chart.title, 'scroll wide')
    return (
        f'<figure aria-labelledby="{place}">{title}{_legend(chart)}{plot}'
        f'<script type="application/json">{_json(interactive.figure(chart))}</script>'
        f'<figcaption>{_details("The same as a table", _table(chart.table(), chart.title))}'
        '</figcaption></figure>'
    )


def _legend(chart: charts.Chart) -> str:
    if isinstance(chart, charts.Heatmap):
        what = f'Color: {chart.value_label}. In a cell: mean, standard error, (seeds).'
        return f'<p class="muted">{_e(what)}</p>'
    buttons = ''.join(
        f'<button type="button" aria-pressed="true" data-series="{i}">'
        f'<i class="{interactive.DASHES[dash]}" style="color: var(--c{color})"></i>'
        f'{_e(name)}</button>'
        for i, (name, color, dash) in enumerate(interactive.legend(chart))
    )
    group = f'<div class="legend" role="group" aria-label="Shown series">{buttons}</div>'
    return group if buttons else ''


def _scrolling(content: str, label: str, kind: str = 'scroll') -> str:
    """Wraps content that may be wider than the page: it scrolls, by keyboard as well."""
    attributes = f'class="{kind}" tabindex="0" role="region" aria-label="{_e(label)}"'
    return f'<div {attributes}>{content}</div>'


def _table(table: Table, caption: str) -> str:
    head = ''.join(f'<th scope="col">{_e(cell)}</th>' for cell in table.header)
    rows = ''.join(
        f'<tr><th scope="row">{_e(row[0])}</th>'
        + ''.join(_cell(cell) for cell in row[1:])
        + '</tr>'
        for row in table.rows
    )
    top = f'<caption>{_e(caption)}</caption>' if caption else ''
    content = f'<table>{top}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return _scrolling(content, caption or table.header[0])


def _cell(text: str) -> str:
    return f'<td{" class=long" if len(text) > _LONG else ""}>{_e(text)}</td>'


def _details(summary: str, content: str) -> str:
    return f'<details><summary>{_e(summary)}</summary>{content}</details>'
