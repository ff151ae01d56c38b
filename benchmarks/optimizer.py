"""Measures the optimizer's update of an NFNet-F0: momentum SGD alone, after AGC, after optax's AGC.

    python -m benchmarks.optimizer [--model=NFNet-F0] [--repeats=15] [--json=FILE]

They take turns in one process, compiled with donated parameters and state. Momentum SGD must read
the parameters, the gradient and the momentum and write two of them back: 5 passes, the floor. AGC
must know the norms of a unit before it can scale its first number, so that what does not stay in a
cache between is read twice: 2 passes more. What these cost at least is measured, too: 'equation 3
alone' takes the norms without care for their range and counts nothing, and on a CPU 'BLAS dot' only
reads p and g, as fast as a library written for the processor can.

XLA's count of bytes takes every operation's operands as read from memory, cached or not. `CPU ms`
is the least time on the host's processors, all of them together: on a CPU it is the figure to
compare when other programs run beside.
"""

import argparse
import json
import platform
import statistics
import time

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nfnets_jax
from nfnets_jax import unit_axes


def equation_3(clipping=0.01, eps=1e-3):
    """AGC with nothing around it: the least that XLA can be asked for."""

    def clip(grad, param):
        axes = unit_axes.by_rank('', param)
        norm, grad_norm = (jnp.sqrt(jnp.sum(x * x, axes, keepdims=True)) for x in (param, grad))
        bound = clipping * jnp.maximum(norm, eps)
        return grad * jnp.where(grad_norm <= bound, 1, bound / grad_norm)

    return optax.stateless(lambda grads, params: jax.tree.map(clip, grads, params))


# name: (what comes before momentum SGD, passes over a copy of the parameters that it cannot avoid)
CHAINS = {
    'momentum SGD': (optax.identity(), 5),
    'optax AGC + momentum SGD': (optax.adaptive_grad_clip(0.01), 7),
    'AGC + momentum SGD': (nfnets_jax.adaptive_grad_clip(0.01), 7),
    'equation 3 alone + momentum SGD': (equation_3(), 7),
}


def parameter_shapes(model):
    """The shapes of a model's parameters, which do not depend on the size of its images."""
    net = hk.transform_with_state(lambda images: nfnets_jax.create_model(model, 1000)(images, True))
    params, _ = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    return params


def normal(shapes, scale, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * random.standard_normal(leaf.shape, np.float32)), shapes
    )


def prepare(name, shapes):
    """Returns (step, arguments, what the compiler says)."""
    tx = optax.chain(CHAINS[name][0], optax.sgd(0.1, momentum=0.9, nesterov=True))

    def step(params, state, grads):
        updates, new_state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), new_state

    # Gradients of which about half the units are over the bound.
    params, grads = normal(shapes, 0.05, 1), normal(shapes, 5e-4, 2)
    state = tx.init(params)
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile()
    facts = {
        'compile_s': time.perf_counter() - start,
        'xla_gb': compiled.cost_analysis().get('bytes accessed', float('nan')) / 1e9,
        'scratch_mb': compiled.memory_analysis().temp_size_in_bytes / 1e6,
    }
    return compiled, [params, state, grads], facts


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='NFNet-F0')
    parser.add_argument('--repeats', type=int, default=15)
    parser.add_argument('--json', help='where to write the table as JSON')
    args = parser.parse_args(argv)

    shapes = parameter_shapes(args.model)
    copy_gb = 4e-9 * sum(leaf.size for leaf in jax.tree.leaves(shapes))
    runs = {name: prepare(name, shapes) for name in CHAINS}
    times = {name: [] for name in CHAINS}
    cpu_times = {name: [] for name in CHAINS}
    read_times = []
    for _ in range(args.repeats + 1):  # In turns; the first turn is not counted.
        for name, (step, arguments, _) in runs.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            arguments[:2] = jax.block_until_ready(step(*arguments))
            times[name].append(1e3 * (time.perf_counter() - start))
            cpu_times[name].append(1e3 * (time.process_time() - cpu_start))
        if jax.default_backend() == 'cpu':
            params, _, grads = next(iter(runs.values()))[1]
            arrays = [np.asarray(x).ravel() for x in jax.tree.leaves((params, grads))]
            cpu_start = time.process_time()
            for x in arrays:
                np.dot(x, x)
            read_times.append(1e3 * (time.process_time() - cpu_start))

    rows = {}
    for name, (_, arguments, facts) in runs.items():
        best = min(times[name][1:])
        cpu = min(cpu_times[name][1:])
        rows[name] = facts | {
            'ms': best,
            'median_ms': statistics.median(times[name][1:]),
            'cpu_ms': cpu,
            'cpu_times_sgd': cpu / min(cpu_times['momentum SGD'][1:]),
            'floor_gb': CHAINS[name][1] * copy_gb,
            'gb_per_s': CHAINS[name][1] * copy_gb / best * 1e3,
            'times_sgd': best / min(times['momentum SGD'][1:]),
            'times_sgd_floor': CHAINS[name][1] / CHAINS['momentum SGD'][1],
            'clipped_fraction': float(optax.tree.get(arguments[1], 'clipped_fraction', jnp.nan)),
        }
    device = jax.devices()[0]
    print(f'{args.model}, {copy_gb / 4:.3f}e9 parameters, float32, {device.device_kind}')
    print(
        f'{"":31} {"ms":>7} {"median":>7} {"x SGD":>6} {"floor":>6} {"CPU ms":>6} {"x SGD":>6} '
        f'{"GB":>5} {"GB/s":>5} {"XLA GB":>6} {"scratch MB":>10} {"compile s":>9}'
    )
    for name, row in rows.items():
        print(
            f'{name:31} {row["ms"]:7.1f} {row["median_ms"]:7.1f} {row["times_sgd"]:6.2f} '
            f'{row["times_sgd_floor"]:6.2f} {row["cpu_ms"]:6.0f} {row["cpu_times_sgd"]:6.2f} '
            f'{row["floor_gb"]:5.2f} {row["gb_per_s"]:5.1f} {row["xla_gb"]:6.2f} '
            f'{row["scratch_mb"]:10.1f} {row["compile_s"]:9.1f}'
        )
    if read_times:
        sgd, read = rows['momentum SGD']['cpu_ms'], min(read_times[1:])
        print(
            f'BLAS dot of p and of g: {read:.0f} ms of CPU; with it, momentum SGD would take '
            f'{(sgd + read) / sgd:.2f} x its own time'
        )
    if args.json:
        about = {
            'model': args.model,
            'device': device.device_kind,
            'machine': platform.machine(),
            'jax': jax.__version__,
            'optax': optax.__version__,
        }
        with open(args.json, 'w') as file:
            json.dump(about | {'rows': rows}, file, indent=2)


if __name__ == '__main__':
    main()
