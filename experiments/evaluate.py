"""Evaluates a trained run exactly: every test image once, raw and EMA parameters.

    python -m experiments.evaluate --workdir=runs/digits [--checkpoint=best] [--split=validation]

It prints the figures that training printed for the same checkpoint, whatever the batch size and
the number of devices and processes. With --watch it follows a running job: it evaluates each
checkpoint as it appears, keeps the figures in evaluations.jsonl, and ends with the run.

The data must be those that the run was trained on. If they have moved, give --config.data.path=...
or --config.data.data_dir=...; --config.data.skip_bad=1 skips an unreadable image.
"""

import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments.experiment import (
    Experiment,
    build,
    describe_data,
    describe_devices,
    describe_network,
)
from experiments.launch import cli
from experiments.run import data_record, evaluation, parallel, workdir
from experiments.run.summary import SUMMARY_FILE
from experiments.train_step import TrainState, init_state, make_eval_step
from nfnets_jax import files
from nfnets_jax.data.splits import SPLITS
from nfnets_jax.errors import UsageError, nearest
from nfnets_jax.weights.checkpoints import Checkpoints, DamagedCheckpointError

EVALUATIONS_FILE = 'evaluations.jsonl'


class Options(NamedTuple):
    """How the evaluation differs from that during training.

    Attributes:
      batch_size: examples at a time; None: as in training.
      split: 'test', 'validation' or 'train'; None: 'test', or the split that a watched job chooses
        its best checkpoint on.
      data: options of config.data that differ, see `DATA_OPTIONS`.
    """

    batch_size: int | None = None
    split: str | None = None
    data: Mapping[str, Any] = MappingProxyType({})


# Options of config.data that do not change the data, and their types.
DATA_OPTIONS: Mapping[str, type] = MappingProxyType({'path': str, 'data_dir': str, 'skip_bad': int})


def evaluate(
    directory: str,
    checkpoint: str = 'latest',
    batch_size: int | None = None,
    *,
    split: str | None = None,
    data: Mapping[str, Any] = MappingProxyType({}),
    log: Callable[[str], None] = lambda line: None,
) -> dict:
    """Returns {'step', 'test/top1', 'test/top5', 'test/loss'} of a run, and 'test_ema/...'.

    Only process 0 needs to see the directory.

    Args:
      directory: directory of the run.
      checkpoint: 'latest', 'best' or a step.
      batch_size, split, data: see `Options`.
      log: receives lines about network, data and checkpoint before anything is compiled.

    Raises:
      UsageError: there is no such run or checkpoint, it is damaged, or its data have changed.
    """
    fields = parallel.from_primary(_read_fields, directory)
    evaluate_state, template, lines = _make_evaluator(
        fields, Options(batch_size, split or 'test', data), directory
    )
    step, state = None, template
    if parallel.is_primary():
        step, state = _restore(directory, checkpoint, template)
        for line in (*lines, f'run: {directory}, step {step:,}', 'compiling'):
            log(line)
    return {'step': parallel.broadcast_json(step)} | evaluate_state(state)


def watch(
    directory: str,
    batch_size: int | None = None,
    *,
    seconds: float = 10.0,
    split: str | None = None,
    data: Mapping[str, Any] = MappingProxyType({}),
    log: Callable[[str], None] = lambda line: None,
) -> Iterator[dict]:
    """Yields the result of `evaluate` for each checkpoint of a run until the run is complete.

    Each result is appended to the run's EVALUATIONS_FILE; those in it are not computed again. A
    checkpoint that the run has removed is skipped, and a damaged one is reported.

    Args:
      directory: directory of the run; if there is no run yet, `watch` waits for it.
      batch_size, split, data, log: as in `evaluate`.
      seconds: seconds between two looks at the directory.
    """
    config_file = pathlib.Path(directory) / 'config.json'
    if parallel.is_primary() and not config_file.exists():
        print(f'waiting for a run in {directory}', file=sys.stderr)
    fields = _wait_for(lambda: _read_fields(directory) if config_file.exists() else None, seconds)
    evaluate_state, template, lines = _make_evaluator(
        fields, Options(batch_size, split, data), directory
    )
    follow = None
    if parallel.is_primary():
        for line in (*lines, f'run: {directory}, every checkpoint'):
            log(line)
        follow = _Follower(directory, template, evaluate_state.split)
    while (step := _wait_for(lambda: follow and follow.next_step(), seconds)) != 'complete':
        results = {'step': step} | evaluate_state(follow.state if follow else template)
        if follow:
            follow.record(results)
        yield results


def _read_fields(directory: str) -> dict:
    """Returns the config of a run and the record of its data."""
    config = workdir.as_json(workdir.load_config(directory))
    return {'config': config, 'data': data_record.read(directory)}


class _Evaluator:
    """A function (process 0's state) -> metrics of a split."""

    def __init__(self, experiment: Experiment, split: str):
        self.split = split
        self._experiment, self._step = experiment, make_eval_step(experiment)

    def __call__(self, state: TrainState) -> dict[str, float]:
        variables = TrainState(*state).variables()
        placed = parallel.replicate(parallel.broadcast(variables))
        return evaluation.evaluate(self._experiment, self._step, placed, self.split)


def _make_evaluator(
    fields: dict, options: Options, directory: str
) -> tuple[_Evaluator, TrainState, list[str]]:
    """Returns the evaluator of a run, the shapes of its state, and lines that describe both."""
    config = ConfigDict(fields['config'])
    if options.batch_size is not None:
        config.eval.batch_size = options.batch_size
    with config.data.ignore_type():
        for name, value in options.data.items():
            if name != 'skip_bad' and name not in config.data:
                raise UsageError(f'config.data.{name}: not an option of {config.data.name!r}')
            config.data[name] = value
    experiment = build(config, training=False)
    split = options.split or experiment.watched
    if split not in experiment.splits:
        raise UsageError(f'--split={split}: no such split{nearest(split, experiment.splits)}')
    if fields['data']:
        found = data_record.make_record(experiment.splits)
        if changed := data_record.changes(fields['data'], found, (split,)):
            raise UsageError(
                f'--workdir={directory} holds a run on other data: '
                f'{data_record.in_words(changed, "give --config.data.path of the same data")}'
            )
    lines = [
        describe_network(experiment),
        *describe_data(experiment),
        f'evaluation: the {split} images, on {describe_devices()}',
    ]
    template = jax.eval_shape(lambda: init_state(experiment))
    return _Evaluator(experiment, split), template, lines


def _restore(directory: str, checkpoint: str, template: TrainState) -> tuple[int, TrainState]:
    checkpoints = Checkpoints(f'{directory}/checkpoints', read_only=True)
    try:
        step = checkpoints.choose(checkpoint)
        return step, checkpoints.restore(step, template)
    except DamagedCheckpointError as error:
        raise UsageError(
            f'checkpoint {step} of {directory} is damaged ({error}); '
            'choose another with --checkpoint=STEP'
        ) from error
    finally:
        checkpoints.close()


def _wait_for(look: Callable[[], Any], seconds: float) -> Any:
    """Returns the first result of look() on process 0 that is not None; others do not look."""
    while True:
        seen = parallel.from_primary(look)
        if seen is not None:
            return seen
        # The others wait in the next broadcast, not longer than a collective operation may.
        time.sleep(seconds if parallel.is_primary() else 0)


class _Follower:
    """Restores the checkpoints of a running job one by one, and records their evaluations."""

    def __init__(self, directory: str, template: TrainState, split: str):
        self._directory, self._template = pathlib.Path(directory), template
        self._checkpoints = Checkpoints(self._directory / 'checkpoints', read_only=True)
        self._file = self._directory / EVALUATIONS_FILE
        self._lines = self._file.read_text().splitlines() if self._file.exists() else []
        try:
            found = [json.loads(line) for line in self._lines]
            self._seen = {one['step'] for one in found if f'{split}/top1' in one}
        except (ValueError, TypeError, KeyError):
            raise UsageError(
                f'{self._file} holds a line that is not an evaluation: remove it'
            ) from None
        self.state = template

    def next_step(self) -> int | str | None:
        """Restores the oldest new checkpoint into `state` and returns its step.

        Returns 'complete' after the last one, and None if there is no new one yet.
        """
        # Looked up first: a complete run has all its checkpoints.
        complete = (self._directory / SUMMARY_FILE).exists()
        for step in self._checkpoints.steps():
            if step in self._seen:
                continue
            self._seen.add(step)
            try:
                self.state = self._checkpoints.restore(step, self._template)
                return step
            except DamagedCheckpointError as error:
                if step in self._checkpoints.steps():  # Else the run has removed it.
                    print(f'checkpoint {step} is damaged ({error})', file=sys.stderr)
        return 'complete' if complete else None

    def record(self, results: dict) -> None:
        self._lines.append(json.dumps(results))
        files.atomic_write(self._file, '\n'.join([*self._lines, '']))


def main() -> None:
    args = flags.FLAGS
    given = {name: args[f'config.data.{name}'].value for name in DATA_OPTIONS}
    options = {
        'batch_size': args.batch_size,
        'split': args.split,
        'data': {name: value for name, value in given.items() if value is not None},
        'log': lambda line: print(line, file=sys.stderr, flush=True),
    }
    if args.watch:
        if args.checkpoint != 'latest':
            raise UsageError('--watch evaluates all checkpoints: leave --checkpoint out')
        found = watch(args.workdir, **options)
    else:
        found = iter([evaluate(args.workdir, args.checkpoint, **options)])
    for results in found:
        if parallel.is_primary():
            line = f'step {results["step"]:,}: {evaluation.describe_accuracy(results)}'
            print(json.dumps(results) if args.json else line, flush=True)


if __name__ == '__main__':
    cli.define_workdir('Directory of the run.', required=True)
    flags.DEFINE_string(
        'checkpoint', 'latest', "Checkpoint to evaluate: 'latest', 'best', or a step."
    )
    flags.DEFINE_enum(
        'split',
        None,
        SPLITS,
        "Images: 'test', 'validation' or 'train'. By default 'test', with --watch those that the "
        'run chooses its best checkpoint on.',
    )
    flags.DEFINE_integer(
        'batch_size', None, 'Examples at a time; by default as in training.', lower_bound=1
    )
    cli.define_path('config.data.path', None, 'Where the same data are now.')
    cli.define_path('config.data.data_dir', None, 'Where the same TFDS data sets are now.')
    flags.DEFINE_integer('config.data.skip_bad', None, 'How many unreadable images to skip.')
    flags.DEFINE_bool('json', False, 'Print all metrics as one JSON object.')
    flags.DEFINE_bool('watch', False, 'Evaluate each checkpoint of a running job as it appears.')
    cli.run(main, distributed=True)
