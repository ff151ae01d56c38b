import jax
import numpy as np
import optax
import pytest

from experiments.run import metric_writers
from experiments.study import landscape, measurements
from experiments.train import train
from tests.experiments.conftest import tiny_config


def test_along_the_gradient_of_a_parabola():
    """Loss x' A x / 2: after a step s the gradient has changed by -s A g, whatever the distance."""
    hessian, start = np.diag([1.0, 4.0]), np.array([3.0, 0.5])
    gradient = hessian @ start

    def value_and_grad(x):
        return jax.value_and_grad(lambda x: x['w'] @ hessian @ x['w'] / 2)(x)

    found = landscape.along_gradient(value_and_grad, {'w': start}, (0.1, 0.5))
    ends = [start - size * gradient for size in (0.1, 0.5)]
    losses = [x @ hessian @ x / 2 for x in ends]
    bend = np.linalg.norm(hessian @ gradient)
    expected = {
        'loss_min': min(losses),
        'loss_max': max(losses),
        'loss_range': np.ptp(losses),
        'gradient_change': 0.5 * bend,
        'beta': bend / np.linalg.norm(gradient),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_random_direction_has_the_norms_of_the_filters():
    rng = np.random.default_rng(0)
    params = {'conv': {'w': rng.normal(size=(3, 3, 2, 5)), 'b': np.ones(5)}, 'gain': np.ones(())}
    first, second = (landscape.random_direction(key, params) for key in jax.random.split(KEY))
    norms = [np.sqrt((np.asarray(x['conv']['w']) ** 2).sum((0, 1, 2))) for x in (first, params)]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    assert not np.any(first['conv']['b'])
    assert not np.any(first['gain'])
    assert not np.allclose(first['conv']['w'], second['conv']['w'])


def test_along_random_directions_is_the_mean_over_them():
    params = {'w': np.eye(2)}
    found = landscape.along_random(
        lambda x: x['w'].sum(), params, (0.0, 0.5), jax.random.split(KEY)
    )
    sums = [float(landscape.random_direction(k, params)['w'].sum()) for k in jax.random.split(KEY)]
    np.testing.assert_allclose(found, [2, 2 + 0.5 * np.mean(sums)], rtol=1e-5)


KEY = jax.random.key(0)


def test_a_trial_tells_its_landscape_and_keeps_its_curves(tmp_path, monkeypatch):
    monkeypatch.setattr(measurements, 'DIRECTIONS', 1)
    # One program each, where there would be one for each operation on each shape.
    for module, name in [(landscape, 'random_direction')] + [
        (optax.tree, name) for name in ('add_scale', 'norm', 'sub')
    ]:
        monkeypatch.setattr(module, name, jax.jit(getattr(module, name)))
    model = {'name': 'ResNet-8', 'widths': (8,), 'depths': (1,), 'cross_replica_axis': 'devices'}
    config = tiny_config(model=model, optimizer__clip__name='none', checkpoint__keep=3)
    train(config, tmp_path, quiet=True)
    before = metric_writers.read_metrics(tmp_path)
    compiled = measurements.Compiled()
    found = measurements.loss_landscape(config, tmp_path, compiled)
    assert measurements.loss_landscape(config, tmp_path, compiled) == found
    lines = metric_writers.read_metrics(tmp_path)
    assert lines[: len(before)] == before
    along = [x for x in lines if 'landscape/beta' in x]
    assert [x['step'] for x in along] == [0, 3, 6], 'once, although it was measured twice'
    betas = [x['landscape/beta'] for x in along]
    assert found['landscape/beta'] == pytest.approx(np.median(betas))
    away = {x['step']: x['landscape/random_loss'] for x in lines if 'landscape/random_loss' in x}
    assert list(away) == [0, 10, 25, 50, 75, 100]
    assert found['landscape/random_rise'] == pytest.approx(away[50] - away[0], abs=1e-6)
    assert away[0] == pytest.approx(np.log(10), abs=0.5)
