"""Trains a network from a config; run again with the same workdir, it resumes.

    python -m experiments.train --config=configs/digits.py --workdir=runs/digits

What a run is: bytes -> uint8 batches on the host -> augmentation, forward and backward pass on
each device -> mean gradient -> clip, decay, momentum -> parameters -> their moving average.
All randomness is a function of (seed, step, position in the batch), so that a run which was
stopped anywhere and resumed ends bit for bit where the uninterrupted one does.
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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    init_state,
    load_weights,
    make_eval_step,
    prepare,
)
from nfnets_jax import augment, optimizers, parallel, pretrained
from nfnets_jax.checkpoints import Checkpoints, DamagedCheckpointError
from nfnets_jax.data import pipeline, resident
from nfnets_jax.errors import UsageError
from nfnets_jax.sam import sam_value_and_grad


class DivergedError(Exception):
    """The loss or the gradient is no longer a finite number."""


# Keeps the randomness of dropout and stochastic depth apart from that of the augmentations, which
# are numbered from 0. It is the device's own: these masks do depend on the number of devices.
_MODEL_STREAM = 1 << 16


def make_train_step(task: Task) -> Callable[[TrainState, dict], TrainState]:
    """Returns the parallel update: (state, batch of images, labels and positions) -> state."""
    config = task.config

    def loss_fn(params, batch, state, key):
        outputs, state = task.model.apply(params, state, key, batch['image'], True)
        losses = optax.softmax_cross_entropy(outputs['logits'], batch['target'])
        return jnp.mean(losses), (state, outputs['logits'])

    def value_and_gradient(params, batch, state, key):
        if not config.sam.rho:
            (loss, (state, logits)), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
                params, batch, state, key
            )
            return loss, state, logits, gradients
        # Statistics are those of the parameters that are kept, so of the first of the two passes.
        sam = sam_value_and_grad(
            loss_fn,
            config.sam.rho,
            ascent_fraction=config.sam.ascent_fraction,
            has_aux=True,
            both_aux=True,
        )
        (loss, ((state, _), (_, logits))), gradients = sam(params, batch, state, key)
        return loss, state, logits, gradients

    def train_step(s: TrainState, batch: dict) -> TrainState:
        if task.on_device:
            batch = resident.take(batch, s.step, config.batch_size)
        keys = augment.example_keys(s.seed, s.step, batch['position'])
        images, targets = task.augmentation(keys, batch['image'], batch['label'])
        key = jax.random.fold_in(keys[0], _MODEL_STREAM)

        loss, state, logits, gradients = value_and_gradient(
            s.params, {'image': images, 'target': targets}, s.state, key
        )
        gradients = jax.lax.pmean(gradients, parallel.AXIS)
        state = _mean_over_devices(state)

        updates, opt_state = task.optimizer.transformation.update(gradients, s.opt_state, s.params)
        params = optax.apply_updates(s.params, updates)

        ema_params, ema_state = s.ema_params, s.ema_state
        if config.ema:
            decay = optimizers.ema_decay(s.step, config.ema)
            ema_params, ema_state = optimizers.ema_update(
                (ema_params, ema_state), (params, state), decay
            )

        hits = jnp.argmax(logits, axis=-1) == jnp.argmax(targets, axis=-1)
        metrics = jax.lax.pmean({'loss': loss, 'top1': jnp.mean(hits)}, parallel.AXIS) | {
            'gradient_norm': optax.tree.norm(gradients),
            'clipped_fraction': optax.tree.get(opt_state, 'clipped_fraction', jnp.zeros(())),
        }
        sums = window.add(s.window, metrics, s.step, task.log_every)
        return TrainState(s.seed, s.step + 1, params, state, opt_state, ema_params, ema_state, sums)

    return parallel.parallelise(train_step, donate_replicated=True)


def _mean_over_devices(state: hk.State) -> hk.State:
    """Averages batch norm's running statistics, which differ where each device has its own."""
    return jax.tree.map(
        lambda x: jax.lax.pmean(x, parallel.AXIS) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        state,
    )


def train(config: ConfigDict, directory: str | os.PathLike) -> dict[str, Any]:
    """Trains to the end of `config.duration`, from the newest whole checkpoint if there is one.

    Args:
      config: see `experiments.config.default_config`.
      directory: where everything about the run is kept (the workdir).

    Returns:
      What summary.json holds: final and best metrics, speed, versions. If SIGTERM or SIGINT
      stopped the run it has been saved, and only {'step'} is returned.

    Raises:
      UsageError: a mistake in the config or the directory; nothing has been written.
      DivergedError: the loss or gradient is not finite; nothing has been saved since.
    """
    task = prepare(config)
    writers.check(directory, config)
    weights = None
    if config.init.weights:
        *weights, report = load_weights(task)
        _say(f'{config.init.weights}: {report}')
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(workdir.claimed(directory, config))
        stop = stack.enter_context(_stop_on_signals())

        # Where were we?
        checkpoints = Checkpoints(path / 'checkpoints', keep=config.checkpoint.keep)
        stack.callback(checkpoints.close)
        try:
            newest = checkpoints.latest(jax.eval_shape(lambda: init_state(task)), on_damage=_say)
        except DamagedCheckpointError as error:
            raise UsageError(f'{error}; to start anew give another --workdir') from error
        step, state = newest or (0, init_state(task, weights))
        summary_file = path / 'summary.json'
        if step == task.total_steps and summary_file.exists():
            _say(f'{path} is complete')
            return json.loads(summary_file.read_text())
        if step:
            _say(f'resuming {path} at step {step:,} of {task.total_steps:,}')
        state = parallel.replicate(state)
        metadata = pretrained.encode_metadata(describe_weights(task))
        workdir.write_text(path / 'model.json', metadata + '\n')

        # What happens in a step, and where it is told.
        train_step, eval_step = make_train_step(task), make_eval_step(task)
        bad = pipeline.BadPictures(task.skip_bad)
        batches = stack.enter_context(_open_batches(task, step, bad))
        primary = parallel.is_primary()
        writer = writers.open_writer(path, config=config, start_step=step, active=primary)
        stack.callback(writer.close)
        bar = progress.Progress(task.total_steps, active=primary)
        stack.callback(bar.close)
        clock = Clock(config.batch_size, batches)

        def due(every: int) -> bool:
            return step % every == 0 or step == task.total_steps

        stopping = False
        while step < task.total_steps and not stopping:
            batch = next(batches)
            with jax.transfer_guard('disallow'):
                state = train_step(state, batch)
            step, metrics = step + 1, None
            clock.tick(state)

            if due(task.log_every):
                _assert_finite(state, checkpoints)
                metrics = window.means(state.window) | clock.read()
                metrics |= {'skipped_pictures': len(bad)} if task.skip_bad else {}
                metrics['learning_rate'] = float(task.optimizer.learning_rate(step - 1))
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
            _say(f'stopped; step {step:,} is saved, and the same command continues from there')
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
    bad = window.first_nonfinite(state.window)
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
