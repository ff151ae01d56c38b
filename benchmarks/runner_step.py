"""Measures the runner's own training step and evaluation on this machine's devices.

    python -m benchmarks.runner_step
    python -m benchmarks.runner_step --model=NFNet-F1 --rows=64 --set=data.image_size=224

The programs are those of the published recipe, with AGC, decay, Nesterov, moving average and, in
the first row, the published augmentation. Images are made, and lie on the devices: nothing is
decoded. `share` is the row's part of the first row's time, so 1 less that of `not augmented` is the
share of the augmentation. `GB` is what the compiler needs, `GB peak` what the device had allocated
at most by the end of the benchmark, where it tells.

With --target=H100:1 the training steps are also compiled as experiments.preflight compiles them:
`kernels` and `GB moved` of a step, and `bound ms`, the time that the device's memory or arithmetic
needs for it at the least.
"""

import ast
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import programs, timing
from experiments import preflight, train_step
from experiments.experiment import Experiment, build
from experiments.launch import cli
from experiments.run import parallel, planned_data, targets
from experiments.run.batches import eval_batch_size


def main(argv=None):
    parser = timing.parser(__doc__, model='NFNet-F0', rows=32, rounds=5)
    parser.add_argument('--set', action='append', default=[], help='KEY=VALUE in the config')
    parser.add_argument('--target', help='as experiments.preflight takes it')
    args = parser.parse_args(argv)
    batch_size = args.rows * jax.local_device_count()
    changes = {
        key: ast.literal_eval(value) for key, _, value in (x.partition('=') for x in args.set)
    }
    configs = {}
    for row, augment in (('training', True), ('not augmented', False)):
        configs[row] = programs.published_config(args.model, batch_size, augment)
        configs[row] = preflight.with_changes(configs[row], changes)
    configs['training'].eval.batch_size = batch_size
    prepared, sizes, images = {}, {}, {}
    for row, config in configs.items():
        experiment = build(
            config, open_source=functools.partial(planned_data.open_source, **programs.PLAN)
        )
        steps = train_step.compile_programs(experiment, {})
        prepared[row], sizes[row] = train(experiment, steps)
        images[row] = batch_size
        if row == 'training':
            prepared['evaluation'], sizes['evaluation'] = evaluate(experiment, steps)
            images['evaluation'] = eval_batch_size(experiment)
    times = timing.in_turns(prepared, args.rounds, seconds=5)
    said = {row: compiled(config, args.target) for row, config in configs.items()}
    stats = jax.local_devices()[0].memory_stats() or {}
    rows = [
        {
            'row': row,
            'ms': 1e3 * times[row].median,
            'share': times[row].median / times['training'].median,
            'images/s': images[row] / times[row].median,
            'GB': sizes[row] / 1e9,
            'GB peak': stats['peak_bytes_in_use'] / 1e9 if stats else None,
            **{key: said.get(row, {}).get(key) for key in ('kernels', 'GB moved', 'bound ms')},
        }
        for row in prepared
    ]
    timing.report(f'{args.model}, {args.rows} images a device', vars(args), rows)


def train(experiment: Experiment, steps: train_step.Programs) -> tuple[Callable[[], Any], int]:
    """Returns (a training step, bytes that its program needs on a device)."""
    batch = made(preflight.train_batch(experiment))
    state = parallel.replicate(train_step.init_state(experiment))
    step = steps.train_step.lower(state, batch).compile()

    def run():
        nonlocal state
        state, _ = step(state, batch)
        return state

    return run, needed(step)


def evaluate(experiment: Experiment, steps: train_step.Programs) -> tuple[Callable[[], Any], int]:
    """Returns (an evaluation of a batch, bytes that its program needs on a device)."""
    variables = parallel.replicate(train_step.init_state(experiment).variables())
    batch = made(preflight.eval_batch(experiment))
    step = steps.eval_step.lower(variables, batch).compile()
    return functools.partial(step, variables, batch), needed(step)


def made(shapes: Any) -> Any:
    """Returns a batch on the devices: random bytes for images, zeros for everything else."""
    rng = np.random.default_rng(0)

    def array(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        if shape.dtype == np.uint8:
            return rng.integers(0, 256, shape.shape, np.uint8)
        return np.zeros(shape.shape, shape.dtype)

    flat = jax.tree.map(lambda x: array(x).reshape(-1, *x.shape[2:]), shapes)
    return parallel.shard(flat)


def needed(step: jax.stages.Compiled) -> int:
    """Returns the bytes of a program's arguments and temporaries."""
    memory = step.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def compiled(config: ConfigDict, target: str | None) -> dict[str, float]:
    """Returns what preflight says of a training step; {} without a target."""
    if target is None:
        return {}
    opened = targets.open_target(target)
    report = preflight.preflight(config, opened, programs.PLAN, preflight.Progress(target))
    bound = max(report['arithmetic_seconds'], report.get('memory_seconds', 0.0))
    return {
        'kernels': report.get('kernels'),
        'GB moved': report['bytes_accessed'] / 1e9 if 'bytes_accessed' in report else None,
        'bound ms': 1e3 * bound,
    }


if __name__ == '__main__':
    with cli.guarded():
        main()
