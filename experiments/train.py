"""Trains a network from a config; run again with the same workdir, it resumes.

    python -m experiments.train --config=configs/digits.py --workdir=runs/digits

What a run is: bytes -> uint8 batches on the host -> on each device what train_step.py says, over
and over -> every so often a line of metrics, an exact evaluation, a checkpoint. Nothing in it
depends on when it was stopped: resumed, it ends bit for bit where the uninterrupted run does.
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import cli, plots, progress, window, workdir, writers
from experiments.clock import Clock
from experiments.task import (
    Task,
    TrainState,
    describe,
    describe_weights,
    evaluate,
    flops_per_image,
    init_state,
    load_weights,
    prepare,
)
from experiments.trace import Trace
from experiments.train_step import Programs, compile_programs
from nfnets_jax import parallel, pretrained
from nfnets_jax.checkpoints import Checkpoints, DamagedCheckpointError
from nfnets_jax.data import pipeline, resident
from nfnets_jax.errors import UsageError


class DivergedError(Exception):
    """The loss or the gradient is no longer a finite number."""


def train(
    config: ConfigDict,
    directory: str | os.PathLike,
    *,
    programs: dict[str, Programs] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains to the end of `config.duration`, from the newest whole checkpoint if there is one.

    Args:
      config: see `experiments.config.default_config`.
      directory: where everything about the run is kept (the workdir).
      programs: shared by several runs in one process, keeps what is compiled: runs that differ in
        the seed, the learning rate, the clipping or the weight decay only compile once.
      quiet: whether to tell the run's course to the files alone.

    Returns:
      What summary.json holds: final and best metrics, speed, versions. If SIGTERM or SIGINT
      stopped the run it has been saved, and only {'step'} is returned.

    Raises:
      UsageError: a mistake in the config or the directory; nothing has been written.
      DivergedError: the loss or gradient is not finite; nothing has been saved since.
    """
    say = (lambda line: None) if quiet else _say
    task = prepare(config)
    writers.check(directory, config)
    weights = None
    if config.init.weights:
        *weights, report = load_weights(task)
        say(f'{config.init.weights}: {report}')
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(workdir.claimed(directory, config))
        stop = stack.enter_context(_stop_on_signals())

        # Where were we?
        init, train_step, eval_step = compile_programs(task, {} if programs is None else programs)
        checkpoints = Checkpoints(path / 'checkpoints', keep=config.checkpoint.keep)
        stack.callback(checkpoints.close)
        try:
            newest = checkpoints.latest(jax.eval_shape(lambda: init_state(task)), on_damage=say)
        except DamagedCheckpointError as error:
            raise UsageError(f'{error}; to start anew give another --workdir') from error
        step, state = newest or (0, init_state(task, weights, init))
        summary_file = path / 'summary.json'
        if step == task.total_steps and summary_file.exists():
            say(f'{path} is complete')
            return json.loads(summary_file.read_text())
        if step:
            say(f'resuming {path} at step {step:,} of {task.total_steps:,}')
        state = parallel.replicate(state)
        metadata = pretrained.encode_metadata(describe_weights(task))
        workdir.write_text(path / 'model.json', metadata + '\n')

        # Where the pictures come from, and where it is told what becomes of them.
        bad = pipeline.BadPictures(task.skip_bad)
        batches = stack.enter_context(_open_batches(task, step, bad))
        primary = parallel.is_primary()
        writer = writers.open_writer(path, config=config, start_step=step, active=primary)
        stack.callback(writer.close)
        bar = progress.Progress(task.total_steps, active=primary and not quiet)
        stack.callback(bar.close)
        trace = Trace(path / 'profile', first=step + 2, steps=task.profile_steps)
        stack.callback(trace.close)
        clock = Clock(config.batch_size, batches, flops_per_image(task))

        def due(every: int) -> bool:
            return step % every == 0 or step == task.total_steps

        stopping = False
        while step < task.total_steps and not stopping:
            trace.before(step, state)
            batch = next(batches)
            with jax.transfer_guard('disallow'):
                state = train_step(state, batch)
            step, metrics = step + 1, None
            clock.tick(state)

            if due(task.log_every):
                _assert_finite(state, checkpoints)
                nonfinite = window.nonfinite_steps(state.window)
                metrics = window.means(state.window) | clock.read()
                metrics |= {'skipped_pictures': len(bad)} if task.skip_bad else {}
                metrics |= {'skipped_steps': nonfinite} if config.skip_nonfinite else {}
                # The schedule counts updates.
                metrics['learning_rate'] = float(task.optimizer.learning_rate(step - 1 - nonfinite))
                writer.write(step, {f'train/{name}': value for name, value in metrics.items()})
            bar.update(step, metrics)

            if due(task.eval_every):
                with clock.paused():
                    results = evaluate(task, eval_step, state.variables())
                    writer.write(step, results)
                    bar.say(f'step {step:,}: {describe(results)}')

            stopping = stop.is_set()  # Once: whoever is told that it is saved must find it so.
            if due(task.checkpoint_every) or stopping:
                with clock.paused():
                    _assert_finite(state, checkpoints)
                    score = _score(results) if due(task.eval_every) else None
                    checkpoints.save(step, state, score=score)

        checkpoints.wait()
        bar.close()
        plots.draw_curves(writers.read_metrics(path), path / 'curves.png', title=config.model.name)
        if step < task.total_steps:
            say(f'stopped; step {step:,} is saved, and the same command continues from there')
            return {'step': step}
        if newest and step == newest[0]:  # All steps were done, but not all that follows.
            results = evaluate(task, eval_step, state.variables())
        summary = summarise(task, path, results, clock)
        workdir.write_text(summary_file, json.dumps(summary, indent=2) + '\n')
        return summary


def summarise(
    task: Task, path: pathlib.Path, results: Mapping[str, float], clock: Clock
) -> dict[str, Any]:
    """Returns what a run came to: final and best metrics, speed, size, versions."""
    evaluations = [line for line in writers.read_metrics(path) if 'test/top1' in line]
    params = jax.eval_shape(lambda: init_state(task)).params
    return {
        'step': task.total_steps,
        'final': dict(results),
        'best': max(evaluations, key=lambda line: (_score(line), -line['step'])),
        'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)),
        # Of this session only, should the run have been resumed.
        'images_per_second': clock.images / clock.seconds if clock.images else None,
        'training_seconds': clock.seconds,
        'compile_seconds': clock.compile_seconds,
        'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        'versions': {'python': platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


_PACKAGES = ('jax', 'jaxlib', 'dm-haiku', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def _open_batches(
    task: Task, start_step: int, bad: pipeline.BadPictures
) -> pipeline.Prefetch | resident.ResidentBatches:
    """Returns this process's training batches on its devices, from `start_step` on."""
    process, rows = jax.process_index(), parallel.local_batch_size(task.config.batch_size)
    options = {
        'batch_size': task.config.batch_size,
        'seed': task.config.seed,
        'start_step': start_step,
        'transform': task.pictures.train_transform,
        'process_index': process,
        'process_count': jax.process_count(),
        'bad': bad,
    }
    if task.on_device:
        return resident.ResidentBatches(task.train_source, **options)
    position = np.arange(process * rows, (process + 1) * rows, dtype=np.int32)
    batches = pipeline.train_batches(task.train_source, **options)
    return pipeline.Prefetch(batches, lambda b: parallel.shard(b | {'position': position}))


def _score(results: Mapping[str, float]) -> float:
    """What the best checkpoint is the best in: test top-1, of the EMA where there is one."""
    return results.get('test_ema/top1', results['test/top1'])


def _assert_finite(state: TrainState, checkpoints: Checkpoints) -> None:
    bad = window.lost_at(state.window)
    if bad is None:
        return
    checkpoints.wait()
    saved = checkpoints.steps()
    good = f'the last good checkpoint is step {saved[-1]:,}' if saved else 'nothing was saved yet'
    raise DivergedError(
        f'the loss or the gradient was not finite at step {bad:,}; {good}. Try a lower '
        'config.optimizer.learning_rate, a longer config.optimizer.schedule.warmup or a smaller '
        'config.optimizer.clip.clipping, with another --workdir'
    )


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """Yields an event that SIGTERM or SIGINT sets; a second signal has its usual effect."""
    stop = threading.Event()
    previous = {}

    def request(number, frame):
        del frame
        stop.set()
        signal.signal(number, previous[number])

    if threading.current_thread() is threading.main_thread():  # Elsewhere Python forbids it.
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    if parallel.is_primary():
        print(line, file=sys.stderr, flush=True)


def _farewell(summary: Mapping[str, Any], path: str) -> str:
    python = os.path.relpath(sys.executable)
    return f"""
{describe(summary['final'])}  (after {summary['step']:,} steps)

curves:       {path}/curves.png
look closer:  {os.path.join(os.path.dirname(python), 'tensorboard')} --logdir={path}
evaluate:     {python} -m experiments.evaluate --workdir={path}
continue:     a stopped run continues with the same command; to train for longer, give another
              --workdir and --config.duration
"""


def main() -> None:
    try:
        summary = train(flags.FLAGS.config, flags.FLAGS.workdir)
    except DivergedError as error:
        _say(f'stopped: {error}')
        sys.exit(1)
    if 'final' in summary:
        print(_farewell(summary, flags.FLAGS.workdir))


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', None, 'What to train.', lock_config=True)
    flags.DEFINE_string('workdir', None, 'Where everything about the run is kept.')
    flags.mark_flags_as_required(['config', 'workdir'])
    cli.run(main)
