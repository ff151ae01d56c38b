import math

import pytest

from experiments.report import charts, reading
from experiments.study import schema
from tests.experiments.report.conftest import chart


@pytest.fixture
def build(write_study, study_fields):
    """A function that builds the charts of one spec of the small study."""

    def of(spec, **changes):
        study = reading.load(write_study(study_fields | {'charts': [spec]} | changes))
        return charts.build(study, study.charts[0])

    return of


def test_curves_are_means_over_seeds_at_the_tuned_values(build):
    (found,) = build(chart('curves', 'step', where={'batch_size': 256}))
    assert [s.name for s in found.series] == ['batch norm', 'NF', 'NF with AGC']
    marks = found.series[0].marks
    assert [m.x for m in marks] == [10, 20, 30]
    assert marks[-1].mean == pytest.approx(91.0)  # percent, at learning rate 0.4
    assert marks[-1].values == pytest.approx((90.0, 91.0, 92.0))
    assert marks[-1].error == pytest.approx(1 / math.sqrt(3))
    assert found.y_label == 'test top-1, %'


def test_a_diverged_curve_ends_in_a_mark(build):
    point = {'batch_size': 256, 'learning_rate': 1.6}
    (found,) = build(chart('curves', 'step', where=point))
    (nf,) = [s for s in found.series if s.name == 'NF']
    assert [m.x for m in nf.marks] == [10]
    assert [end[:2] for end in nf.ends] == [(10, pytest.approx(10.0))] * 3
    assert nf.ends[0][2] == 'seed 0 diverged after step 15'


def test_a_metric_of_a_single_step_has_no_curve(build, monkeypatch):
    """As of a test split that is evaluated at the end alone."""
    curve = reading.Study.curve
    monkeypatch.setattr(reading.Study, 'curve', lambda *args: curve(*args)[-1:])
    assert build(chart('curves', 'step')) == []


def test_what_is_open_and_not_tuned_is_kept_apart_by_dashes(build):
    (found,) = build(chart('curves', 'step'))
    styles = {s.name: (s.color, s.dash) for s in found.series}
    assert styles['NF, batch size 32'] == (1, 0)
    assert styles['NF, batch size 256'] == (1, 1)
    assert len(styles) == 6


def test_a_line_over_a_tuned_axis_shows_every_value(build):
    (found,) = build(chart('line', 'learning_rate', log_x=True, where={'batch_size': 32}))
    nf = found.series[1]
    assert [m.x for m in nf.marks] == [0.4, 1.6]
    assert [m.mean for m in nf.marks] == pytest.approx([86.0, 10.0])
    assert [m.diverged for m in nf.marks] == [0, 3]
    assert nf.marks[1].text.replace('\xa0', ' ') == '10.00 ± 0.00 (3, 3 diverged)'
    assert found.log_x


def test_categories_are_written(build):
    (found,) = build(chart('bars', 'arm', series='batch_size'))
    assert found.x_ticks == ['batch norm', 'NF', 'NF with AGC']
    assert [s.name for s in found.series] == ['batch size 32', 'batch size 256']
    assert found.table().rows[1][0] == 'NF'


def test_each_bar_has_its_color_where_the_series_is_the_axis(build):
    (found,) = build(chart('bars', 'arm', where={'batch_size': 32}))
    assert [(s.name, s.color, len(s.marks)) for s in found.series] == [
        ('batch norm', 0, 1),
        ('NF', 1, 1),
        ('NF with AGC', 2, 1),
    ]


def test_heat_map(build):
    spec = chart('heatmap', 'batch_size', series='clipping', where={'arm': 'agc'})
    (found,) = build(spec)
    assert found.columns == ['32', '256']
    assert found.rows == ['0.01', '0.16']
    assert [list(row) for row in found.means] == [
        pytest.approx([86.0, 91.0]),
        pytest.approx([81.0, 86.0]),
    ]
    assert 'highest 91.00' in found.alt_text()
    assert 'at clipping 0.01, batch size 256' in found.alt_text()


def test_a_heat_map_has_no_place_for_the_values_of_other_arms(build, study_fields):
    axes = study_fields['axes'] | {'clipping': [0.01, 0.16, 10.0]}
    (found,) = build(
        chart('heatmap', 'batch_size', series='clipping', where={'arm': 'agc'}), axes=axes
    )
    assert found.rows == ['0.01', '0.16']


def test_divergence_does_not_stretch_the_colors(build):
    spec = chart('heatmap', 'learning_rate', series='batch_size', where={'arm': 'nf'})
    (found,) = build(spec)
    assert (found.low, found.high) == pytest.approx((61.0, 86.0))
    assert found.shade(10.0) == 0.0
    assert found.shade(86.0) == 1.0


def test_a_heat_map_for_each_setting_of_what_is_open(build):
    found = build(chart('heatmap', 'learning_rate', series='batch_size'))
    assert [c.title for c in found] == [
        'The heatmap (arm batch norm)',
        'The heatmap (arm NF)',
        'The heatmap (arm NF with AGC)',
    ]


def test_parallel_coordinates_have_every_trial_and_no_seeds(build):
    (found,) = build(chart('parallel', 'arm'))
    labels = [label for label, _ in found.dimensions]
    assert labels == ['arm', 'batch size', 'clipping', 'learning rate', 'test top-1, %']
    assert len(found.threads) == 48
    assert {len(t.heights) for t in found.threads} == {5}
    lost = [t for t in found.threads if t.text.endswith('diverged')]
    assert len(lost) == 6
    others = [t for t in found.threads if t not in lost]
    assert max(t.heights[-1] for t in lost) < min(t.heights[-1] for t in others)
    assert found.dimensions[-1][1][-1] == (0.0, 'diverged')


def test_a_long_table_is_thinned_and_keeps_its_ends():
    marks = [charts.Mark(step, 0.0, 0.0, (0.0,), 0, str(step)) for step in range(1, 1001)]
    series = [charts.Series('one', 0, 0, marks)]
    table = charts.XY('curves', '', 'step', 'y', None, False, False, False, series).table()
    assert len(table.rows) == 25
    assert table.rows[0] == ['1', '1']
    assert table.rows[-1] == ['1,000', '1000']


@pytest.mark.parametrize('kind', schema.KINDS)
def test_a_study_that_has_not_begun_has_no_charts(build, study_fields, kind):
    trials = [t | {'state': 'pending', 'metrics': {}} for t in study_fields['trials']]
    x = 'step' if kind == 'curves' else 'batch_size'
    assert build(chart(kind, x), trials=trials) == []
