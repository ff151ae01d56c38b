"""Measures inference: throughput of a batch and latency of one image, beside timm.

    python -m benchmarks.inference
    python -m benchmarks.inference --model=NFNet-F0 --image-size=192 --dtype=bfloat16

Rows, which take turns in one process:

    ours            weights standardized in each call, as in training's evaluations
    folded          weights standardized once, as in what experiments.export writes
    timm            eager, channels_last; it standardizes in each call
    timm autocast   the same under bfloat16 autocast

Without timm its rows are left out. Latency is of a batch of one.
"""

import argparse
import contextlib
import functools
import time

import haiku as hk
import jax
import jax.numpy as jnp

from benchmarks import peers, timing
from experiments.launch import cli
from nfnets_jax.convolution import conv
from nfnets_jax.weights import export, pretrained


def our_logits(model: str, batch: int, size: int, dtype: str, *, folded: bool):
    """Returns (one batch of logits, seconds to compile)."""
    network = pretrained.network(pretrained.Metadata(model=model, num_classes=1000))
    images = jax.random.normal(jax.random.key(0), (batch, size, size, 3), dtype)
    init = functools.partial(network.init, is_training=False)
    params, state = jax.jit(init)(jax.random.key(1), images.astype(jnp.float32))
    folding: contextlib.AbstractContextManager = contextlib.nullcontext()
    if folded:
        interceptor = functools.partial(export.convolve_folded, conv.conv2d)
        folding = hk.intercept_methods(interceptor)
        params = jax.tree.map(lambda x: jnp.asarray(x, dtype), export.fold_standardization(params))

    def forward(params, state, images):
        with folding:
            return network.apply(params, state, None, images, False)[0]['logits']

    start = time.perf_counter()
    compiled = jax.jit(forward).lower(params, state, images).compile()
    seconds = time.perf_counter() - start
    return functools.partial(compiled, params, state, images), seconds


def prepare(row: str, batch: int, args: argparse.Namespace):
    """Returns (one batch of logits, seconds to compile) of a row."""
    if row in ('ours', 'folded'):
        folded = row == 'folded'
        return our_logits(args.model, batch, args.image_size, args.dtype, folded=folded)
    autocast = row == 'timm autocast'
    return peers.inference(args.model, batch, args.image_size, autocast=autocast, compiled=False)


def main(argv=None):
    parser = timing.parser(__doc__, model='NFNet-F0', image_size=96, batch=8, rounds=5)
    parser.add_argument(
        '--dtype', default='float32', choices=['float32', 'bfloat16'], help='default: float32'
    )
    args = parser.parse_args(argv)

    names = ['ours', 'folded']
    if peers.available(args.model, 'timm'):
        names += ['timm', 'timm autocast']
    prepared = {
        (name, batch): prepare(name, batch, args) for name in names for batch in (args.batch, 1)
    }
    times = timing.in_turns({key: run for key, (run, _) in prepared.items()}, args.rounds)
    rows = []
    for name in names:
        whole, one = times[name, args.batch], times[name, 1]
        rows.append(
            {
                'row': name,
                'images/s': args.batch / whole.best,
                'median': args.batch / whole.median,
                'x ours': times['ours', args.batch].median / whole.median,
                'processor': whole.processor,
                'latency ms': 1e3 * one.best,
                'median ms': 1e3 * one.median,
                'compile s': prepared[name, args.batch][1],
            }
        )
    title = f'{args.model}, {args.batch} x {args.image_size} px, {args.dtype}'
    timing.report(title, vars(args), rows)


if __name__ == '__main__':
    with cli.guarded():
        main()
