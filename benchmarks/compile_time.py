"""Measures how long a training step takes to compile, with and without a scan over equal blocks.

    python -m benchmarks.compile_time [--models=NFNet-F0,NFNet-F3,NFNet-F6] [--image-size=64]

The step is the loss and its gradient on two pictures. Lowering (Python and JAX, down to StableHLO)
and compilation (XLA) are separate; nothing is run, and no compilation cache is used. Seconds are
of CPU time, which a busy machine changes least; the last column but one is the wall clock's.
"""

import argparse
import itertools
import time

import haiku as hk
import jax
import jax.numpy as jnp
import optax

import nfnets_jax
from benchmarks import timing
from experiments.launch import cli
from nfnets_jax import files


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', default='NFNet-F0,NFNet-F3,NFNet-F6')
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--image-size', type=int, default=64)
    parser.add_argument('--json', type=files.expand, help='where to write the table as JSON')
    args = parser.parse_args(argv)

    jax.config.update('jax_enable_compilation_cache', False)
    rows = []
    settings = timing.about(**vars(args))
    print(f'value_and_grad, {args.batch} x {args.image_size} px, {settings["device"]}')
    columns = ('lower', 'compile', 'together', 'wall clock')
    print(f'{"":24}' + ''.join(f'{column:>12}' for column in columns) + f'{"x first":>10}')
    names = args.models.split(',')
    for scan, name in itertools.product((True, False), names):
        row = {'model': name, 'scan': scan} | measure(name, scan, args.batch, args.image_size)
        rows.append(row)
        seconds = ''.join(f'{row[column]:10.1f} s' for column in columns)
        ratio = row['together'] / rows[0 if scan else len(names)]['together']
        print(f'{name + (", scan" if scan else ""):24}{seconds}{ratio:10.2f}', flush=True)
    timing.write(args.json, settings, rows)


def measure(name: str, scan: bool, batch: int, image_size: int) -> dict[str, float]:
    """Returns the seconds of one training step's compilation."""
    network = hk.transform_with_state(
        lambda images: nfnets_jax.create_model(name, 1000, scan=scan)(images, True)['logits']
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
