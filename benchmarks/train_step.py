"""Measures one training step of a network, beside plain XLA convolutions and beside timm.

    python -m benchmarks.train_step --rows=ours,timm,'timm bare',plain
    python -m benchmarks.train_step --model=ResNet-20 --image-size=32 --batch=128 --rows=ours,torch

A step is loss, gradient, AGC, weight decay, Nesterov momentum and the moving average of the
parameters. Rows, which take turns in one process:

    ours            the implementations of convolution/table.py, computing in --dtype
    plain           XLA's own implementation of every convolution, also of grouped ones
    timm            eager, channels_last, with timm's AGC and moving average
    timm bare       the same without AGC, weight decay and moving average
    timm autocast   the whole step under bfloat16 autocast
    timm compiled   under torch.compile, with autocast if --dtype=bfloat16
    torch           a small ResNet or NF-ResNet on PyTorch: eager, channels_last, without AGC and
                    moving average
    bare            ours without AGC and moving average

Rows of packages that are not installed, or that lack the network, are left out. `processor` is the
time of all the host's processors in seconds a step: compare it on a machine that runs other
programs. `MFU` counts 3 x 2 operations a multiply-accumulate against the device's published
bfloat16 peak, or --peak-tflops. `memory` is what XLA allocates for the program, with its arguments,
in MB. Our rows run on one device, or with --cpu-devices=2 on two cores of a CPU as the runner does.
"""

import argparse
import time
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from benchmarks import peers, timing
from experiments.launch import allocator, cli
from experiments.run import accelerators, parallel
from nfnets_jax import adaptive_grad_clip, models
from nfnets_jax.convolution import conv

ROWS = ('ours', 'bare', 'plain', 'timm', 'timm bare', 'timm autocast', 'timm compiled', 'torch')


def our_step(model: str, batch: int, size: int, dtype: str, *, bare: bool = False):
    """Returns (one training step, seconds to compile, MB)."""
    num_classes = 10 if model in peers.SMALL else 1000
    options = {'cross_replica_axis': parallel.AXIS} if model.startswith('ResNet') else {}
    network = models.build(model, num_classes, **options)
    optimizer = optax.chain(
        optax.identity() if bare else adaptive_grad_clip(0.01),
        optax.add_decayed_weights(2e-5),
        optax.sgd(1e-3, momentum=0.9, nesterov=True),
    )
    images = jax.random.normal(jax.random.key(0), (batch, size, size, 3), dtype)
    labels = jnp.arange(batch) % num_classes

    def init(key):
        params, state = network.init(key, images[:1].astype(jnp.float32), True)
        average = () if bare else jax.tree.map(jnp.copy, params)
        return params, state, optimizer.init(params), average, key

    def step(train_state, examples):
        params, state, opt_state, average, key = train_state
        key, model_key = jax.random.split(key)

        def loss_fn(params):
            images, labels = examples
            outputs, new_state = network.apply(params, state, model_key, images, True)
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs['logits'], labels)
            return jnp.mean(losses), new_state

        gradients, state = jax.grad(loss_fn, has_aux=True)(params)  # The state is synchronized.
        gradients = jax.lax.pmean(gradients, parallel.AXIS)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        average = () if bare else optax.incremental_update(params, average, 1e-4)
        return params, state, opt_state, average, key

    train_state = parallel.replicate(jax.jit(init)(jax.random.key(1)))
    examples = parallel.shard((images, labels))
    start = time.perf_counter()
    compiled = parallel.parallelize(step, donate_replicated=True).lower(train_state, examples)
    compiled = compiled.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()

    def run():
        nonlocal train_state
        train_state = compiled(train_state, examples)
        return train_state

    return run, seconds, (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 1e6


def prepare(row: str, args: argparse.Namespace):
    """Returns (one training step, seconds to compile, MB or None) of a row."""
    if row in ('ours', 'bare'):
        bare = row == 'bare'
        return our_step(args.model, args.batch, args.image_size, args.dtype, bare=bare)
    if row == 'torch':
        return *peers.small_train_step(args.model, args.batch, args.image_size), None
    if row == 'plain':
        with mock.patch.object(conv, 'TABLE', {}):
            return our_step(args.model, args.batch, args.image_size, args.dtype)
    compiled = row == 'timm compiled'
    step = peers.train_step(
        args.model,
        args.batch,
        args.image_size,
        autocast=row == 'timm autocast' or (compiled and args.dtype == 'bfloat16'),
        compiled=compiled,
        bare=row == 'timm bare',
    )
    return *step, None


def main(argv=None):
    parser = timing.parser(__doc__, model='NFNet-F0', image_size=96, batch=8, rounds=5)
    parser.add_argument(
        '--dtype', default='float32', choices=['float32', 'bfloat16'], help='default: float32'
    )
    parser.add_argument('--rows', default='ours,plain,timm,timm bare', help=','.join(ROWS))
    parser.add_argument('--peak-tflops', type=float, help='of the device, for MFU')
    parser.add_argument('--cpu-devices', type=int, default=1, help='cores that our rows share')
    parser.add_argument('--keep-memory', action='store_true', help='as experiments.train has it')
    args = parser.parse_args(argv)
    if args.keep_memory:
        allocator.keep_memory()
    wanted = args.rows.split(',')
    if unknown := set(wanted) - set(ROWS):
        parser.error(f'--rows: {", ".join(unknown)} is not one of {", ".join(ROWS)}')
    if args.cpu_devices > 1:
        jax.config.update('jax_num_cpu_devices', args.cpu_devices)
    wanted = [
        row
        for row in wanted
        if not row.startswith(('timm', 'torch')) or peers.available(args.model, row)
    ]

    with parallel.using(jax.local_devices()[: args.cpu_devices]):
        prepared = {row: prepare(row, args) for row in wanted}
    times = timing.in_turns({row: run for row, (run, *_) in prepared.items()}, args.rounds)

    peak = args.peak_tflops * 1e12 if args.peak_tflops else None
    peak = peak or accelerators.peak_flops(jax.devices()[0].device_kind)
    operations = 6 * models.model_cost(args.model).macs(args.image_size) * args.batch
    first = times[wanted[0]]
    rows = [
        {
            'row': row,
            'images/s': args.batch / times[row].best,
            'median': args.batch / times[row].median,
            f'x {wanted[0]}': first.median / times[row].median,
            'step s': times[row].median,
            'processor': times[row].processor,
            'GFLOP/s': operations / times[row].best / 1e9,
            'MFU %': 100 * operations / times[row].best / peak if peak else None,
            'compile s': compile_seconds,
            'memory': memory,
        }
        for row, (_, compile_seconds, memory) in prepared.items()
    ]
    title = f'{args.model}, {args.batch} x {args.image_size} px, {args.dtype}'
    timing.report(title, vars(args), rows)


if __name__ == '__main__':
    with cli.guarded():
        main()
