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
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import haiku as hk
import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import config as schema
from experiments import smoke
from experiments.experiment import (
    Task,
    TrainState,
    describe,
    describe_data,
    describe_network,
    describe_steps,
    describe_weights,
    evaluate,
    flops_per_image,
    init_state,
    load_weights,
    prepare,
    score,
)
from experiments.launch import cli, preemption
from experiments.run import (
    curves,
    data_record,
    device_cached,
    metric_writers,
    parallel,
    progress,
    step_metrics,
    workdir,
)
from experiments.run.checkpoints import Checkpoints
from experiments.run.profiling import Trace
from experiments.run.throughput import Clock
from experiments.train_step import Programs, compile_programs, computed_per_device
from nfnets_jax import files
from nfnets_jax.data import pipeline
from nfnets_jax.errors import UsageError, first_line
from nfnets_jax.weights import pretrained
from nfnets_jax.weights.checkpoints import DamagedCheckpointError


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
      quiet: whether to tell the run's course to the files alone, and draw nothing.

    Returns:
      What summary.json holds: final and best metrics, speed, versions. If SIGTERM or SIGINT
      stopped the run it has been saved, and only {'step'} is returned.

    Raises:
      UsageError: a mistake in the config or the directory, found before anything is written; or
        what happens to the directory or the pictures meanwhile.
      DivergedError: the loss or gradient is not finite; nothing has been saved since.
    """
    # Of several processes one has the files; what it reads there it tells the others.
    primary = parallel.is_primary()
    say = _say if primary and not quiet else lambda line: None
    if config.get('smoke'):
        config = smoke.shrink(config)
        say(smoke.describe(config))
    task = prepare(config)
    data = data_record.describe(task.splits)
    workdir.assert_same(config, data)
    weights = None
    if primary:
        metric_writers.check(directory, config)
        for change in workdir.free_changes(directory, config):
            say(f'resuming with a changed config: {change}')
        if config.init.weights and not workdir.has_checkpoints(directory):
            params, buffers, report = load_weights(task, directory)
            weights = params, buffers
            say(f'{config.init.weights}: {report}')
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(workdir.claimed(directory, config, data, active=primary))
        stop = stack.enter_context(preemption.on_signals())
        lines = describe_network(task), *describe_data(task), describe_steps(task)
        for line in (*lines, *schema.take_adaptations(config)):
            say(line)  # Not before: a mistake is one line.

        # Where were we?
        init, train_step, eval_step = compile_programs(task, {} if programs is None else programs)
        like = jax.eval_shape(lambda: init_state(task, init=init))
        checkpoints = Checkpoints(
            path / 'checkpoints', keep=config.checkpoint.keep, enabled=primary
        )
        stack.callback(checkpoints.close)
        try:
            newest = checkpoints.latest(like, on_damage=say)
        except DamagedCheckpointError as error:
            raise UsageError(f'{error}; to start anew give another --workdir') from error
        start_step, state = newest or (0, init_state(task, weights, init) if primary else like)
        summary_file, summary = path / 'summary.json', None
        if primary and start_step == task.total_steps and summary_file.exists():
            with contextlib.suppress(ValueError):  # A broken one is written anew.
                summary = json.loads(summary_file.read_text())
        start_step, summary = parallel.broadcast_json([start_step, summary])
        if summary:
            say(f'{path} is complete')
            return summary
        if newest:
            say(
                f'resuming {path} at step {start_step:,} of {task.total_steps:,}'
                f'{_other_devices(task, like.state, checkpoints.note(start_step))}'
            )
        else:
            say(f'run: {path}')
        state, step = parallel.replicate(parallel.broadcast(state)), start_step
        # Written once: what is there already is of this run, and its data have been compared.
        if primary and not (path / 'model.json').exists():
            metadata = pretrained.encode_metadata(describe_weights(task))
            files.atomic_write(path / 'model.json', metadata + '\n')

        # Where the images come from, and where it is told what becomes of them.
        bad = pipeline.UnreadableExamples(task.skip_bad)
        batches = stack.enter_context(_open_batches(task, step, bad))
        writer = metric_writers.open_writer(path, config=config, start_step=step, active=primary)
        stack.callback(writer.close)
        on_record = parallel.broadcast_json(_on_record(path, step) if primary and step else {})
        bar = progress.Progress(task.total_steps, active=primary and not quiet)
        stack.callback(bar.close)
        traced = task.profile_steps if primary else 0
        trace = Trace(path / 'profile', first=step + 2, steps=traced)
        stack.callback(trace.close)
        clock = Clock(config.batch_size, batches, flops_per_image(task))
        # What is known of this step; more than nothing only where a run is resumed.
        results = {name: x for name, x in on_record.items() if not name.startswith('train/')}

        def due(every: int) -> bool:
            return step > 0 and (step % every == 0 or step == task.total_steps)

        def write_training_metrics() -> dict[str, float]:
            sums = jax.device_get(state.window)
            nonfinite = step_metrics.nonfinite_steps(sums)
            metrics = step_metrics.means(sums) | clock.read()
            metrics |= {'skipped_pictures': len(bad)} if task.skip_bad else {}
            metrics |= {'skipped_steps': nonfinite} if config.skip_nonfinite else {}
            updates = max(0, step - 1 - nonfinite)  # before the last, which the schedule counts
            metrics['learning_rate'] = float(task.optimizer.learning_rate(updates))
            writer.write(step, {f'train/{name}': value for name, value in metrics.items()})
            return metrics

        def write_evaluation() -> None:
            # The test data are looked at once, at the end, where there are others to watch.
            last = step == task.total_steps
            for split in task.evaluated if last else (task.watched,):
                if f'{split}/top1' not in results:
                    with clock.paused(state):
                        found = evaluate(task, eval_step, state.variables(), split)
                        writer.write(step, found)
                    results.update(found)
                    bar.say(f'step {step:,}: {describe(found)}')
            checkpoints.score(step, score(results, task.watched))

        stopped = False
        with _saving_at_failure(lambda: (step, state), checkpoints, start_step, say):
            # A step is saved before it is evaluated. Was the run stopped between the two?
            if due(task.log_every) and 'train/loss' not in on_record:
                write_training_metrics()
            if due(task.eval_every):
                write_evaluation()

            while step < task.total_steps and not stopped:
                if trace.turns(step):
                    with clock.paused(state):
                        trace.turn()
                batch = next(batches) | {'stop': stop.flag()}
                if step == start_step:
                    say('compiling')
                # With jax_disable_jit each operation of the step hands over constants of its own.
                jitted = not jax.config.jax_disable_jit  # type: ignore[attr-defined]  # JAX adds it
                with jax.transfer_guard('disallow' if jitted else 'allow'):
                    state, answer = train_step(state, batch)
                step, metrics, results = step + 1, None, {}
                clock.tick(state)
                if step == start_step + 1:
                    bar.say(f'compiled in {clock.compile_seconds:.1f} s')
                stopped = stop.heard(answer)

                save = due(task.checkpoint_every) or stopped
                if save or due(task.log_every):
                    _assert_finite(jax.device_get(state.window), checkpoints)
                if save:  # First of all: what fails after this costs no step.
                    with clock.paused(state):
                        checkpoints.save(step, state, note=parallel.describe_devices())
                if due(task.log_every):
                    metrics = write_training_metrics()
                bar.update(step, metrics)
                if due(task.eval_every):
                    write_evaluation()

        checkpoints.wait()
        bar.close()
        if primary and not quiet:
            _draw_curves(path, config.model.name, say)
        if step < task.total_steps:
            say(f'stopped; step {step:,} is saved, and the same command continues from there')
            summary = {'step': step}
        elif primary:
            summary = summarise(state, path, results, clock, task.watched)
            files.atomic_write(summary_file, json.dumps(summary, indent=2) + '\n')
    # Last, when everything is closed: the others may leave with it, stopped or not.
    return parallel.broadcast_json(summary)


def summarise(
    state: TrainState,
    path: pathlib.Path,
    results: Mapping[str, float],
    clock: Clock,
    watched: str = 'test',
) -> dict[str, Any]:
    """Returns what a run came to: final and best metrics, speed, size, versions.

    Args:
      state: at the end.
      path: of the run.
      results: the last evaluation.
      clock: of the training.
      watched: the split by which the best is chosen.
    """
    evaluations = [line for line in metric_writers.read_metrics(path) if f'{watched}/top1' in line]
    return {
        'step': int(state.step),
        'final': dict(results),
        'best': max(evaluations, key=lambda line: (score(line, watched), -line['step'])),
        'parameters': sum(leaf.size for leaf in jax.tree.leaves(state.params)),
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
    task: Task, start_step: int, bad: pipeline.UnreadableExamples
) -> pipeline.Prefetch | device_cached.ResidentBatches:
    """Returns this process's training batches on its devices, from `start_step` on."""
    process, rows = jax.process_index(), parallel.local_batch_size(task.images_per_step)
    options = {
        'batch_size': task.images_per_step,
        'seed': task.config.seed,
        'start_step': start_step,
        'transform': task.pictures.train_transform,
        'process_index': process,
        'process_count': jax.process_count(),
        'bad': bad,
    }
    if task.on_device:
        return device_cached.ResidentBatches(task.train_source, **options)
    position = np.arange(process * rows, (process + 1) * rows, dtype=np.int32)
    batches = pipeline.train_batches(task.train_source, **options)
    return pipeline.Prefetch(batches, lambda b: parallel.shard(b | {'position': position}))


def _on_record(path: pathlib.Path, step: int) -> dict[str, float]:
    """Returns the metrics that a run has written of a step."""
    if not (path / metric_writers.METRICS_FILE).exists():
        return {}
    lines = [line for line in metric_writers.read_metrics(path) if line['step'] == step]
    return {name: x for line in lines for name, x in line.items() if name != 'step'}


@contextlib.contextmanager
def _saving_at_failure(
    current: Callable[[], tuple[int, TrainState]],
    checkpoints: Checkpoints,
    start_step: int,
    say: Callable[[str], None],
) -> Iterator[None]:
    """Saves the last step done when something else fails: an evaluation, a disk, an image.

    Args:
      current: returns the step and its state.
      checkpoints: of the run.
      start_step: has been saved.
      say: told of it, where the exception itself cannot be.
    """
    try:
        yield
    except DivergedError:
        raise  # What is not finite is not worth keeping.
    except Exception as error:
        step, state = current()
        saved = ''
        # Where no checkpoint can be written, or the device has failed, what failed first is told.
        with contextlib.suppress(Exception):
            if step > start_step and step_metrics.lost_at(jax.device_get(state.window)) is None:
                checkpoints.save(step, state, note=parallel.describe_devices())
                checkpoints.wait()
                saved = f'step {step:,} is saved, and the same command continues from there'
        if saved and isinstance(error, UsageError):
            raise UsageError(f'{error}; {saved}') from error
        if saved:
            say(saved)
        raise


def _draw_curves(path: pathlib.Path, title: str, say: Callable[[str], None]) -> None:
    """Draws curves.png. A run does not fail by it."""
    try:
        curves.draw_curves(metric_writers.read_metrics(path), path / 'curves.png', title=title)
    except Exception as error:  # Of Matplotlib, whose fonts and caches may be anywhere.
        say(f'curves.png cannot be drawn: {first_line(error)}')


def _assert_finite(sums: step_metrics.Window, checkpoints: Checkpoints) -> None:
    bad = step_metrics.lost_at(sums)
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


def _other_devices(task: Task, model_state: hk.State, then: str | None) -> str:
    """Says so where a run goes on with other devices than those it was saved with.

    Args:
      task: what is trained.
      model_state: of the network, or its shapes.
      then: `parallel.describe_devices` of the process that saved.
    """
    now = parallel.describe_devices()
    if then is None or then == now:
        return ''
    line = f', with {now} instead of {then}: the same batches, equal up to rounding'
    local = computed_per_device(task, model_state)
    if local and now.split()[0] != then.split()[0]:
        line += f', except for what each device computes by itself: {", ".join(local)}'
    return line


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _farewell(summary: Mapping[str, Any], path: str) -> str:
    python = os.path.relpath(sys.executable)
    if python.startswith(os.pardir):
        python = sys.executable
    path = shlex.quote(path)
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
        # All have diverged; process 0 alone still has a checkpoint to write, and something to say.
        parallel.gather(np.zeros(1, np.uint32))
        if parallel.is_primary():
            _say(f'stopped: {error}')
        sys.exit(1)
    if 'final' in summary and parallel.is_primary():
        print(_farewell(summary, flags.FLAGS.workdir))


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', None, 'What to train.', lock_config=True)
    cli.define_workdir('Where everything about the run is kept.')
    flags.mark_flags_as_required(['config', 'workdir'])
    cli.run(main, distributed=True)
