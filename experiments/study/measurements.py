"""The measurements of a trial: functions of its config and its directory.

One of them trains. The others write the same files as a training run (config.json, metrics.jsonl),
so that whatever reads runs can read them too.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments.experiment import Experiment, build
from experiments.run import metric_writers, parallel, workdir
from experiments.run.predictions import make_predict_step, predict
from experiments.signal_propagation import measure_signal
from experiments.study import landscape, per_image
from experiments.train import train
from experiments.train_step import (
    Programs,
    TrainState,
    init_state,
    make_logits_fn,
    make_train_step,
    program_key,
)
from nfnets_jax import augment
from nfnets_jax.data.sources import Source
from nfnets_jax.errors import UsageError
from nfnets_jax.weights.checkpoints import CheckpointReader


@dataclasses.dataclass
class Compiled:
    """Compiled programs that trials share, by a key of what they depend on."""

    training: dict[str, Programs] = dataclasses.field(default_factory=dict)
    logits: dict[str, Callable] = dataclasses.field(default_factory=dict)
    memory: dict[str, float] = dataclasses.field(default_factory=dict)  # MiB of one program


# (config, directory, compiled) -> metrics by name, or None if it was stopped; called again, it
# resumes.
Measurement = Callable[[ConfigDict, str | os.PathLike, Compiled], dict[str, Any] | None]

PROBES = 8  # images whose logits are compared
DRAWS = 4  # batches for each of them
_DISCREPANCY_IMAGES = 512

STEP_SIZES = (0.5, 1.0, 2.0, 4.0)  # times the learning rate
DISTANCES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # times the norms of the filters
DIRECTIONS = 8
_LANDSCAPE_IMAGES = 128


def training(config: ConfigDict, directory, compiled: Compiled) -> dict[str, Any] | None:
    """Trains; returns the last line's training metrics, the final ones, speed and size.

    It also writes which images of each evaluated split are classified correctly: see `per_image`.
    """
    correct = {}

    def keep(split: str, is_correct: np.ndarray, source: Source) -> None:
        correct[split] = per_image.Correct(is_correct, source.checksum())

    summary = train(config, directory, programs=compiled.training, quiet=True, on_correct=keep)
    if 'final' not in summary:
        return None
    evaluated = {name for name in summary['final'] if name.endswith('/top1')}
    if evaluated == {f'{split}/top1' for split in correct}:
        per_image.write(directory, correct)
    else:  # it was evaluated before it was interrupted
        _write_per_image(build(config), directory, compiled)
    kept = ('images_per_second', 'training_seconds', 'compile_seconds', 'parameters')
    last = [line for line in metric_writers.read_metrics(directory) if 'train/loss' in line][-1]
    in_training = {name: value for name, value in last.items() if name.startswith('train/')}
    return in_training | summary['final'] | {name: summary[name] for name in kept}


def _write_per_image(experiment: Experiment, directory, compiled: Compiled) -> None:
    """Writes which images the trained network classifies correctly, if all can be read.

    Images with several labels are left out: their metric is no mean over images.
    """
    if experiment.multi_label:
        return
    key = f'per image: {program_key(experiment.config)}'
    step = compiled.logits.setdefault(key, make_predict_step(make_logits_fn(experiment)))
    correct = {}
    variables = parallel.replicate(_final_state(experiment, directory).variables())
    for split, source in experiment.evaluated.items():
        for name, found in predict(experiment, step, variables, split).items():
            if len(found.indices) < len(source):
                return
            correct[split + name] = per_image.Correct(found.is_correct, source.checksum())
    per_image.write(directory, correct)


def signal_propagation(config: ConfigDict, directory, compiled: Compiled) -> dict[str, Any]:
    """Measures the signal at initialization, block by block (arXiv 2101.08692, section 3).

    A batch of noise passes through the network with initial weights and gains of 1. Each line of
    metrics.jsonl is a block; `step` is its number.

    Returns:
      For each metric of `layers.signal_metrics`: the value at the last block, 'signal/avg_var', and
      the powers of ten between the largest and the smallest, 'signal/avg_var_decades', which is 0
      for a constant signal. (The mean over seeds of exponential growth says little.)
    """
    del compiled
    options = config.model.to_dict()
    signal = measure_signal(
        options.pop('name'),
        size=config.data.image_size,
        batch_size=config.batch_size,
        seed=config.seed,
        **options,
    )
    with workdir.claimed(directory, config) as path:
        writer = metric_writers.open_writer(path, config=config)
        for block in range(len(signal['avg_var'])):
            # Branches belong to blocks 1, 2, ...; activations start with the stem, at 0.
            writer.write(
                block,
                {
                    f'signal/{name}': values[block - (name == 'res_avg_var')]
                    for name, values in signal.items()
                    if block or name != 'res_avg_var'
                },
            )
        writer.close()
    last = {f'signal/{name}': float(values[-1]) for name, values in signal.items()}
    return last | {
        f'signal/{name}_decades': float(np.log10(np.max(values) / np.min(values)))
        for name, values in signal.items()
        if name != 'avg_sq_mean'
    }


def batch_dependence(config: ConfigDict, directory, compiled: Compiled) -> dict[str, Any]:
    """Measures how much a trained network's logits of an image depend on the rest of the batch.

    The network is in training mode, as for its loss. Each test image is put into a batch of
    `config.batch_size` with training images, which are drawn `DRAWS` times.

    Returns:
      'dependence/logit_change': standard deviation of a logit over the draws, divided by its
        standard deviation over the images: root mean squares over classes and images.
      'dependence/prediction_change': share of the draws whose most likely class differs from that
        of the first draw.
      'discrepancy/loss', 'discrepancy/top1': evaluation mode minus training mode, with batches of
        `config.batch_size`, on the same training images without augmentation.
    """
    experiment = build(config)
    state = _final_state(experiment, directory)
    rng = np.random.default_rng(config.seed)
    # Besides the sizes of arrays, the program depends only on these parts of the config.
    key = f'{config.model.to_json(sort_keys=True)} in {config.precision}'
    program = compiled.logits.setdefault(key, _make_logits(experiment))

    def logits(images: np.ndarray, is_training: bool) -> np.ndarray:
        return np.asarray(program(state.params, state.state, images, is_training))

    def change(draws: np.ndarray) -> dict[str, float]:
        spread, size = draws.std(axis=0), draws.mean(axis=0).std(axis=0)
        predictions = draws.argmax(axis=-1)
        return {
            'dependence/logit_change': float(_rms(spread) / _rms(size)),
            'dependence/prediction_change': float((predictions[1:] != predictions[0]).mean()),
        }

    drawn = rng.choice(len(experiment.test_source), PROBES)
    probes = _load_images(experiment, experiment.test_source, drawn)
    draws = []
    for _ in range(DRAWS):
        chosen = rng.choice(len(experiment.train_source), config.batch_size - 1, replace=False)
        neighbors = _load_images(experiment, experiment.train_source, chosen)[0]
        draws.append(
            [logits(np.concatenate([image[None], neighbors]), True)[0] for image in probes[0]]
        )

    chosen = rng.permutation(len(experiment.train_source))
    count = max(1, _DISCREPANCY_IMAGES // config.batch_size) * config.batch_size
    chosen = chosen[: min(count, len(chosen) // config.batch_size * config.batch_size)]
    found: dict[bool, list] = {True: [], False: []}
    for part in chosen.reshape(-1, config.batch_size):
        images, labels = _load_images(experiment, experiment.train_source, part)
        for is_training, values in found.items():
            out = logits(images, is_training)
            losses = optax.softmax_cross_entropy_with_integer_labels(out, labels)
            values.append((np.mean(losses), np.mean(out.argmax(axis=-1) == labels)))
    (loss, top1) = np.mean(found[False], axis=0) - np.mean(found[True], axis=0)
    return change(np.array(draws)) | {
        'discrepancy/loss': float(loss),
        'discrepancy/top1': float(top1),
    }


def loss_landscape(config: ConfigDict, directory, compiled: Compiled) -> dict[str, Any]:
    """Measures the loss around the parameters of a run: see `landscape`.

    It is the loss in training mode of images that were drawn once, without augmentation. Along the
    gradient it is measured at initialization and at every checkpoint, a line of metrics.jsonl each,
    at `STEP_SIZES` times the peak of the learning rate. Along random directions it is measured at
    the end: the `step` of these lines is the distance in percent of the norms of the filters.

    Returns:
      The median over initialization and checkpoints of each metric of `landscape.along_gradient`,
      and 'landscape/random_rise': the loss at half the norms, less that at the parameters.
    """
    experiment = build(config)
    rng = np.random.default_rng(config.seed)
    images = min(_LANDSCAPE_IMAGES, len(experiment.train_source))
    drawn = rng.choice(len(experiment.train_source), images, replace=False)
    batch = _load_images(experiment, experiment.train_source, drawn)
    key = f'landscape: {config.model.to_json(sort_keys=True)} in {config.precision}'
    value_and_grad = compiled.logits.setdefault(
        key, jax.jit(jax.value_and_grad(_make_loss(experiment)))
    )
    rate = float(np.asarray(experiment.optimizer.hyperparameters.learning_rate))
    sizes = [size * rate for size in STEP_SIZES]
    lines: list[tuple[int, dict[str, float]]] = []
    for step, state in _states(experiment, directory):
        at = functools.partial(value_and_grad, state=state.state, batch=batch)
        lines.append((step, landscape.along_gradient(at, state.params, sizes)))
    medians = {name: float(np.median([line[name] for _, line in lines])) for name in lines[0][1]}
    keys = jax.random.split(jax.random.key(config.seed), DIRECTIONS)
    found = landscape.along_random(lambda x: at(x)[0], state.params, DISTANCES, keys)
    lines += [
        (round(100 * far), {'random_loss': loss})
        for far, loss in zip(DISTANCES, found, strict=True)
    ]
    with workdir.claimed(directory, config) as path:
        known = metric_writers.read_metrics(path)  # A killed trial has written some of them.
        # Nothing that training wrote is dropped.
        writer = metric_writers.open_writer(
            path, config=config, start_step=max(experiment.total_steps, 100)
        )
        for step, metrics in lines:
            named = {f'landscape/{name}': x for name, x in metrics.items()}
            if {'step': step, **named} not in known:
                writer.write(step, named)
        writer.close()
    medians['random_rise'] = float(found[DISTANCES.index(0.5)] - found[0])
    return {f'landscape/{name}': value for name, value in medians.items()}


def step_memory(config: ConfigDict, directory, compiled: Compiled) -> dict[str, Any]:
    """Measures the memory of a training step, independent of what else the process did.

    Returns:
      'memory/step_mib': MiB on each device, as XLA lays out the compiled program: parameters,
        optimizer state, batch and temporaries, which are mostly activations. It counts neither a
        training set on the devices nor the workspace of libraries that the program calls.
    """
    del directory
    key = program_key(config)
    if key not in compiled.memory:
        compiled.memory[key] = _step_mib(dataclasses.replace(build(config), on_device=False))
    return {'memory/step_mib': compiled.memory[key]}


MEASUREMENTS: dict[str, Measurement] = {
    'train': training,
    'signal_propagation': signal_propagation,
    'batch_dependence': batch_dependence,
    'loss_landscape': loss_landscape,
    'step_memory': step_memory,
}


def check(names: Sequence[str], experiment: Experiment) -> None:
    """Raises a UsageError if one of the measurements cannot be made of an experiment."""
    if experiment.multi_label and (wrong := {'batch_dependence', 'loss_landscape'} & set(names)):
        raise UsageError(f'config.measure: {min(wrong)!r} is for images with one label')


def _final_state(experiment: Experiment, directory) -> TrainState:
    template = jax.eval_shape(lambda: init_state(experiment))
    checkpoints = CheckpointReader(os.path.join(directory, 'checkpoints'))
    return checkpoints.restore(experiment.total_steps, template)


def _states(experiment: Experiment, directory) -> Iterator[tuple[int, TrainState]]:
    """Yields step and state at initialization and at every checkpoint of a run."""
    initial = init_state(experiment)
    yield 0, initial
    template = jax.eval_shape(lambda: initial)
    checkpoints = CheckpointReader(os.path.join(directory, 'checkpoints'))
    for step in sorted(checkpoints.steps()):
        yield step, checkpoints.restore(step, template)


def _step_mib(experiment: Experiment) -> float:
    devices = len(parallel.local_devices())
    rows = parallel.local_batch_size(experiment.images_per_step) // devices
    label = experiment.label_spec
    batch = {
        'image': jax.ShapeDtypeStruct((devices, rows, *experiment.image_spec.shape), np.uint8),
        'label': jax.ShapeDtypeStruct((devices, rows, *label.shape), label.dtype),
        'position': jax.ShapeDtypeStruct((devices, rows), np.int32),
        'stop': jax.ShapeDtypeStruct((devices, 1), np.float32),
    }
    state = jax.eval_shape(lambda: init_state(experiment))
    plan = make_train_step(experiment).lower(state, batch).compile().memory_analysis()
    assert plan is not None
    # Buffers updated in place are both argument and output.
    outputs = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return (plan.argument_size_in_bytes + plan.temp_size_in_bytes + outputs) / 2**20


def _load_images(
    experiment: Experiment, source: Source, indices: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns images of a source as evaluation sees them, and their labels."""
    transform = experiment.image_spec.test_transform or (lambda image, rng: image)
    examples = [source[int(i)] for i in indices]
    return (
        np.stack([transform(example['image'], None) for example in examples]),
        np.array([example['label'] for example in examples]),
    )


def _make_logits(experiment: Experiment) -> Callable:
    """Returns a compiled function (params, state, uint8 images, is_training) -> logits."""

    @functools.partial(jax.jit, static_argnums=3)
    def logits(params, state, images, is_training):
        mean, std = experiment.image_spec.mean, experiment.image_spec.std
        images = augment.normalize(images, mean, std, experiment.config.precision)
        # A device axis of size one: networks that average statistics over devices need its name.
        apply = jax.vmap(
            lambda x: experiment.model.apply(params, state, jax.random.key(0), x, is_training),
            axis_name=parallel.AXIS,
        )
        outputs, _ = apply(images[None])
        return outputs['logits'][0]

    return logits


def _make_loss(experiment: Experiment) -> Callable:
    """Returns a function (params, state, batch of images and labels) -> loss in training mode."""
    logits = _make_logits(experiment)

    def loss(params, state, batch):
        images, labels = batch
        found = logits(params, state, images, True)
        return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()

    return loss


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))
