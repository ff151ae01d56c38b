"""Measures the optimizer's update of an NFNet-F0: momentum SGD alone, after AGC, after optax's AGC.

    python -m benchmarks.optimizer
    python -m benchmarks.optimizer --model=NF-ResNet-50 --rounds=30

They take turns in one process, compiled with donated parameters and state. Momentum SGD must read
the parameters, the gradient and the momentum and write two of them back: 5 passes, the floor. AGC
needs the norms of a unit before it can scale its first number, so that data that do not stay in a
cache are read twice: 2 more passes. Two rows measure the least that these cost: 'equation 3 alone'
computes the norms without care for their range and counts nothing, and on a CPU 'BLAS dot' only
reads p and g, as fast as a library written for the processor can.

XLA's count of bytes assumes that every operation reads its operands from memory, cached or not.
`processor` is the time of all the host's processors: compare it on a CPU that runs other programs.
`x SGD` compares the best times.
"""

import time

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing
from experiments.launch import cli
from nfnets_jax import adaptive_grad_clip, create_model, unit_axes


def equation_3(clipping=0.01, eps=1e-3):
    """Returns AGC reduced to its equation, the least work for XLA."""

    def clip(grad, param):
        axes = unit_axes.by_rank('', param)
        norm, grad_norm = (jnp.sqrt(jnp.sum(x * x, axes, keepdims=True)) for x in (param, grad))
        bound = clipping * jnp.maximum(norm, eps)
        return grad * jnp.where(grad_norm <= bound, 1, bound / grad_norm)

    return optax.stateless(lambda grads, params: jax.tree.map(clip, grads, params))


# name: (transformation before momentum SGD, least number of passes over a copy of the parameters)
CHAINS = {
    'momentum SGD': (optax.identity(), 5),
    'optax AGC + momentum SGD': (optax.adaptive_grad_clip(0.01), 7),
    'AGC + momentum SGD': (adaptive_grad_clip(0.01), 7),
    'equation 3 alone + momentum SGD': (equation_3(), 7),
}

FACTS = ('XLA GB', 'scratch MB', 'compile s')


def parameter_shapes(model):
    """Returns the shapes of a model's parameters, which do not depend on the size of its images."""
    net = hk.transform_with_state(lambda images: create_model(model, 1000)(images, True))
    params, _ = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    return params


def normal(shapes, scale, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(scale * random.standard_normal(leaf.shape, np.float32)), shapes
    )


def prepare(chain, shapes):
    """Returns (one update, the compiler's figures by `FACTS`)."""
    tx = optax.chain(chain, optax.sgd(0.1, momentum=0.9, nesterov=True))

    def step(params, state, grads):
        updates, new_state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), new_state

    # With these scales, about half the units of the gradient are over the bound.
    params, grads = normal(shapes, 0.05, 1), normal(shapes, 5e-4, 2)
    state = tx.init(params)
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile()
    seconds = time.perf_counter() - start
    accessed = compiled.cost_analysis().get('bytes accessed', float('nan'))
    scratch = compiled.memory_analysis().temp_size_in_bytes
    facts = dict(zip(FACTS, (accessed / 1e9, scratch / 1e6, seconds), strict=True))

    def run():
        nonlocal params, state
        params, state = compiled(params, state, grads)
        return params

    return run, facts


def read_with_blas(shapes):
    """Returns a function that computes the inner product of each array with itself."""
    trees = normal(shapes, 0.05, 1), normal(shapes, 5e-4, 2)
    arrays = [np.asarray(x).ravel() for x in jax.tree.leaves(trees)]
    return lambda: [np.dot(x, x) for x in arrays]


def main(argv=None):
    args = timing.parser(__doc__, model='NFNet-F0', rounds=15).parse_args(argv)

    shapes = parameter_shapes(args.model)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    copy_gb = 4e-9 * parameters
    prepared = {name: prepare(chain, shapes) for name, (chain, _) in CHAINS.items()}
    runs = {name: run for name, (run, _) in prepared.items()}
    if jax.default_backend() == 'cpu':
        runs['BLAS dot'] = read_with_blas(shapes)
    times = timing.in_turns(runs, args.rounds)

    sgd, sgd_passes = times['momentum SGD'], CHAINS['momentum SGD'][1]
    rows = []
    for name, row in times.items():
        passes = CHAINS[name][1] if name in CHAINS else 2
        measured = {
            'row': name,
            'ms': 1e3 * row.best,
            'median': 1e3 * row.median,
            'x SGD': row.best / sgd.best,
            'floor': passes / sgd_passes,
            'processor ms': 1e3 * row.processor,
            'processor x SGD': row.processor / sgd.processor,
            'GB': passes * copy_gb,
            'GB/s': passes * copy_gb / row.best,
        }
        facts = prepared[name][1] if name in CHAINS else dict.fromkeys(FACTS)
        rows.append(measured | facts)
    timing.report(f'{args.model}, {parameters:,} parameters, float32', vars(args), rows)


if __name__ == '__main__':
    with cli.guarded():
        main()
