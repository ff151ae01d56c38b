"""Measures a step's cost on the host, by the number of leaves of the training state.

    python -m benchmarks.dispatch
    python -m benchmarks.dispatch --leaves=900 --rounds=50

The step adds one to small leaves, so almost all of its time is dispatch: an F0's state has about
900 leaves (parameters, momentum, average), an F7's six times as many. Rows:

    runner    `parallel.parallelize`: one copy of the state for all devices, donated
    stacked   jax.pmap over states with a leading device axis, as in older code
    jit       jax.jit on one device

Columns: milliseconds until the call returns, how much of that the thread spent on a processor
(which other programs do not lengthen), and milliseconds until the work is done. A CPU may do small
work within the call.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from benchmarks import timing
from experiments.launch import cli
from experiments.run import parallel


def step_seconds(row: str, leaves: int, rounds: int) -> tuple[float, float, float]:
    """Returns median seconds of a step: until the call returns, of its thread, until it is done."""
    state = {str(i): jnp.full(8, i, jnp.float32) for i in range(leaves)}
    devices = jax.local_device_count()

    def step(state, batch):
        return jax.tree.map(lambda x: x + batch[0], state)

    if row == 'runner':
        state, batch = parallel.replicate(state), parallel.shard(jnp.ones(devices))
        run = parallel.parallelize(step, donate_replicated=True)
    elif row == 'stacked':
        state = jax.tree.map(lambda x: jnp.stack([x] * devices), state)
        batch = jnp.ones((devices, 1))
        run = jax.pmap(step, axis_name=parallel.AXIS, donate_argnums=0)
    else:
        batch, run = jnp.ones(1), jax.jit(step, donate_argnums=0)
    state = jax.block_until_ready(run(state, batch))
    returned, spent, done = [], [], []
    for _ in range(rounds):
        start, thread_start = time.perf_counter(), time.thread_time()
        state = run(state, batch)
        spent.append(time.thread_time() - thread_start)
        returned.append(time.perf_counter() - start)
        jax.block_until_ready(state)
        done.append(time.perf_counter() - start)
    return statistics.median(returned), statistics.median(spent), statistics.median(done)


def main(argv=None):
    args = timing.parser(__doc__, leaves='100,300,900', rounds=20).parse_args(argv)
    rows = []
    for row in ('runner', 'stacked', 'jit'):
        for leaves in map(int, args.leaves.split(',')):
            seconds = step_seconds(row, leaves, args.rounds)
            names = ('call ms', 'processor ms', 'done ms')
            cells = {name: 1e3 * x for name, x in zip(names, seconds, strict=True)}
            rows.append({'row': row, 'leaves': leaves, **cells})
    devices = jax.local_device_count()
    timing.report(f'devices: {devices}', vars(args) | {'devices': devices}, rows)


if __name__ == '__main__':
    with cli.guarded():
        main()
