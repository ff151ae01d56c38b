"""Compiles a run for TPUs or GPUs that this machine lacks, and reports what it would cost there.

    pip install 'nfnets_jax[tpu]' 'nfnets_jax[cuda]'
    python -m experiments.preflight --config=configs/imagenet/nfnet.py:F0 --target=v5e:16x16
    python -m experiments.preflight --config=configs/digits.py --target=v5e:2x2,H100:8

The compilers of these devices work on a CPU. They compile the runner's own training step and
evaluation. The report says whether these compile and fit, what devices exchange, and where the time
goes. Times are estimates of the TPU's compiler, not measurements; docs/preflight.md explains them.
ImageNet and CIFAR need not be on this machine; for other data that are not, give --examples and
--classes.

If the training step does not fit, the command searches for the cheapest of accumulation, scan and
remat that makes it fit. Compiled programs are cached, so a second call is quick.
"""

import collections
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import scaling, train_step
from experiments.experiment import Experiment, build
from experiments.launch import cli
from experiments.run import compiled_text, parallel, planned_data, smoke, step_parts, targets
from experiments.run.batches import eval_batch_size
from experiments.run.compiled_text import Instruction, Program
from experiments.run.targets import Compiled, Target, compile_program
from experiments.run.throughput import flops_per_image
from nfnets_jax import files, models
from nfnets_jax.errors import UsageError
from nfnets_jax.image_size import height_width

# Estimated over measured time on a TPU v3, for the authors' own code: 0.82 for F0 at 192 px and for
# F1 at 224 px, 32 examples a core. The NFNets paper (2102.06171) measured.
MEASURED_SHARE = 0.82
DEAREST = 10  # operations to list
LEAST_ROWS = 8  # examples that a device takes at once, as long as there is another way

Waiting = Callable[[str, float], None]  # (program, seconds of compiling so far)


def preflight(config: ConfigDict, target: Target, plan: Mapping, waiting: Waiting) -> dict:
    """Returns the report of one target; docs/preflight.md describes its fields.

    If the training step does not fit, 'flags' holds the cheapest flags that make it fit, if there
    are any, and 'with_flags' the report with them.

    Args:
      config: as in `experiments.config.default_config`.
      target: what to compile for.
      plan: examples and classes, see `planned_data.open_source`.
      waiting: called every second of compiling.

    Raises:
      UsageError: a mistake in the config, or a batch that does not split over the devices.
    """
    advice = '; or plan without: give --examples and --classes'
    open_source = functools.partial(planned_data.open_source, advice=advice, **plan)
    with parallel.using(target.devices):
        if config.get('smoke'):
            config = smoke.shrink(config)
        experiment = build(config, open_source=open_source)
        report = _examine(experiment, target, waiting)
        state = _nbytes(_state(experiment))
        # Bytes besides the state if all examples are taken at once, by kind of step.
        known = {'': (_needed(report) - state) * config.accumulate}
        for changes in [] if report['fits'] else _cheaper(experiment):
            kind = ' '.join(key for key in changes if key != 'accumulate')
            parts = changes.get('accumulate', config.accumulate)
            if state + known.get(kind, 0) / parts > target.memory:
                continue
            changed = build(with_changes(config, changes), open_source=open_source)
            found = _examine(changed, target, waiting)
            if found['fits']:
                flags = [f'--config.{key}={str(value).lower()}' for key, value in changes.items()]
                return report | {'flags': flags, 'with_flags': found}
            known[kind] = (_needed(found) - state) * parts
    return report


def _cheaper(experiment: Experiment) -> Iterator[dict[str, Any]]:
    """Yields changes to a config that save memory, from what costs the least time."""
    config = experiment.config
    rows = config.batch_size // parallel.device_count()
    parts = [n for n in range(config.accumulate + 1, rows + 1) if rows % n == 0]
    few = [n for n in parts if rows // n >= LEAST_ROWS]
    known = models.model_options(config.model.name)
    free = {
        option for option in ('scan', 'remat') if option in known and not config.model.get(option)
    }
    yield from ({'accumulate': n} for n in few)
    if 'scan' in free:
        yield {'model.scan': True}
        yield from ({'accumulate': n, 'model.scan': True} for n in few)
    if 'remat' in free:
        yield {'model.remat': True}
    kept = {'model.remat': True} if 'remat' in free else {}
    yield from ({'accumulate': n} | kept for n in parts)


def with_changes(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """Returns a copy of a config in which every key, such as 'model.scan', has its new value."""
    config = config.copy_and_resolve_references().unlock()
    for key, value in changes.items():
        node, _, option = key.rpartition('.')
        (config[node] if node else config)[option] = value
    return config


def _examine(experiment: Experiment, target: Target, waiting: Waiting) -> dict:
    """Returns the report; that of the evaluation only if the training step fits."""
    programs = train_step.compile_programs(experiment, {})
    state, evaluated = _state(experiment), eval_batch(experiment)
    lowered = programs.train_step.lower(state, train_batch(experiment))
    train = compile_program(lowered, target, functools.partial(waiting, 'the training step'))
    report = {
        'target': target.name,
        'devices': len(target.devices),
        'processes': parallel.process_count(),
        'examples_per_device': experiment.config.batch_size // len(target.devices),
        **_memory(train, target),
        'compile_seconds': train.seconds,
        'versions': target.versions,
    }
    if not report['fits']:
        return report
    program = compiled_text.parse(train.text)
    report['collectives'] = [
        {'kind': kind, 'bytes': size} for kind, size in compiled_text.collectives(program)
    ]
    depths = (
        experiment.config.model.get('depths')
        or models.variant_info(experiment.config.model.name).depths
    )
    report['loops_of_unknown_length'] = len(compiled_text.unknown_loops(program))
    exchanged = sum(x['bytes'] for x in report['collectives'])
    report['exchange_seconds'] = scaling.all_reduce_seconds(
        exchanged, target.device, len(target.devices)
    )
    report['arithmetic_seconds'] = (
        flops_per_image(experiment)
        * (experiment.config.batch_size / len(target.devices))
        / target.device.peak_flops
    )
    report |= _on_tpu(program, target, depths) if target.clock else _on_gpu(program, target, depths)
    lowered = programs.eval_step.lower(state.variables(), evaluated)
    compiled = compile_program(lowered, target, functools.partial(waiting, 'the evaluation'))
    report['evaluation'] = _memory(
        compiled, target, kept=_nbytes(state) - _nbytes(state.variables())
    )
    if target.clock:
        seconds = 0.0
        if compiled.text:
            seconds = step_parts.cycles(compiled_text.parse(compiled.text)) / target.clock
            report['evaluation'] |= {
                'step_seconds': seconds,
                'images_per_second': eval_batch_size(experiment) / seconds,
            }
        report |= _run(experiment, target, report['step_seconds'], seconds)
        report['share_of_peak'] = report['arithmetic_seconds'] / report['step_seconds']
    return report


def _memory(compiled: Compiled, target: Target, kept: int = 0) -> dict:
    """Returns what a device needs, with `kept` bytes that are no arguments; whether it has it."""
    memory = compiled.memory | {'arguments': compiled.memory['arguments'] + kept}
    fits = bool(compiled.text) and sum(memory.values()) <= target.memory
    return {'fits': fits, 'memory': memory | {'available': target.memory}}


def _needed(report: Mapping) -> float:
    return sum(report['memory'][key] for key in ('arguments', 'temporaries', 'code'))


def _on_tpu(program: Program, target: Target, depths: tuple[int, ...]) -> dict:
    costs = compiled_text.costs(program, weights=step_parts.branch_shares)
    total = compiled_text.total(costs)
    assert target.clock is not None
    return {
        'cycles': total,
        'step_seconds': total / target.clock,
        'element_accesses': sum(compiled_text.element_accesses(program).values()),
        **_where([(cost.instruction, cost.cycles) for cost in costs], depths),
    }


def _on_gpu(program: Program, target: Target, depths: tuple[int, ...]) -> dict:
    found = compiled_text.kernels(program)
    total = sum(kernel.bytes for kernel in found)
    kinds = {
        kind: [k for k in found if step_parts.gpu_kind(k.instruction) == kind]
        for kind in step_parts.GPU_KINDS
    }
    return {
        'kernels': sum(kernel.executions for kernel in found),
        'bytes_accessed': total,
        'memory_seconds': total / target.device.memory_bandwidth,
        'kinds': {
            kind: {'kernels': sum(k.executions for k in ks), 'bytes': sum(k.bytes for k in ks)}
            for kind, ks in kinds.items()
        },
        **_where([(kernel.instruction, kernel.bytes) for kernel in found], depths),
    }


def _where(amounts: Sequence[tuple[Instruction, float]], depths: tuple[int, ...]) -> dict:
    """Returns the sums of cycles or bytes by part of the step, and those of the dearest layers."""
    parts = compiled_text.by(amounts, lambda x: step_parts.part_of(x, depths))
    layers = compiled_text.by(amounts, step_parts.layer_of)
    return {'parts': parts, 'dearest': dict(list(layers.items())[:DEAREST])}


def _run(experiment: Experiment, target: Target, train_seconds: float, eval_seconds: float) -> dict:
    """Returns how fast the run is, and how long it takes with its evaluations."""
    batches = -(-len(experiment.splits[experiment.watched]) // eval_batch_size(experiment))
    evaluations = -(-experiment.total_steps // experiment.eval_every)
    hours = (experiment.total_steps * train_seconds + evaluations * batches * eval_seconds) / 3600
    return {
        'images_per_second': experiment.config.batch_size / train_seconds,
        'hours': hours,
        'chip_hours': hours * target.chips,
    }


# The arguments of the programs, with the shapes that the runner gives them.


def _state(experiment: Experiment) -> train_step.TrainState:
    return jax.eval_shape(lambda: train_step.init_state(experiment))


def train_batch(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch of the training step."""
    rows = experiment.images_per_step // parallel.device_count()
    batch = {'position': _split(jnp.int32, rows), 'stop': _split(jnp.float32, 1)}
    held: tuple[int, ...] = (rows,)
    if experiment.on_device:  # All images, and the order of two epochs.
        held = (1, len(experiment.train_source))
        batch |= {'order': _split(jnp.int32, 1, 2 * held[1]), 'first': _split(jnp.uint32, 1)}
    label = experiment.label_spec
    images, labels = (
        _split(jnp.uint8, *held, *experiment.image_spec.shape),
        _split(label.dtype, *held, *label.shape),
    )
    return batch | {'image': images, 'label': labels}


def eval_batch(experiment: Experiment) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch of the evaluation."""
    rows = eval_batch_size(experiment) // parallel.device_count()
    label = experiment.label_spec
    height, width, channels = experiment.image_spec.shape
    if experiment.image_spec.test_transform is not None:
        height, width = height_width(experiment.image_spec.test_size)
    return {
        'image': _split(jnp.uint8, rows, height, width, channels),
        'label': _split(label.dtype, rows, *label.shape),
        'index': _split(jnp.int32, rows),
        'mask': _split(jnp.float32, rows),
    }


def _split(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((parallel.device_count(), *shape), dtype)


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def describe(report: Mapping) -> Iterator[str]:
    """Yields the lines that say what a report holds."""
    counts = [
        f'{report[kind]} {kind if report[kind] > 1 else singular}'
        for kind, singular in (('devices', 'device'), ('processes', 'process'))
    ]
    yield (
        f'{report["target"]}: {" in ".join(counts)}, '
        f'{report["examples_per_device"]} examples on each device'
    )
    versions = ', '.join(f'{name} {version}' for name, version in report['versions'].items())
    yield f'compiled in {report["compile_seconds"]:.0f} s by {versions}'
    yield f'training:   {_in_words(report)}'
    if 'flags' in report:
        yield f'it fits with {" ".join(report["flags"])}'
        yield from describe(report['with_flags'])
    if not report['fits']:
        return
    evaluation = report['evaluation']
    yield f'evaluation: {_in_words(evaluation)}' + (
        f'; {evaluation["images_per_second"]:,.0f} images/s' if 'step_seconds' in evaluation else ''
    )
    if not evaluation['fits']:
        yield 'give a smaller --config.eval.batch_size'
    sent = collections.Counter(x['kind'] for x in report['collectives'])
    megabytes = sum(x['bytes'] for x in report['collectives']) / 1e6
    kinds = ', '.join(f'{count} {kind}' for kind, count in sent.items()) or 'nothing'
    yield (
        f'sent between devices a step: {kinds}, {megabytes:,.1f} MB, '
        f'{1e3 * report["exchange_seconds"]:.2f} ms at the published bandwidth (in no time below)'
    )
    if 'cycles' in report:
        yield from _describe_time(report)
        unit, scale = 'million cycles', 1e6
    else:
        gigabytes = report['bytes_accessed'] / 1e9
        yield f'{report["kernels"]:,.0f} kernels a step, {gigabytes:,.2f} GB read and written'
        yield (
            f'at the least {1e3 * report["memory_seconds"]:.2f} ms by the bandwidth of the memory, '
            f'{1e3 * report["arithmetic_seconds"]:.2f} ms by the peak of the arithmetic'
        )
        for kind, found in report['kinds'].items():
            yield f'  {kind:<24}{found["kernels"]:9,.0f}{found["bytes"] / 1e9:10.2f} GB'
        unit, scale = 'GB', 1e9
    if loops := report['loops_of_unknown_length']:
        yield f'{loops} loops of unknown length are counted once'
    for title, sums in (('part', report['parts']), ('dearest', report['dearest'])):
        yield f'{title:<64}{unit:>15}'
        whole = sum(report['parts'].values())
        for name, value in sums.items():
            yield f'  {name[-60:]:<62}{value / scale:15.3f}{value / whole:7.1%}'


def _in_words(part: Mapping) -> str:
    memory = part['memory']
    if not memory['arguments']:  # The compiler gave up, and told no parts.
        return f'DOES NOT FIT: {_needed(part) / 1e9:.3g} of {memory["available"] / 1e9:.1f} GB'
    sizes = ', '.join(
        f'{memory[key] / 1e9:.3g} {key}' for key in ('arguments', 'temporaries', 'code')
    )
    fits = 'fits' if part['fits'] else 'DOES NOT FIT'
    return f'{fits}: {_needed(part) / 1e9:.3g} of {memory["available"] / 1e9:.1f} GB ({sizes})'


def _describe_time(report: Mapping) -> Iterator[str]:
    share = f'/ {MEASURED_SHARE}'
    yield f'{"":<24}{"compiler":>12}{share:>12}, the ratio of estimated to measured time on a v3'
    for name, value, power, form in (
        ('million cycles', report['cycles'] / 1e6, -1, ',.2f'),
        ('ms a step', report['step_seconds'] * 1e3, -1, ',.2f'),
        ('images/s', report['images_per_second'], 1, ',.0f'),
        ('share of the peak', report['share_of_peak'], 1, '.1%'),
        ('hours', report['hours'], -1, ',.2f'),
        ('chip-hours', report['chip_hours'], -1, ',.1f'),
    ):
        yield f'{name:<24}{value:12{form}}{value * MEASURED_SHARE**power:12{form}}'
    if report['element_accesses']:
        yield (
            f'not in these times: {report["element_accesses"]:,} elements that are gathered or '
            'scattered one by one'
        )


class Progress:
    """Shows on standard error how long a compilation has taken so far."""

    def __init__(self, target: str):
        self._target, self._said = target, 0.0

    def __call__(self, program: str, seconds: float) -> None:
        line = f'compiling {program} for {self._target}: {seconds:.0f} s'
        if sys.stderr.isatty():
            print(f'\r{line}', end='', file=sys.stderr, flush=True)
        elif seconds < 1.5 or seconds - self._said >= 30:
            self._said = seconds
            print(line, file=sys.stderr, flush=True)


def main() -> None:
    values = flags.FLAGS
    jax.config.update('jax_platforms', 'cpu')  # Nothing needs an accelerator.
    if not any(values.target):
        raise UsageError('--target= is empty: name one, such as v5e:16x16')
    if values.json:
        cli.check_out(pathlib.Path(values.json), flag='json')
    plan = {'examples': values.examples, 'classes': values.classes}
    opened = [targets.open_target(name) for name in values.target]
    reports = []
    for target in opened:
        reports.append(preflight(values.config, target, plan, Progress(target.name)))
        if sys.stderr.isatty():
            print('\r\033[K', end='', file=sys.stderr)
        print('\n'.join(describe(reports[-1])), end='\n\n', flush=True)
    if values.json:
        files.atomic_write(values.json, json.dumps({'targets': reports}, indent=2) + '\n')
    if not any(report['fits'] or 'flags' in report for report in reports):
        raise UsageError(
            f'config.batch_size={values.config.batch_size}: fits none of '
            f'{", ".join(values.target)}, whatever is accumulated or recomputed'
        )


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', None, 'The config.', lock_config=True)
    flags.DEFINE_list('target', None, 'KIND:TOPOLOGY, such as v5e:16x16; several with commas.')
    cli.define_path('json', None, 'Where to write the reports as JSON.')
    flags.DEFINE_integer(
        'examples', None, 'In each split of data that are not here.', lower_bound=1
    )
    flags.DEFINE_integer('classes', None, 'Of data that are not here.', lower_bound=2)
    flags.mark_flags_as_required(['config', 'target'])
    cli.run(main)
