import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import window
from experiments.task import init_state, prepare
from experiments.train import train
from experiments.train_step import compile_programs, make_train_step
from nfnets_jax import parallel
from tests.experiments.conftest import ONE_BLOCK, tiny_config

ROWS = 64


def batch(labels=None):
    """A made batch for `tiny`, placed on the devices."""
    rng = np.random.RandomState(0)
    return parallel.shard(
        {
            'image': rng.randint(0, 256, (ROWS, 8, 8, 3)).astype(np.uint8),
            'label': rng.randint(0, 10, ROWS).astype(np.int32) if labels is None else labels,
            'position': np.arange(ROWS, dtype=np.int32),
            'stop': np.zeros(jax.device_count(), np.float32),
        }
    )


def begin(task):
    return parallel.replicate(init_state(task))


def two_steps(config):
    task = prepare(config)
    step, state = make_train_step(task), begin(task)
    for _ in range(2):
        state, _ = step(state, batch())
    return jax.device_get(state)


@pytest.fixture(scope='module')
def plain():
    return two_steps(tiny_config())


def test_parts_of_a_batch_add_up_to_the_whole(plain, tiny):
    in_parts = two_steps(tiny(accumulate=4))
    chex.assert_trees_all_close(in_parts.params, plain.params, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
        window.means(in_parts.window), window.means(plain.window), rtol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    'changes',
    [
        {'sam__rho': 0.05, 'sam__ascent_fraction': 0.5},
        {'model': {'name': 'ResNet-8', 'cross_replica_axis': 'devices', **ONE_BLOCK}},
        {'model__stochdepth_rate': 0.5},
        {'precision': 'bfloat16', 'ema': 0.0},
    ],
    ids=['sam', 'batchnorm', 'stochastic_depth', 'bfloat16'],
)
def test_parts_go_with_every_way_to_train(tiny, changes):
    state = two_steps(tiny(accumulate=2, **changes))
    chex.assert_tree_all_finite(state)


def lowered(config):
    task = prepare(config)
    return make_train_step(task).lower(begin(task), batch())


def test_everything_is_averaged_over_the_devices_in_one_operation(tiny, plain):
    program = lowered(tiny()).compile().as_text()
    (averaged,) = re.findall(r'= (.*) all-reduce\(', program)
    assert averaged.count('f32[') == len(jax.tree.leaves(plain.params)) + 3  # loss, top-1, stop


def test_gradients_are_averaged_in_the_dtype_asked_for(tiny, plain):
    program = lowered(tiny(gradient_dtype='bfloat16')).as_text()
    averaged = re.findall(r'all_reduce"?\(.*?\) : \(tensor<(\w+)>', program, re.DOTALL)
    dtypes = [shape.split('x')[-1] for shape in averaged]
    assert dtypes.count('bf16') == len(jax.tree.leaves(plain.params))


def test_low_precision_gradients_change_little(tiny, plain):
    low = two_steps(tiny(gradient_dtype='bfloat16'))
    means = window.means(low.window), window.means(plain.window)
    assert means[0]['loss'] == pytest.approx(means[1]['loss'], rel=1e-3)
    assert means[0]['gradient_norm'] != means[1]['gradient_norm']
    assert {x.dtype for x in jax.tree.leaves(low.params)} == {np.dtype('float32')}


def test_steps_that_are_not_finite_are_left_out_and_counted(tiny):
    task = prepare(tiny(skip_nonfinite=1, optimizer__schedule__name='constant'))
    augmentation = task.augmentation

    def broken(keys, images, labels):
        images, targets = augmentation(keys, images, jnp.abs(labels))
        return jnp.where(jnp.min(labels) < 0, jnp.nan, images), targets

    step, state = make_train_step(task._replace(augmentation=broken)), begin(task)
    bad = batch(np.full(ROWS, -1, np.int32))
    state, _ = step(state, batch())
    before = jax.device_get(state)

    state, _ = step(state, bad)
    after = jax.device_get(state)
    chex.assert_trees_all_equal(
        after._replace(step=before.step, window=before.window), before, strict=True
    )
    assert after.step == 2
    assert window.nonfinite_steps(after.window) == 1
    assert window.lost_at(after.window) is None

    state, _ = step(state, batch())
    assert np.any(jax.tree.leaves(state.params)[0] != jax.tree.leaves(before.params)[0])
    for _ in range(2):
        state, _ = step(state, bad)
    assert window.lost_at(state.window) == 5
    assert window.nonfinite_steps(state.window) == 3
    chex.assert_tree_all_finite(state.params)


def test_runs_that_differ_in_numbers_share_their_programs(tiny, tmp_path):
    programs = {}
    changes = {
        'seed': 1,
        'optimizer__learning_rate': 0.3,
        'optimizer__clip__clipping': 0.5,
        'optimizer__weight_decay': 0.1,
    }
    shared = [
        train(tiny(duration=2, **config), tmp_path / str(i), programs=programs, quiet=True)
        for i, config in enumerate(({}, changes))
    ]
    assert len(programs) == 1
    alone = train(tiny(duration=2, **changes), tmp_path / 'alone', quiet=True)
    assert shared[1]['final'] == alone['final'] != shared[0]['final']

    compile_programs(prepare(tiny(duration=2, ema=0.9)), programs)
    assert len(programs) == 2
