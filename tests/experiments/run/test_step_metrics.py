import jax.numpy as jnp
import numpy as np
import pytest

from experiments.run import step_metrics

STEP = {'loss': 2.0, 'top1': 0.5, 'gradient_norm': 1.0, 'clipped_fraction': 0.25}


def run(losses, every=4, start=None, first=0, patience=0, **metrics):
    sums = step_metrics.zeros() if start is None else start
    for step, loss in enumerate(losses, start=first):
        values = {
            name: jnp.asarray(x, jnp.float32)
            for name, x in {**STEP, **metrics, 'loss': loss}.items()
        }
        sums = step_metrics.add(sums, values, jnp.int32(step), every, patience)
    return sums


def test_means_are_over_the_window():
    means = step_metrics.means(run([1.0, 2.0, 6.0]))
    assert means == {'loss': 3.0, 'top1': 0.5, 'gradient_norm': 1.0, 'clipped_fraction': 0.25}


def test_a_new_window_begins_every_so_often():
    assert step_metrics.means(run([9, 9, 9, 9, 1.0, 2.0]))['loss'] == 1.5


def test_a_window_goes_on_after_a_checkpoint():
    half = run([1.0, 2.0])
    saved = {name: np.asarray(value) for name, value in half.items()}
    assert step_metrics.means(run([3.0, 6.0], start=saved, first=2))['loss'] == 3.0


def test_nothing_yet_has_no_mean():
    assert np.isnan(step_metrics.means(step_metrics.zeros())['loss'])


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_the_first_step_that_is_not_finite_is_remembered_for_good(bad):
    assert step_metrics.lost_at(run([1.0] * 6)) is None
    assert step_metrics.lost_at(run([1.0, bad, 1.0, bad, 1.0, 1.0])) == 2
    assert step_metrics.lost_at(run([1.0], gradient_norm=bad)) == 1


def test_patience_ends_after_so_many_steps_in_a_row():
    bad = np.nan
    sums = run([1.0, bad, bad, 3.0, bad, bad], every=8, patience=2)
    assert step_metrics.lost_at(sums) is None
    assert step_metrics.nonfinite_steps(sums) == 4
    assert step_metrics.means(sums)['loss'] == 2.0, 'a mean over the steps that count'
    assert step_metrics.lost_at(run([bad], start=sums, first=6, patience=2)) == 7
    assert step_metrics.lost_at(run([1.0], start=sums, first=6, patience=2)) is None


def test_vectors_of_layers_are_averaged_like_scalars():
    vectors = {name: jnp.array([1.0, 3.0]) for name in step_metrics.BY_LAYER}
    sums = run([9, 9, 9, 9, 1.0, np.nan, 2.0], start=step_metrics.zeros(2), **vectors)
    expected = {'a': 1.0, 'b': 3.0}
    assert step_metrics.means_by_layer(sums, ['a', 'b']) == {
        f'{name}/{layer}': value
        for name in ('clipped_fraction', 'gradient_to_weight')
        for layer, value in expected.items()
    }
    assert step_metrics.means_by_layer(step_metrics.zeros(), []) == {}
