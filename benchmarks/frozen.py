"""Measures one step of the runner: training everything, or the classifier alone.

    python -m benchmarks.frozen
    python -m benchmarks.frozen --model=NFNet-F0 --rho=0.05

The step is that of `experiments.train`, on synthetic images: augmentation, loss, gradient, AGC,
Nesterov momentum and the moving average. Rows, which take turns in one process:

    everything    all parameters are trained
    head only     as with freeze=body of configs/finetune.py

`processor` is the time of all the host's processors in seconds a step: compare it on a machine that
runs other programs. `memory` is what XLA allocates for the program, with its arguments, in MB.
"""

import argparse

import jax
import numpy as np

from benchmarks import timing
from configs.finetune import head_only
from experiments.config import default_config
from experiments.experiment import build
from experiments.launch import cli
from experiments.run import parallel
from experiments.train_step import init_state, make_train_step
from nfnets_jax import optimizers

GROUPS = {'everything': optimizers.PUBLISHED_GROUPS, 'head only': head_only()}


def prepare_step(groups: tuple, args: argparse.Namespace):
    """Returns (one training step, MB)."""
    config = default_config()
    with config.ignore_type():
        config.model = {'name': args.model}
        config.data = {
            'name': 'noise',
            'image_size': args.image_size,
            'classes': args.classes,
            'examples': max(args.batch, args.classes),
        }
        config.optimizer.groups = groups
    config.augment.flip = True
    config.batch_size, config.accumulate = args.batch, args.accumulate
    config.duration = '1000 steps'
    config.sam.rho = args.rho
    experiment = build(config)
    images = np.stack([experiment.train_source[i]['image'] for i in range(args.batch)])
    batch = parallel.shard(
        {
            'image': images,
            'label': np.arange(args.batch, dtype=np.int32) % args.classes,
            'position': np.arange(args.batch, dtype=np.int32),
            'stop': np.zeros(jax.device_count(), np.float32),
        }
    )
    state = parallel.replicate(init_state(experiment))
    compiled = make_train_step(experiment).lower(state, batch).compile()
    memory = compiled.memory_analysis()

    def run():
        nonlocal state
        state, metrics = compiled(state, batch)
        return state, metrics

    return run, (memory.temp_size_in_bytes + memory.argument_size_in_bytes) / 1e6


def main(argv=None):
    sizes = {'image_size': 64, 'batch': 16, 'classes': 10}
    options = {'model': 'NF-ResNet-50', **sizes, 'rho': 0.0, 'accumulate': 1, 'rounds': 5}
    args = timing.parser(__doc__, **options).parse_args(argv)

    prepared = {row: prepare_step(groups, args) for row, groups in GROUPS.items()}
    times = timing.in_turns({row: run for row, (run, _) in prepared.items()}, args.rounds)
    rows = [
        {
            'row': row,
            'step s': times[row].median,
            'processor': times[row].processor,
            'x everything': times[row].processor / times['everything'].processor,
            'memory': memory,
        }
        for row, (_, memory) in prepared.items()
    ]
    timing.report(f'{args.model}, {args.batch} x {args.image_size} px', vars(args), rows)


if __name__ == '__main__':
    with cli.guarded():
        main()
