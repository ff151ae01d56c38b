"""Measures the gradient of SAM against the plain gradient, by the share of the batch that climbs.

    python -m benchmarks.sam
    python -m benchmarks.sam --model=NFNet-F0 --batch=8

The ascent costs its fraction of a plain gradient plus one pass over the parameters.
"""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from benchmarks import timing
from experiments.launch import cli
from nfnets_jax import create_model, sam_value_and_grad

FRACTIONS = (0.2, 0.5, 1.0)


def main(argv=None):
    parser = timing.parser(__doc__, model='NF-ResNet-50', batch=20, image_size=64, rounds=5)
    args = parser.parse_args(argv)

    net = hk.transform_with_state(
        lambda images: create_model(args.model, 1000)(images, True)['logits']
    )
    shape = (args.batch, args.image_size, args.image_size, 3)
    images = jax.random.normal(jax.random.key(0), shape)
    batch = {'image': images, 'label': jnp.arange(args.batch)}
    params, state = jax.jit(net.init)(jax.random.key(1), batch['image'])

    def loss_fn(params, batch, key):
        logits, _ = net.apply(params, state, key, batch['image'])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']).mean()

    key = jax.random.key(2)
    sam = functools.partial(sam_value_and_grad, loss_fn, 0.05)
    steps = {'plain': jax.value_and_grad(loss_fn)}
    steps |= {f'SAM, ascent on {f:.0%}': sam(ascent_fraction=f) for f in FRACTIONS}
    steps = {name: jax.jit(f).lower(params, batch, key).compile() for name, f in steps.items()}

    times = timing.in_turns(
        {name: functools.partial(step, params, batch, key) for name, step in steps.items()},
        args.rounds,
    )
    rows = [
        {
            'row': name,
            'ms': 1e3 * row.best,
            'median': 1e3 * row.median,
            'x plain': row.median / times['plain'].median,
            'processor ms': 1e3 * row.processor,
        }
        for name, row in times.items()
    ]
    timing.report(f'{args.model}, {args.batch} x {args.image_size} px', vars(args), rows)


if __name__ == '__main__':
    with cli.guarded():
        main()
