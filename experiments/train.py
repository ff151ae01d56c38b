"""Trains a network from a config; run again with the same workdir, it resumes.

    python -m experiments.train --config=configs/digits.py --workdir=runs/digits
    python -m experiments.train --config=configs/imagenet/nfnet.py:F0 --workdir=runs/f0

bytes -> uint8 batches on the host -> on each device the step of train_step.py, over and over ->
from time to time metrics, a checkpoint, an exact evaluation. A resumed run ends bit for bit where
the uninterrupted one does. --config=FILE --help lists the variants and fields of a config.
"""

import contextlib
import os
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import config as schema
from experiments.experiment import build, describe
from experiments.launch import allocator, cli, preemption
from experiments.run import (
    data_record,
    init_weights,
    metric_writers,
    parallel,
    recovery,
    smoke,
    step_metrics,
    workdir,
)
from experiments.run import summary as run_summary
from experiments.run.batches import open_batches, write_images
from experiments.run.checkpoints import Checkpoints
from experiments.run.evaluation import OnCorrect, describe_accuracy, evaluate, score
from experiments.run.profiling import Trace
from experiments.run.progress import Progress
from experiments.run.recovery import DivergedError, assert_finite, saving_at_failure
from experiments.run.throughput import FAULTS_COUNTED_IN, Throughput, flops_per_image
from experiments.train_step import Programs, compile_programs, init_state, layers, make_logits_fn
from nfnets_jax.data import pipeline


def train(
    config: ConfigDict,
    directory: str | os.PathLike,
    *,
    programs: dict[str, Programs] | None = None,
    quiet: bool = False,
    on_correct: OnCorrect | None = None,
) -> dict[str, Any]:
    """Trains to the end of `config.duration`, from the newest whole checkpoint if there is one.

    Args:
      config: see `experiments.config.default_config`.
      directory: the workdir, which holds checkpoints, metrics and config.
      programs: cache of compiled programs, shared by several runs in one process. Runs that differ
        only in seed, learning rate, clipping or weight decay compile once.
      quiet: whether to print nothing, draw no curves and show no augmented images.
      on_correct: see `run.evaluation.evaluate`; called by the evaluation after the last step. A run
        that resumes after that evaluation does not repeat it.

    Returns:
      The content of summary.json: final and best metrics, speed, versions. If a signal stopped the
      run, its state has been saved, and the result is {'step'} only.

    Raises:
      UsageError: a mistake in the config or the directory, found before anything is written; or the
        directory or the images failed during the run.
      DivergedError: the loss or the gradient is not finite. Nothing has been saved since.
    """
    with contextlib.ExitStack() as stack:
        # ------------------------------------------------------------------------------ experiment
        lines = []
        if config.get('smoke'):
            config = smoke.shrink(config)
            lines.append(smoke.describe_shrunk(config))
        experiment = build(config)
        stack.enter_context(parallel.using(experiment.devices))
        total_steps, watched = experiment.total_steps, experiment.watched
        progress = Progress(total_steps, enabled=not quiet)
        log = progress.log
        workdir.check_config(directory, config)
        metric_writers.check_destinations(directory, config)
        for line in (*lines, *describe(experiment), *schema.take_adaptations(config)):
            log(line)
        data = data_record.make_record(experiment.splits)
        workdir.assert_same(config, data)
        for change in workdir.free_changes(directory, config):
            log(f'resuming with a changed config: {change}')
        weights = init_weights.load_for_new_run(experiment, directory, log)

        # -------------------------------------------------------------- devices and compiled steps
        programs = {} if programs is None else programs
        init, train_step, eval_step = compile_programs(experiment, programs)
        template = jax.eval_shape(lambda: init_state(experiment, init=init))

        # --------------------------------------------------------------------------- run directory
        metadata = init_weights.model_metadata(experiment)
        path = stack.enter_context(workdir.claimed(directory, config, data, metadata))
        stop_signal = stack.enter_context(preemption.on_signals())
        checkpoints = Checkpoints(
            path / 'checkpoints', keep=config.checkpoint.keep, enabled=parallel.is_primary()
        )
        stack.callback(checkpoints.close)

        # ------------------------------------------------------------------------- restore or init
        # Only process 0 touches the file system; it broadcasts what it reads.
        newest = recovery.restore_newest(checkpoints, template, log)
        start_step = parallel.broadcast_json(newest[0] if newest else 0)
        complete = start_step == total_steps
        if complete and (summary := parallel.from_primary(run_summary.read_summary, path)):
            log(f'{path} is complete')
            return summary
        if newest:
            then = checkpoints.note(start_step)
            log(recovery.describe_resumption(experiment, path, start_step, template, then))
        else:
            log(f'run: {path}')
        log('compiling')
        begun = time.perf_counter()
        if newest:
            state = newest[1]
        else:
            state = template if start_step else init_state(experiment, weights, init)
        state, step = parallel.replicate(parallel.broadcast(state)), start_step
        recorded = parallel.from_primary(recovery.recorded_metrics, path, step)

        # ----------------------------------------------------------------------- input and writers
        bad = pipeline.UnreadableExamples(experiment.skip_bad)
        batches = stack.enter_context(open_batches(experiment, step, bad))
        writer = metric_writers.open_writer(path, config=config, start_step=step)
        stack.callback(writer.close)
        stack.callback(progress.close)
        trace = Trace(path / 'profile', first=step + 2, steps=experiment.profile_steps)
        stack.callback(trace.close)
        throughput = Throughput(config.batch_size, batches, flops_per_image(experiment))

        # ------------------------------------------------------- loop {step, log, evaluate, save}
        def due(every: int) -> bool:
            return step > 0 and (step % every == 0 or step == total_steps)

        def log_metrics() -> dict[str, float]:
            sums = jax.device_get(state.window)
            nonfinite = step_metrics.nonfinite_steps(sums)
            metrics = step_metrics.means(sums) | throughput.read()
            metrics |= step_metrics.means_by_layer(sums, layers(config, state.params))
            metrics |= {'skipped_pictures': len(bad)} if experiment.skip_bad else {}
            metrics |= {'skipped_steps': nonfinite} if config.skip_nonfinite else {}
            updates = max(0, step - 1 - nonfinite)  # before the last one
            metrics['learning_rate'] = experiment.optimizer.last_rate(updates, state.opt_state)
            writer.write(step, {f'train/{name}': value for name, value in metrics.items()})
            return metrics

        def evaluate_due_splits(evaluation: dict[str, float]) -> dict[str, float]:
            # Besides validation data, test data are evaluated once, at the end.
            for split in experiment.evaluated if step == total_steps else (watched,):
                if f'{split}/top1' in evaluation:
                    continue
                with throughput.paused(state):
                    at_end = on_correct if step == total_steps else None
                    metrics = evaluate(experiment, eval_step, state.variables(), split, at_end)
                    writer.write(step, metrics)
                evaluation |= metrics
                log(f'step {step:,}: {describe_accuracy(metrics)}')
            checkpoints.score(step, score(evaluation, watched))
            return evaluation

        evaluation: dict[str, float] = {}
        stopped = False
        with saving_at_failure(lambda: (step, state), checkpoints, start_step, log):
            # A step is saved before it is logged and evaluated: the run may have stopped between.
            if due(experiment.log_every) and 'train/loss' not in recorded:
                log_metrics()
            if due(experiment.eval_every):
                names = (name for name in recorded if not name.startswith('train/'))
                evaluation = evaluate_due_splits({name: recorded[name] for name in names})

            while step < total_steps and not stopped:
                if trace.should_toggle(step):
                    with throughput.paused(state):
                        trace.toggle()
                batch = next(batches) | {'stop': stop_signal.flag()}
                if step == 0:
                    write_images(writer, experiment, batch, augmented=not quiet)
                with parallel.transfer_guard():
                    state, metrics = train_step(state, batch)
                step += 1
                throughput.tick(state)
                if step == start_step + 1:
                    log(f'compiled in {time.perf_counter() - begun:.1f} s')
                counted = step == start_step + 1 + FAULTS_COUNTED_IN
                if counted and (hint := throughput.describe_faults(state)):
                    log(hint)
                stopped = stop_signal.reached(metrics['stop'])

                save = due(experiment.checkpoint_every) or stopped
                if save or due(experiment.log_every):
                    assert_finite(state, checkpoints)
                if save:  # First, so that a later failure costs no step.
                    with throughput.paused(state):
                        checkpoints.save(step, state, note=parallel.describe_devices())
                progress.update(step, log_metrics() if due(experiment.log_every) else None)
                if due(experiment.eval_every):
                    evaluation = evaluate_due_splits({})

        # --------------------------------------------------------------------------------- summary
        checkpoints.wait()
        progress.close()
        if not quiet:
            run_summary.draw_curves(experiment, path, log)
        if step < total_steps:
            log(f'stopped; step {step:,} is saved, and the same command continues from there')
            summary = {'step': step}
        else:
            logits_fn = make_logits_fn(experiment)
            run_summary.write_reports(experiment, logits_fn, state.variables(), path, log)
            summary = run_summary.write_summary(state, path, evaluation, throughput, watched)
    # Last, when everything is closed: the other processes may end now.
    return parallel.broadcast_json(summary)


def main() -> None:
    if flags.FLAGS.keep_memory:
        allocator.keep_memory()
    parallel.split_cpu(flags.FLAGS.cpu_devices)
    try:
        summary = train(flags.FLAGS.config, flags.FLAGS.workdir)
    except DivergedError as error:
        # All processes have diverged, but process 0 still writes a checkpoint: wait for it.
        parallel.gather(np.zeros(1, np.uint32))
        if parallel.is_primary():
            print(f'stopped: {error}', file=sys.stderr, flush=True)
        sys.exit(1)
    if 'final' in summary and parallel.is_primary():
        print(run_summary.describe_next_steps(summary, flags.FLAGS.workdir))


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', None, 'The config.', lock_config=True)
    cli.define_workdir('Directory for checkpoints, metrics and config.')
    flags.DEFINE_integer(
        'cpu_devices',
        None,
        'Cores of a CPU to train on, each a device; all by default, one if results depend on it.',
        lower_bound=1,
    )
    allocator.define_flag()
    flags.mark_flags_as_required(['config', 'workdir'])
    cli.run(main, distributed=True)
