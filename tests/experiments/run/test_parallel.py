import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.run import parallel
from nfnets_jax.errors import UsageError

BATCH = {'x': np.arange(24, dtype=np.float32).reshape(8, 3), 'y': np.arange(8, dtype=np.int32)}


def gradient_step(weights, batch):
    gradients = jax.grad(lambda w: jnp.mean((batch['x'] @ w - batch['y']) ** 2))(weights)
    return weights - 1e-3 * jax.lax.pmean(gradients, parallel.AXIS)


def test_tests_run_on_several_devices():
    assert jax.local_device_count() == 4


def test_a_step_runs_on_the_chosen_devices():
    chosen = jax.local_devices()[1:3]
    with parallel.using(chosen):
        assert parallel.device_count() == 2
        sharded = parallel.shard(BATCH)
        new = parallel.parallelize(gradient_step)(parallel.replicate(np.zeros(3, 'f4')), sharded)
    assert new.devices() == sharded['x'].devices() == set(chosen)
    assert parallel.device_count() == 4


def test_the_devices_that_xla_flags_name_are_left_alone():
    parallel.split_cpu(2)
    assert jax.config.jax_num_cpu_devices == -1
    assert not parallel.cpu_is_split()


def test_devices_that_have_been_counted_are_left_alone(monkeypatch):
    monkeypatch.setenv('XLA_FLAGS', '')
    before = jax.config.jax_num_cpu_devices
    parallel.split_cpu(2)
    assert jax.config.jax_num_cpu_devices == before
    assert not parallel.cpu_is_split()


def test_replicate_keeps_shapes_and_reaches_every_device():
    tree = parallel.replicate({'w': np.ones((2, 3)), 'n': jnp.int32(7)})
    chex.assert_shape(tree['w'], (2, 3))
    assert tree['w'].devices() == set(jax.local_devices())
    assert int(tree['n']) == 7


def test_shard_splits_rows_in_order():
    sharded = parallel.shard(BATCH)
    chex.assert_shape(sharded['x'], (4, 2, 3))
    chex.assert_trees_all_equal(sharded['y'].reshape(-1), BATCH['y'])
    for device, piece in zip(jax.local_devices(), sharded['y'].addressable_shards, strict=True):
        assert piece.device == device


def test_mean_gradient_over_devices_is_the_gradient_of_the_batch():
    weights = np.array([0.1, -0.2, 0.3], np.float32)
    step = parallel.parallelize(gradient_step)
    residual = BATCH['x'] @ weights.astype(np.float64) - BATCH['y']
    expected = weights - 1e-3 * 2 * BATCH['x'].T @ residual / len(residual)
    chex.assert_trees_all_close(
        step(parallel.replicate(weights), parallel.shard(BATCH)), expected.astype('f4'), rtol=1e-5
    )


def test_donation_gives_up_the_old_state_and_keeps_the_new():
    step = parallel.parallelize(gradient_step, donate_replicated=True)
    old = parallel.replicate(np.zeros(3, np.float32))
    new = step(old, parallel.shard(BATCH))
    newer = step(new, parallel.shard(BATCH))
    assert old.is_deleted()
    assert new.is_deleted()
    assert np.all(np.isfinite(newer))


def test_host_arrays_do_not_slip_into_the_step():
    step = parallel.parallelize(gradient_step)
    weights, batch = parallel.replicate(np.zeros(3, np.float32)), parallel.shard(BATCH)
    step(weights, batch)
    with jax.transfer_guard('disallow'):
        step(weights, batch)


def test_a_second_compilation_is_an_error():
    step = parallel.parallelize(gradient_step)
    weights = parallel.replicate(np.zeros(3, np.float32))
    step(weights, parallel.shard(BATCH))
    step(weights, parallel.shard(BATCH))
    with pytest.raises(RuntimeError, match=r'gradient_step would be compiled again.*\[1, 3\]'):
        step(weights, parallel.shard(jax.tree.map(lambda x: x[:4], BATCH)))


def test_local_batch_size():
    assert parallel.local_batch_size(64) == 64
    with pytest.raises(UsageError, match=r'batch_size=10 .* 4 devices: use 8 or 12'):
        parallel.local_batch_size(10)
    with pytest.raises(UsageError, match=r'use 4$'):
        parallel.local_batch_size(3)


def test_one_process_needs_no_others():
    assert parallel.describe_devices() == '4 devices'
    tree = {'w': np.float32([-0.0, np.nan]), 'n': jnp.int32(7)}
    chex.assert_trees_all_equal(parallel.broadcast(tree), tree)
    assert parallel.broadcast_json({'loss': [1, None]}) == {'loss': [1, None]}
    assert parallel.gather(np.uint32([3, 4])).tolist() == [[3, 4]]


def test_without_jit_every_call_is_traced_and_none_is_refused():
    def mean_step(weights, batch):
        return weights + jax.lax.pmean(batch['x'][0], parallel.AXIS)

    step = parallel.parallelize(mean_step)
    weights, batch = parallel.replicate(np.zeros(3, np.float32)), parallel.shard(BATCH)
    compiled = parallel.parallelize(mean_step)(weights, batch)
    with jax.disable_jit():
        for _ in range(2):
            chex.assert_trees_all_close(step(weights, batch), compiled, rtol=1e-5)
