"""What a trial of a study may do, each a function of its config and its directory.

Training is one of them. The others measure: they leave the same files as a training run
(config.json, metrics.jsonl), so that whoever reads runs reads them too.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments.experiment import Experiment, build
from experiments.run import metric_writers, parallel, workdir
from experiments.signal_propagation import measure_signal
from experiments.train import train
from experiments.train_step import Programs, TrainState, init_state, make_train_step, program_key
from nfnets_jax import augment
from nfnets_jax.data.sources import Source
from nfnets_jax.weights.checkpoints import Checkpoints


@dataclasses.dataclass
class Compiled:
    """What is compiled once for several trials, by what the programs depend on."""

    training: dict[str, Programs] = dataclasses.field(default_factory=dict)
    logits: dict[str, Callable] = dataclasses.field(default_factory=dict)
    memory: dict[str, float] = dataclasses.field(default_factory=dict)  # what one program takes


# (config, directory, compiled) -> metrics by name, or None if it was told to stop and will go on
# from where it was when called again.
Measurement = Callable[[ConfigDict, str | os.PathLike, Compiled], dict[str, Any] | None]

PROBES = 8  # pictures whose logits are looked at
DRAWS = 4  # sets of neighbours for each
_DISCREPANCY_PICTURES = 512


def training(config: ConfigDict, directory, compiled: Compiled) -> dict[str, Any] | None:
    """Trains; returns the last line's training metrics, the final ones, speed and size."""
    summary = train(config, directory, programs=compiled.training, quiet=True)
    if 'final' not in summary:
        return None
    told = ('images_per_second', 'training_seconds', 'compile_seconds', 'parameters')
    last = [line for line in metric_writers.read_metrics(directory) if 'train/loss' in line][-1]
    in_training = {name: value for name, value in last.items() if name.startswith('train/')}
    return in_training | summary['final'] | {name: summary[name] for name in told}


def signal_propagation(config: ConfigDict, directory, compiled: Compiled) -> dict[str, Any]:
    """Measures the signal at initialisation, block by block (arXiv 2101.08692, section 3).

    Noise of `config.batch_size` examples goes through the network with freshly drawn weights and
    gains of 1. The lines of metrics.jsonl are blocks, `step` their number.

    Returns:
      For each metric of `layers.signal_metrics` the value at the last block, 'signal/avg_var', and
      how many powers of ten lie between the largest and the least, 'signal/avg_var_decades': 0 if
      the signal stays as it is. (What grows exponentially has no mean over seeds to speak of.)
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
            # Branches belong to blocks 1, 2, ...; activations begin with the stem, at 0.
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
    """Measures how far what a trained network says of a picture depends on the batch it is in.

    The network is in training mode, as its loss sees it. Test pictures are put one by one into a
    batch of `config.batch_size`, whose other places are taken by training pictures, drawn anew
    `DRAWS` times.

    Returns:
      'dependence/logit_change': standard deviation of a logit over the draws, by its standard
        deviation over the pictures: root mean squares over classes, pictures.
      'dependence/prediction_change': share of the draws whose most likely class is not that of the
        first draw.
      'discrepancy/loss', 'discrepancy/top1': on the same training pictures, not augmented, in
        evaluation mode what is worse than in training mode with batches of `config.batch_size`:
        loss minus loss, top-1 minus top-1.
    """
    experiment = build(config)
    state = _final_state(experiment, directory)
    rng = np.random.default_rng(config.seed)
    # Of everything in a config these alone are in the program, besides the sizes of arrays.
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

    probes = _pictures(experiment.test_source, rng.choice(len(experiment.test_source), PROBES))
    draws = []
    for _ in range(DRAWS):
        chosen = rng.choice(len(experiment.train_source), config.batch_size - 1, replace=False)
        neighbours = _pictures(experiment.train_source, chosen)[0]
        draws.append(
            [logits(np.concatenate([image[None], neighbours]), True)[0] for image in probes[0]]
        )

    chosen = rng.permutation(len(experiment.train_source))
    count = max(1, _DISCREPANCY_PICTURES // config.batch_size) * config.batch_size
    chosen = chosen[: min(count, len(chosen) // config.batch_size * config.batch_size)]
    found: dict[bool, list] = {True: [], False: []}
    for part in chosen.reshape(-1, config.batch_size):
        images, labels = _pictures(experiment.train_source, part)
        for is_training, values in found.items():
            out = logits(images, is_training)
            losses = optax.softmax_cross_entropy_with_integer_labels(out, labels)
            values.append((np.mean(losses), np.mean(out.argmax(axis=-1) == labels)))
    (loss, top1) = np.mean(found[False], axis=0) - np.mean(found[True], axis=0)
    return change(np.array(draws)) | {
        'discrepancy/loss': float(loss),
        'discrepancy/top1': float(top1),
    }


def step_memory(config: ConfigDict, directory, compiled: Compiled) -> dict[str, Any]:
    """Measures the memory of a training step, which does not hang on what else the process did.

    Returns:
      'memory/step_mib': MiB on each device, as XLA lays out the compiled program: parameters,
        optimizer state and batch, and what comes and goes between them, activations most of all.
        A training set that lives on the devices is not counted, nor what libraries that the
        program calls take for themselves.
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
    'step_memory': step_memory,
}


def _final_state(experiment: Experiment, directory) -> TrainState:
    checkpoints = Checkpoints(os.path.join(directory, 'checkpoints'), read_only=True)
    try:
        return checkpoints.restore(
            experiment.total_steps, jax.eval_shape(lambda: init_state(experiment))
        )
    finally:
        checkpoints.close()


def _step_mib(experiment: Experiment) -> float:
    devices = jax.local_device_count()
    rows = parallel.local_batch_size(experiment.images_per_step) // devices
    batch = {
        'image': jax.ShapeDtypeStruct((devices, rows, *experiment.image_spec.shape), np.uint8),
        'label': jax.ShapeDtypeStruct((devices, rows), np.int32),
        'position': jax.ShapeDtypeStruct((devices, rows), np.int32),
        'stop': jax.ShapeDtypeStruct((devices, 1), np.float32),
    }
    state = jax.eval_shape(lambda: init_state(experiment))
    plan = make_train_step(experiment).lower(state, batch).compile().memory_analysis()
    assert plan is not None
    # What is updated in place is an argument and an output at once.
    outputs = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return (plan.argument_size_in_bytes + plan.temp_size_in_bytes + outputs) / 2**20


def _pictures(source: Source, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    examples = [source[int(i)] for i in indices]
    return (
        np.stack([example['image'] for example in examples]),
        np.array([example['label'] for example in examples]),
    )


def _make_logits(experiment: Experiment) -> Callable:
    """Returns a compiled function (params, state, uint8 images, is_training) -> logits."""

    @functools.partial(jax.jit, static_argnums=3)
    def logits(params, state, images, is_training):
        mean, std = experiment.image_spec.mean, experiment.image_spec.std
        images = augment.normalize(images, mean, std, experiment.config.precision)
        # A device axis of one: networks that average statistics over devices ask for its name.
        apply = jax.vmap(
            lambda x: experiment.model.apply(params, state, jax.random.key(0), x, is_training),
            axis_name=parallel.AXIS,
        )
        outputs, _ = apply(images[None])
        return outputs['logits'][0]

    return logits


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))
