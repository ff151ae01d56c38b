"""Charts as Plotly's dicts, to be written as JSON into the page.

The page's script replaces names of colors by those of the light or the dark palette: '@c0', '@c1',
... of the series, '@c0-band' for its faint version, '@ink', '@grid', '@paper'.
"""

import html
import itertools
from typing import Any

from experiments.report.charts import NUM_COLORS, XY, Chart, Heatmap, Parallel, Series
from experiments.report.wording import in_lines

# Colors after Okabe and Ito, distinguishable for color-blind readers, with a contrast of at least 3
# on white and on black (WCAG 2.2, 1.4.11).
_SERIES = {
    'light': ('#0072B2', '#C24A00', '#007A5A', '#A8508A', '#8A6A00', '#4B2BBF', '#444444'),
    'dark': ('#56B4E9', '#F0934E', '#2FBF94', '#E29BC6', '#E6C84A', '#8C8CFF', '#C8C8C8'),
}
_PAGE = {
    'light': {'ink': '#1b1f24', 'muted': '#57606a', 'grid': '#dfe3e8', 'paper': '#ffffff'},
    'dark': {'ink': '#e8eaed', 'muted': '#a3abb5', 'grid': '#3a414b', 'paper': '#16191d'},
}
HEAT = ('#f3f6fa', '#0b3c6f')  # from low to high, linear between
DASHES = ('solid', 'dash', 'dot', 'dashdot')


def palette(theme: str) -> dict[str, str]:
    """Returns {name without '@': color} of a theme, 'light' or 'dark'."""
    series = {f'c{i}': color for i, color in enumerate(_SERIES[theme])}
    return _PAGE[theme] | series | {f'{name}-band': f'{c}38' for name, c in series.items()}


def figure(chart: Chart) -> dict[str, Any]:
    """Returns {'data', 'layout'} for Plotly; a trace's `legendgroup` is its index in the legend."""
    if isinstance(chart, Heatmap):
        return _heatmap(chart)
    if isinstance(chart, Parallel):
        return _parallel(chart)
    return _xy(chart)


def legend(chart: Chart) -> list[tuple[str, int, int]]:
    """Returns name, color and dash of each entry of the legend; [] without a legend."""
    if isinstance(chart, Heatmap):
        return []
    if isinstance(chart, Parallel):
        entries = zip(chart.names, chart.colors, strict=True)
        return [(name, color % NUM_COLORS, 0) for name, color in entries]
    return [(s.name, s.color % NUM_COLORS, s.dash % len(DASHES)) for s in chart.series if s.name]


def is_dark(shade: float) -> bool:
    """Returns whether to write in white on a shade of `HEAT`; the contrast is above 4.5:1."""
    return shade > 0.68


def cell_lines(text: str) -> str:
    """Breaks '97.12 ± 0.21 (3)' into the lines of a cell."""
    return text.replace('\N{NO-BREAK SPACE}', ' ').replace(' ± ', '\n± ').replace(' (', '\n(')


def _text(text: str) -> str:
    """Escapes Plotly's markup."""
    return html.escape(text, quote=False)


def _layout(**more: Any) -> dict[str, Any]:
    return {
        'autosize': True,
        'height': 380,
        'margin': {'l': 60, 'r': 12, 't': 12, 'b': 50},
        'paper_bgcolor': 'rgba(0,0,0,0)',
        'plot_bgcolor': 'rgba(0,0,0,0)',
        'font': {'color': '@ink', 'size': 13, 'family': 'system-ui, sans-serif'},
        'showlegend': False,
        'hovermode': 'closest',
        'hoverlabel': {'align': 'left'},
        'dragmode': False,  # A finger scrolls the page.
    } | more


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {
        'title': {'text': _text(title), 'standoff': 12},
        'gridcolor': '@grid',
        'zerolinecolor': '@grid',
        'linecolor': '@grid',
        'automargin': True,
        'fixedrange': True,
    } | more


def _ticks(labels: Any) -> dict[str, Any]:
    """Returns the ticks of an axis of categories, which are drawn at 0, 1, 2, ..."""
    return {'tickvals': list(range(len(labels))), 'ticktext': [_broken(label) for label in labels]}


def _broken(label: str) -> str:
    return '<br>'.join(map(_text, in_lines(label)))


def _xy(chart: XY) -> dict[str, Any]:
    x_axis, y_axis = _axis(chart.x_label), _axis(chart.y_label)
    if chart.x_ticks is not None:
        # Show every category, also without data.
        x_axis |= _ticks(chart.x_ticks) | {'range': [-0.5, len(chart.x_ticks) - 0.5]}
    elif chart.log_x:
        # Mark the values that were run, such as 32, 128 and 512, not powers of ten.
        values = chart.numbers()
        x_axis |= {'type': 'log'}
        if chart.kind == 'line':
            x_axis |= {'tickvals': values, 'ticktext': [f'{value:g}' for value in values]}
    if chart.log_y:
        y_axis |= {'type': 'log', 'dtick': 'D2'}  # 1, 2, 5: labels of all digits would overlap
    if chart.kind == 'bars':
        y_axis |= {'rangemode': 'tozero'}
    traces = [
        trace
        for place, series in enumerate(chart.series)
        for trace in (_bars if chart.kind == 'bars' else _lines)(chart, series, place)
    ]
    own_colors = all(len(s.marks) == 1 for s in chart.series)
    layout = _layout(xaxis=x_axis, yaxis=y_axis, barmode='overlay' if own_colors else 'group')
    return {'data': traces, 'layout': layout}


def _hover(chart: XY, series: Series) -> list[str]:
    texts = []
    for mark in series.marks:
        x = mark.x if isinstance(mark.x, str) else f'{mark.x:,g}'
        lines = [f'<b>{_text(series.name)}</b>'] if series.name else []
        lines.append(_text(f'{chart.x_label} {x}: {mark.text}'))
        if len(mark.values) > 1:
            lines.append(f'range {min(mark.values):,.4g} to {max(mark.values):,.4g}')
        texts.append('<br>'.join(lines))
    return texts


def _lines(chart: XY, series: Series, place: int) -> list[dict[str, Any]]:
    color = f'c{series.color % NUM_COLORS}'
    xs, means = chart.positions(series), [mark.mean for mark in series.marks]
    common = {'type': 'scatter', 'legendgroup': str(place)}
    line = common | {
        'x': xs,
        'y': means,
        'mode': 'lines+markers',
        'line': {'color': f'@{color}', 'width': 2, 'dash': DASHES[series.dash % len(DASHES)]},
        'marker': {'color': f'@{color}', 'size': 6},
        'hoverinfo': 'text',
        'hovertext': _hover(chart, series),
    }
    traces = [line]
    if chart.kind == 'curves':
        if any(mark.error for mark in series.marks):
            high = [mark.mean + mark.error for mark in series.marks]
            low = [mark.mean - mark.error for mark in series.marks]
            if chart.log_y:  # A logarithmic axis has only positive values.
                low = [max(y, mark.mean / 10) for y, mark in zip(low, series.marks, strict=True)]
            band = {'x': xs + xs[::-1], 'y': high + low[::-1], 'mode': 'lines', 'fill': 'toself'}
            look = {'fillcolor': f'@{color}-band', 'line': {'width': 0}, 'hoverinfo': 'skip'}
            traces.insert(0, common | band | look)
    else:
        line['error_y'] = {
            'array': [mark.error for mark in series.marks],
            'color': f'@{color}',
            'thickness': 1.5,
        }
    hover = line['hovertext']
    lost = [(x, m.mean, t) for x, m, t in zip(xs, series.marks, hover, strict=True) if m.diverged]
    lost += [(x, y, _text(f'{series.name}: {text}')) for x, y, text in series.ends]
    if lost:
        x, y, text = zip(*lost, strict=True)
        marker = {'symbol': 'x', 'size': 12, 'color': f'@{color}'}
        marker['line'] = {'color': '@ink', 'width': 1}
        crosses = {'x': x, 'y': y, 'mode': 'markers', 'marker': marker}
        traces.append(common | crosses | {'hoverinfo': 'text', 'hovertext': text})
    return traces


def _bars(chart: XY, series: Series, place: int) -> list[dict[str, Any]]:
    color = f'@c{series.color % NUM_COLORS}'
    patterns = ('', '/', '.', 'x')
    return [
        {
            'type': 'bar',
            'legendgroup': str(place),
            'x': chart.positions(series),
            'y': [mark.mean for mark in series.marks],
            'marker': {'color': color, 'pattern': {'shape': patterns[series.dash % 4]}},
            'error_y': {'array': [mark.error for mark in series.marks], 'color': '@ink'},
            'hoverinfo': 'text',
            'hovertext': _hover(chart, series),
        }
    ]


def _heatmap(chart: Heatmap) -> dict[str, Any]:
    cells = [
        {
            'x': column,
            'y': row,
            'text': _text(cell_lines(text)).replace('\n', '<br>'),
            'showarrow': False,
            'font': {'size': 12, 'color': 'white' if is_dark(chart.shade(mean)) else 'black'},
        }
        for row, (means, texts) in enumerate(zip(chart.means, chart.texts, strict=True))
        for column, (mean, text) in enumerate(zip(means, texts, strict=True))
        if text
    ]
    trace = {
        'type': 'heatmap',
        'x': list(range(len(chart.columns))),
        'y': list(range(len(chart.rows))),
        # JSON has no NaN; Plotly leaves null cells empty.
        'z': [[value if value == value else None for value in row] for row in chart.means],
        'zmin': chart.low,
        'zmax': chart.high,
        'hoverinfo': 'text',
        'hovertext': [
            [
                _text(f'{chart.y_label} {y}, {chart.x_label} {x}: {text}')
                for x, text in zip(chart.columns, row, strict=True)
            ]
            for y, row in zip(chart.rows, chart.texts, strict=True)
        ],
        'colorscale': [[0, HEAT[0]], [1, HEAT[1]]],
        'xgap': 2,
        'ygap': 2,
        'colorbar': {'thickness': 12, 'outlinewidth': 0},
    }
    grid = {'showgrid': False, 'zeroline': False}
    x_axis = _axis(chart.x_label, **grid, **_ticks(chart.columns))
    y_axis = _axis(chart.y_label, **grid, **_ticks(chart.rows))
    return {'data': [trace], 'layout': _layout(xaxis=x_axis, yaxis=y_axis, annotations=cells)}


def _parallel(chart: Parallel) -> dict[str, Any]:
    columns = range(len(chart.dimensions))
    traces = []
    for place, color in enumerate(chart.colors):
        threads = [thread for thread in chart.threads if thread.series == place]
        joined = [([*columns, None], [*t.heights, None], [_text(t.text)] * len(columns) + [''])
                  for t in threads]  # fmt: skip
        x, y, text = (list(itertools.chain(*part)) for part in zip(*joined, strict=True))
        traces.append(
            {
                'type': 'scatter',
                'legendgroup': str(place),
                'x': x,
                'y': y,
                'mode': 'lines',
                'line': {'color': f'@c{color % NUM_COLORS}', 'width': 1.5},
                'opacity': 0.6,
                'hoverinfo': 'text',
                'hovertext': text,
            }
        )
    ink = {'color': '@ink', 'width': 1}
    rules = [{'type': 'line', 'x0': i, 'x1': i, 'y0': 0, 'y1': 1, 'line': ink} for i in columns]
    ticks = [
        {
            'x': i,
            'y': height,
            'text': _broken(tick),
            'align': 'left',
            'showarrow': False,
            'xanchor': 'left',
            'xshift': 3,
            'bgcolor': '@paper',
            'opacity': 0.85,
            'font': {'size': 11, 'color': '@ink'},
        }
        for i, (_, labels) in enumerate(chart.dimensions)
        for height, tick in labels
    ]
    names = _ticks([label for label, _ in chart.dimensions])
    bare = {'showgrid': False, 'zeroline': False}
    x_axis = _axis('', **bare, **names, side='top', range=[-0.1, len(columns) - 0.4])
    y_axis = _axis('', **bare, visible=False, range=[-0.05, 1.05])
    layout = _layout(xaxis=x_axis, yaxis=y_axis, shapes=rules, annotations=ticks, height=460)
    layout['margin'] = {'l': 12, 'r': 12, 't': 40, 'b': 12}
    return {'data': traces, 'layout': layout}
