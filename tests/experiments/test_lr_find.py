"""The range test trains at the rates it names; the suggestion is that of curves made for it."""

import matplotlib.image
import numpy as np
import pytest

from experiments import lr_find, train
from experiments.run import metric_writers


def bowl(rates):
    """A loss that falls from 2.3 by a logistic curve around 0.01, and rises again above 1."""
    x = np.log10(rates)
    return 2.3 - 2 / (1 + np.exp(-4 * (x + 2))) + np.where(x > 0, 20 * x**2, 0)


def test_the_suggestion_is_the_steepest_descent_of_a_known_curve():
    rates = lr_find.learning_rates(1e-5, 10, 200)
    losses = bowl(rates)
    smoothed = lr_find.smooth(losses, 200)
    found = lr_find.suggest(rates, smoothed, 200)
    assert found.steepest == pytest.approx(0.01, rel=0.1)
    assert 0.4 < found.largest < 1.1  # The loss is nearly constant there.


def test_noise_and_single_outliers_hardly_move_it():
    rates = lr_find.learning_rates(1e-5, 10, 200)
    losses = bowl(rates) + np.random.RandomState(0).normal(0, 0.05, 200)
    losses[[30, 90, 140]] = 300, 0.001, 300
    found = lr_find.suggest(rates, lr_find.smooth(losses, 200), 200)
    assert 0.005 < found.steepest < 0.02
    assert 0.3 < found.largest < 2


@pytest.mark.parametrize('count', [1, 3, 12, 40])
def test_a_loss_that_only_rises_has_no_suggestion(count):
    rates = lr_find.learning_rates(1e-3, 1, 40)[:count]
    smoothed = lr_find.smooth(1 + rates, 40)
    assert lr_find.suggest(rates, smoothed, 40) is None
    lines = list(lr_find.table(rates, 1 + rates, smoothed, None))
    assert len(lines) == 1 + min(count, 20)


def test_rates_grow_by_the_same_factor():
    rates = lr_find.learning_rates(0.01, 1, 5)
    np.testing.assert_allclose(rates, [0.01, 0.01 * 10**0.5, 0.1, 0.1 * 10**0.5, 1])


@pytest.mark.parametrize('scale', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_constant_rate_is_training_at_that_rate(scale, tiny, tmp_path):
    """Which would raise an error if the step were compiled again for another rate."""
    config = tiny(log_every='1 steps', optimizer__schedule__name='constant', ema=0.0)
    config.optimizer.scale_lr_by_batch = scale
    config.optimizer.learning_rate = 0.7
    train.train(config, tmp_path / 'run', quiet=True)
    lines = metric_writers.read_metrics(tmp_path / 'run')
    expected = [line['train/loss'] for line in lines if 'train/loss' in line]
    config.optimizer.schedule.update(name='plateau', warmup='50%')  # The test has its own.
    experiment = lr_find.prepare(config, 6)
    losses = list(lr_find.range_test(experiment, np.full(6, 0.7)))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    higher = list(lr_find.range_test(experiment, np.array([0.7, 0.7, 7, 7, 7, 7])))
    np.testing.assert_allclose(higher[:3], expected[:3], rtol=1e-5)
    assert abs(higher[3] - expected[3]) > 1e-4


def test_it_ends_where_the_loss_diverges(tiny, monkeypatch):
    losses = iter([2, 2, 2, 7, 7, 9, 10, 11, 12, 13])

    def fake(experiment):
        return lambda state, batch: (state, {'loss': np.float32(next(losses))})

    monkeypatch.setattr(lr_find, 'make_train_step', fake)
    experiment = lr_find.prepare(tiny(), 10)
    # The median of the latest two first exceeds 8 at 9 and 10.
    found = list(lr_find.range_test(experiment, np.geomspace(1e-3, 1, 10)))
    assert found == [2, 2, 2, 7, 7, 9, 10]
    losses = iter([2, 2, np.nan, 2])
    assert list(lr_find.range_test(experiment, np.geomspace(1e-3, 1, 10))) == [2, 2]


def test_the_command_writes_nothing_but_the_curve(command, tmp_path):
    config = tmp_path / 'tiny.py'
    config.write_text(
        'from tests.experiments.conftest import tiny_config\n'
        'def get_config():\n    return tiny_config()\n'
    )
    options = f'--config={config}', '--steps=12', '--low=0.1', '--high=3'
    process = command('lr_find', *options, f'--out={tmp_path}/lr.png')
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert 'steps: 12 of 64 images' in err
    lines = out.splitlines()
    assert lines[0].split() == ['learning_rate', 'loss', 'smoothed']
    assert float(lines[1].split()[0]) == 0.1
    assert any('suggestion' in line for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['lr.png', 'tiny.py']
    assert matplotlib.image.imread(tmp_path / 'lr.png').shape == (600, 960, 4)


@pytest.mark.parametrize(
    ('options', 'problem'),
    [
        (['--low=1', '--high=0.1'], '--low=1.0: must be below --high=0.1'),
        (['--high=inf'], '--high=inf: must be a finite number'),
        (['--out=lr.jpg'], '--out=lr.jpg: unknown suffix'),
        (['--out=absent/lr.png'], 'there is no directory absent'),
    ],
)
def test_mistakes_are_one_line(command, options, problem):
    process = command('lr_find', '--config=configs/digits.py', *options, devices=1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.startswith('error: ')
    assert problem in err
    assert err.count('\n') == 1
