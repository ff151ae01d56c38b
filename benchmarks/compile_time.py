"""Measures how long a training step takes to compile, with and without a scan over equal blocks.

    python -m benchmarks.compile_time
    python -m benchmarks.compile_time --models=NFNet-F0,NFNet-F6 --image-size=32

The step is the loss and its gradient on two images. Lowering (Python and JAX, down to StableHLO)
and compilation (XLA) are separate; nothing is run, and no compilation cache is used. Seconds are
CPU time, which a busy machine changes least, except for `wall clock`. `x first` compares
`together` with the first model's.
"""

import itertools
import time

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from benchmarks import timing
from experiments.launch import cli
from nfnets_jax import create_model


def main(argv=None):
    models = 'NFNet-F0,NFNet-F3,NFNet-F6'
    args = timing.parser(__doc__, models=models, batch=2, image_size=64).parse_args(argv)

    jax.config.update('jax_enable_compilation_cache', False)
    rows: list[dict] = []
    names = args.models.split(',')
    for scan, name in itertools.product((True, False), names):
        seconds = compile_seconds(name, scan, args.batch, args.image_size)
        rows.append({'model': name, 'scan': scan, **seconds})
        first = rows[0 if scan else len(names)]['together']
        rows[-1]['x first'] = seconds['together'] / first
    title = f'seconds of value_and_grad, {args.batch} x {args.image_size} px'
    timing.report(title, vars(args), rows)


def compile_seconds(name: str, scan: bool, batch: int, image_size: int) -> dict[str, float]:
    """Returns the seconds that compiling one training step takes."""
    network = hk.transform_with_state(
        lambda images: create_model(name, 1000, scan=scan)(images, True)['logits']
    )
    images = jax.ShapeDtypeStruct((batch, image_size, image_size, 3), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, state = jax.eval_shape(network.init, key, images)

    def loss_fn(params, state, key, images):
        logits, state = network.apply(params, state, key, images)
        labels = jnp.arange(batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), state

    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    wall, begun = time.perf_counter(), time.process_time()
    lowered = step.lower(params, state, key, images)
    halfway = time.process_time()
    lowered.compile()
    done = time.process_time()
    return {
        'lower': halfway - begun,
        'compile': done - halfway,
        'together': done - begun,
        'wall clock': time.perf_counter() - wall,
    }


if __name__ == '__main__':
    with cli.guarded():
        main()
