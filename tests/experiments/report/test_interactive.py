import itertools
import json
import math

import plotly.graph_objects as go
import pytest

from experiments.report import charts, interactive, reading
from experiments.study import schema
from tests.experiments.report.conftest import chart


@pytest.fixture
def drawn(study):
    return {spec.kind: charts.build(study, spec)[0] for spec in study.charts}


def _colored(figure):
    """A figure with the names of colors replaced, as the page's script does it."""
    palette = interactive.palette('light')

    def paint(pairs):
        return {
            key: palette[value[1:]] if key.endswith('color') and str(value)[:1] == '@' else value
            for key, value in pairs
        }

    text = json.dumps(figure, allow_nan=False)
    return json.loads(text, object_pairs_hook=paint), text


@pytest.mark.parametrize('kind', [kind for kind in schema.KINDS if kind != 'table'])
def test_plotly_knows_every_field(drawn, kind):
    painted, _ = _colored(interactive.figure(drawn[kind]))
    go.Figure(painted)  # It refuses what it does not know.
    assert '@' not in json.dumps(painted)


@pytest.mark.parametrize('kind', ['curves', 'line', 'bars', 'parallel'])
def test_every_trace_belongs_to_an_entry_of_the_legend(drawn, kind):
    entries = interactive.legend(drawn[kind])
    groups = {trace['legendgroup'] for trace in interactive.figure(drawn[kind])['data']}
    assert groups == {str(i) for i in range(len(entries))}


def test_curves_have_bands(drawn):
    traces = interactive.figure(drawn['curves'])['data']
    band, line = traces[:2]
    assert band['fill'] == 'toself'
    assert len(band['x']) == 2 * len(line['x'])
    middle = [(a + b) / 2 for a, b in zip(band['y'][:3], band['y'][:2:-1], strict=True)]
    assert middle == pytest.approx(line['y'])


def test_what_diverged_is_crossed(drawn):
    crosses = [
        trace
        for trace in interactive.figure(drawn['line'])['data']
        if trace.get('marker', {}).get('symbol') == 'x'
    ]
    assert [(c['legendgroup'], list(c['x'])) for c in crosses] == [('1', [1.6])]


def test_texts_are_no_markup(write_study, study_fields):
    study_fields['arms']['nf'] = '<a href="javascript:alert(1)">NF</a> & co'
    study = reading.load(write_study(study_fields))
    for spec in study.charts:
        text = json.dumps(interactive.figure(charts.build(study, spec)[0]))
        assert '<a' not in text


def _luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(first, second):
    high, low = sorted([_luminance(first), _luminance(second)], reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_colors_can_be_seen(theme):
    palette = interactive.palette(theme)
    for i in range(charts.NUM_COLORS):
        assert _contrast(palette[f'c{i}'], palette['paper']) >= 3.0, i
    assert _contrast(palette['ink'], palette['paper']) >= 7.0
    assert _contrast(palette['muted'], palette['paper']) >= 4.5


def test_figures_in_a_heat_map_can_be_read():
    low, high = ([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in interactive.HEAT)
    for step in range(101):
        shade = step / 100
        mixed = (round(a + (b - a) * shade) for a, b in zip(low, high, strict=True))
        ground = '#' + ''.join(f'{c:02x}' for c in mixed)
        ink = '#ffffff' if interactive.is_dark(shade) else '#000000'
        assert _contrast(ink, ground) >= 4.5, shade


def test_many_series_are_told_apart_by_color_and_dash(write_study, study_fields):
    study = reading.load(write_study(study_fields | {'charts': [chart('curves', 'step')]}))
    (found,) = charts.build(study, study.charts[0])
    styles = [entry[1:] for entry in interactive.legend(found)]
    assert all(a != b for a, b in itertools.combinations(styles, 2))


def test_more_arms_than_colors_are_told_apart(write_study, study_fields):
    names = [f'arm{i}' for i in range(charts.NUM_COLORS + 1)]
    study_fields |= {'axes': study_fields['axes'] | {'arm': names}, 'claims': []}
    study_fields['charts'] = [chart('line', 'learning_rate')]
    template = next(t for t in study_fields['trials'] if t['axes']['arm'] == 'bn')
    study_fields['trials'] = [
        template | {'id': name, 'axes': template['axes'] | {'arm': name}} for name in names
    ]
    study = reading.load(write_study(study_fields))
    (found,) = charts.build(study, study.charts[0])
    styles = [entry[1:] for entry in interactive.legend(found)]
    assert len(set(styles)) == len(names)


def _lab(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    x, y, z = (
        t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116
        for t in (
            (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
            0.2126 * r + 0.7152 * g + 0.0722 * b,
            (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
        )
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_no_two_colors_look_alike(theme):
    palette = interactive.palette(theme)
    colors = [_lab(palette[f'c{i}']) for i in range(charts.NUM_COLORS)]
    assert min(math.dist(a, b) for a, b in itertools.combinations(colors, 2)) > 30
