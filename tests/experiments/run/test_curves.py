import itertools
import math

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.run import curves


def _metrics(steps, every=10):
    """Returns a plausible run: noisy training metrics, and an evaluation now and then."""
    rng = np.random.default_rng(0)
    records = []
    for step in range(1, steps + 1):
        loss = 0.1 + 2.2 * math.exp(-5 * step / steps)
        records.append(
            {
                'step': step,
                'train/loss': loss * rng.uniform(0.7, 1.3),
                'train/top1': rng.uniform(0.8, 1.0),
                'train/learning_rate': 0.1 * (1 - step / steps),
                'train/clipped_fraction': rng.uniform(0.2, 0.4),
            }
        )
        if step % every == 0:
            evaluation = {'test/loss': loss, 'test/top1': 0.985, 'test/top5': 1.0}
            ema = {'test_ema/loss': loss, 'test_ema/top1': 0.991, 'test_ema/top5': 1.0}
            records.append({'step': step} | evaluation | ema)
    return records


def _panels(figure):
    return {axes.get_title(loc='left'): axes for axes in figure.axes}


def _texts(axes):
    return [text.get_text() for text in axes.texts]


def test_four_panels_with_their_final_values():
    panels = _panels(curves.curves(_metrics(100), title='NF-ResNet'))
    assert list(panels) == ['Loss', 'Top-1 accuracy', 'Learning rate', 'Clipped fraction']
    assert {'test 98.5%', 'test EMA 99.1%'} <= set(_texts(panels['Top-1 accuracy']))
    assert {'test 0.115', 'test EMA 0.115'} <= set(_texts(panels['Loss']))
    assert _texts(panels['Learning rate']) == ['lr 0']
    assert panels['Loss'].get_yscale() == 'log'


def test_noisy_curves_are_smoothed_over_faint_raw_ones():
    panel = _panels(curves.curves(_metrics(400)))['Clipped fraction']
    assert panel.get_title(loc='right') == 'clipped: moving average of the faint line'
    raw, smooth = panel.lines
    assert raw.get_alpha() < 0.5
    assert smooth.get_alpha() is None
    assert len(raw.get_ydata()) == len(smooth.get_ydata()) == 400
    assert np.std(smooth.get_ydata()) < 0.5 * np.std(raw.get_ydata())
    np.testing.assert_allclose(np.mean(smooth.get_ydata()), np.mean(raw.get_ydata()), rtol=0.02)


def test_smoothing_follows_a_steep_beginning():
    metrics = [{'step': i, 'train/loss': 100.0 - i} for i in range(100)]
    raw, smooth = _panels(curves.curves(metrics))['Loss'].lines
    np.testing.assert_allclose(smooth.get_ydata()[:90], raw.get_ydata()[:90])


def test_few_points_are_all_marked_and_not_smoothed():
    panel = _panels(curves.curves(_metrics(5)))['Clipped fraction']
    assert panel.get_title(loc='right') == ''
    (line,) = panel.lines
    assert len(line.get_ydata()) == 5
    assert line.get_marker() == '.'


def test_labels_of_equal_values_stay_apart():
    metrics = [
        {'step': i, 'train/top1': 0.9, 'test/top1': 0.9, 'test_ema/top1': 0.9} for i in (1, 2)
    ]
    axes = _panels(curves.curves(metrics))['Top-1 accuracy']
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert len(heights) == 3
    assert all(b - a > 0.07 for a, b in itertools.pairwise(heights))


def test_what_is_missing_or_not_finite_is_left_out():
    metrics = [{'step': i, 'train/loss': x} for i, x in enumerate([2.0, 1.0, math.nan, math.inf])]
    panels = _panels(curves.curves(metrics))
    (line,) = panels['Loss'].lines
    np.testing.assert_array_equal(line.get_xydata(), [[0, 2], [1, 1]])
    assert _texts(panels['Loss']) == ['train 1.000']
    for title in ('Top-1 accuracy', 'Learning rate', 'Clipped fraction'):
        assert _texts(panels[title]) == ['not recorded']


@pytest.mark.parametrize('metrics', [[], _metrics(1), _metrics(40)], ids=['none', 'one', 'run'])
def test_the_file_is_a_picture(tmp_path, metrics):
    curves.draw_curves(metrics, tmp_path / 'curves.png', title='a run')
    picture = matplotlib.image.imread(tmp_path / 'curves.png')
    assert picture.shape[:2] == (900, 1440)
    assert picture.std() > 0.01
    assert [path.name for path in tmp_path.iterdir()] == ['curves.png']


def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'curves.png'
    path.write_bytes(b'old')

    def fail(self, file, **options):
        file.write(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(Figure, 'savefig', fail)
    with pytest.raises(OSError, match='disk full'):
        curves.draw_curves(_metrics(3), path)
    assert path.read_bytes() == b'old'


def test_layers_are_rows_of_colors_in_order():
    layers = ['initial_conv', *(f'block_{i}' for i in (2, 10, 1))]
    records = [
        record | {
            f'train/{metric}/{layer}': 0.1 * i
            for metric in ('clipped_fraction', 'gradient_to_weight')
            for i, layer in enumerate(layers)
        }
        for record in _metrics(20)
    ]  # fmt: skip
    panels = _panels(curves.curves(records))
    shown = [panels[f'{name} by layer'] for name in
             ('Clipped fraction', 'Gradient norm / weight norm')]  # fmt: skip
    for axes in shown:
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels == ['block_1', 'block_2', 'block_10', 'initial_conv']
    (mesh,) = shown[0].collections
    np.testing.assert_allclose(mesh.get_array()[:, 0], [0.3, 0.1, 0.2, 0.0])


def test_the_words_are_above_and_below():
    figure = curves.curves(_metrics(3), title='run', best='best: 9 %', note='It includes all.')
    assert figure.get_suptitle() == 'run\nbest: 9 %'
    assert figure.get_supxlabel() == 'It includes all.'
    assert curves.curves(_metrics(3)).get_suptitle() == ''
