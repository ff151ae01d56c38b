"""Evaluates a trained run exactly: every test image once, raw and EMA parameters.

    python -m experiments.evaluate --workdir=runs/digits [--checkpoint=best] [--split=validation]

It prints the figures that training printed for the same checkpoint, whatever the batch size and
the number of devices and processes. With --watch it follows a job that is training: it evaluates
each checkpoint as it appears, keeps the figures in evaluations.jsonl, and ends with the run.

The data must be those that the run was trained on. If they lie in another place now, say where:
--config.data.path=... or --config.data.data_dir=...; --config.data.skip_bad=1 leaves out an image
that cannot be read.
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

from experiments import experiment
from experiments.experiment import describe
from experiments.launch import cli
from experiments.run import data_record, parallel, workdir
from nfnets_jax import files
from nfnets_jax.data.splits import SPLITS
from nfnets_jax.errors import UsageError, nearest
from nfnets_jax.weights.checkpoints import CheckpointReader, DamagedCheckpointError

EVALUATIONS_FILE = 'evaluations.jsonl'


class Options(NamedTuple):
    """How to evaluate, where it is not as in training.

    Attributes:
      batch_size: examples at a time; None: as in training.
      split: 'test', 'validation' or 'train'; None: 'test', and where a job is watched the split
        that it chooses its best checkpoint on.
      data: options of config.data that may differ, see `DATA_OPTIONS`.
    """

    batch_size: int | None = None
    split: str | None = None
    data: Mapping[str, Any] = MappingProxyType({})


# Options of config.data with which the data are still the same, and their types.
DATA_OPTIONS: Mapping[str, type] = MappingProxyType({'path': str, 'data_dir': str, 'skip_bad': int})


def evaluate(
    directory: str,
    checkpoint: str = 'latest',
    batch_size: int | None = None,
    *,
    split: str | None = None,
    data: Mapping[str, Any] = MappingProxyType({}),
    say: Callable[[str], None] = lambda line: None,
) -> dict:
    """Returns {'step', 'test/top1', 'test/top5', 'test/loss'} of a run, and 'test_ema/...'.

    Of several processes process 0 alone needs to see the directory.

    Args:
      directory: of the run.
      checkpoint: 'latest', 'best' or a step.
      batch_size, split, data: see `Options`.
      say: told what is evaluated on what, a line each, before anything is compiled.

    Raises:
      UsageError: there is no run, or not that checkpoint, or it is damaged, or its data have
        changed.
    """
    fields = _fields(directory) if parallel.is_primary() else None
    evaluate_state, like, lines = _evaluator(
        parallel.broadcast_json(fields), Options(batch_size, split or 'test', data), directory
    )
    step, state = None, like
    if parallel.is_primary():
        step, state = _restore(directory, checkpoint, like)
        for line in (*lines, f'run: {directory}, step {step:,}', 'compiling'):
            say(line)
    return {'step': parallel.broadcast_json(step)} | evaluate_state(state)


def watch(
    directory: str,
    batch_size: int | None = None,
    *,
    seconds: float = 10.0,
    split: str | None = None,
    data: Mapping[str, Any] = MappingProxyType({}),
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[dict]:
    """Yields what `evaluate` returns for each checkpoint of a run, once, until that is complete.

    Each is appended to the run's EVALUATIONS_FILE; what is there already is not evaluated again.
    A checkpoint that the run has removed before its turn is passed over, a damaged one is told.

    Args:
      directory: of the run; where there is none yet, it is waited for.
      batch_size, split, data, say: as in `evaluate`.
      seconds: between two looks at the directory.
    """
    config_file = pathlib.Path(directory) / 'config.json'
    if parallel.is_primary() and not config_file.exists():
        print(f'waiting for a run in {directory}', file=sys.stderr)
    fields = _wait_for(lambda: _fields(directory) if config_file.exists() else None, seconds)
    evaluate_state, like, lines = _evaluator(fields, Options(batch_size, split, data), directory)
    follow = None
    if parallel.is_primary():
        for line in (*lines, f'run: {directory}, every checkpoint'):
            say(line)
        follow = _Follower(directory, like, evaluate_state.split)
    while (step := _wait_for(lambda: follow and follow.next_step(), seconds)) != 'complete':
        results = {'step': step} | evaluate_state(follow.state if follow else like)
        if follow:
            follow.record(results)
        yield results


def _fields(directory: str) -> dict:
    """Returns what process 0 alone can read of a run: its config, and the record of its data."""
    config = workdir.as_json(workdir.load_config(directory))
    return {'config': config, 'data': data_record.read(directory)}


class _Evaluate:
    """A function (process 0's state) -> metrics of a split."""

    def __init__(self, setting: experiment.Task, split: str):
        self.split = split
        self._setting, self._step = setting, experiment.make_eval_step(setting)

    def __call__(self, state: experiment.TrainState) -> dict[str, float]:
        variables = experiment.TrainState(*state).variables()
        placed = parallel.replicate(parallel.broadcast(variables))
        return experiment.evaluate(self._setting, self._step, placed, self.split)


def _evaluator(
    fields: dict, options: Options, directory: str
) -> tuple[_Evaluate, experiment.TrainState, list[str]]:
    """Returns what evaluates, the shapes of a state, and what to say of both."""
    config = ConfigDict(fields['config'])
    if options.batch_size is not None:
        config.eval.batch_size = options.batch_size
    with config.data.ignore_type():
        for name, value in options.data.items():
            if name != 'skip_bad' and name not in config.data:
                raise UsageError(f'config.data.{name}: not an option of {config.data.name!r}')
            config.data[name] = value
    setting = experiment.prepare(config, training=False)
    split = options.split or setting.watched
    if split not in setting.splits:
        raise UsageError(f'--split={split}: no such split{nearest(split, setting.splits)}')
    if fields['data']:
        found = data_record.describe(setting.splits)
        if changed := data_record.changes(fields['data'], found, (split,)):
            raise UsageError(
                f'--workdir={directory} holds a run on other data: '
                f'{data_record.in_words(changed, "give --config.data.path of the same data")}'
            )
    lines = [
        experiment.describe_network(setting),
        *experiment.describe_data(setting),
        f'evaluation: the {split} images, on {experiment.describe_devices()}',
    ]
    like = jax.eval_shape(lambda: experiment.init_state(setting))
    return _Evaluate(setting, split), like, lines


def _restore(
    directory: str, checkpoint: str, like: experiment.TrainState
) -> tuple[int, experiment.TrainState]:
    checkpoints = CheckpointReader(f'{directory}/checkpoints')
    step = checkpoints.choose(checkpoint)
    try:
        return step, checkpoints.restore(step, like)
    except DamagedCheckpointError as error:
        raise UsageError(
            f'checkpoint {step} of {directory} is damaged ({error}); '
            'choose another with --checkpoint=STEP'
        ) from error


def _wait_for(look: Callable[[], Any], seconds: float) -> Any:
    """Returns what process 0 sees as soon as that is not None; the others do not look."""
    while True:
        seen = parallel.broadcast_json(look() if parallel.is_primary() else None)
        if seen is not None:
            return seen
        # The others wait in the next broadcast, never longer than a collective operation may.
        time.sleep(seconds if parallel.is_primary() else 0)


class _Follower:
    """The checkpoints of a running job one after the other, and what was found of each."""

    def __init__(self, directory: str, like: experiment.TrainState, split: str):
        self._directory, self._like = pathlib.Path(directory), like
        self._checkpoints = CheckpointReader(self._directory / 'checkpoints')
        self._file = self._directory / EVALUATIONS_FILE
        self._lines = self._file.read_text().splitlines() if self._file.exists() else []
        try:
            found = [json.loads(line) for line in self._lines]
            self._seen = {one['step'] for one in found if f'{split}/top1' in one}
        except (ValueError, TypeError, KeyError):
            raise UsageError(
                f'{self._file} holds a line that is no evaluation: remove it'
            ) from None
        self.state = like

    def next_step(self) -> int | str | None:
        """Restores the oldest that is new into `state`; 'complete' at the end, None for not yet."""
        # First: what a run has saved before it was complete is there now.
        complete = (self._directory / 'summary.json').exists()
        for step in self._checkpoints.steps():
            if step in self._seen:
                continue
            self._seen.add(step)
            try:
                self.state = self._checkpoints.restore(step, self._like)
                return step
            except DamagedCheckpointError as error:
                if step in self._checkpoints.steps():  # Else the run has removed it meanwhile.
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
        'say': lambda line: print(line, file=sys.stderr, flush=True),
    }
    if args.watch:
        if args.checkpoint != 'latest':
            raise UsageError('--watch evaluates all checkpoints: leave --checkpoint out')
        found = watch(args.workdir, **options)
    else:
        found = iter([evaluate(args.workdir, args.checkpoint, **options)])
    for results in found:
        if parallel.is_primary():
            line = f'step {results["step"]:,}: {describe(results)}'
            print(json.dumps(results) if args.json else line, flush=True)


if __name__ == '__main__':
    cli.define_workdir('The directory of the run.', required=True)
    flags.DEFINE_string(
        'checkpoint', 'latest', "Which one: 'latest', 'best', or the step of one that is kept."
    )
    flags.DEFINE_enum(
        'split',
        None,
        SPLITS,
        "Which images: 'test', 'validation' or 'train'. By default 'test'; with --watch those that "
        'the run chooses its best checkpoint on.',
    )
    flags.DEFINE_integer(
        'batch_size', None, 'Examples at a time; by default as in training.', lower_bound=1
    )
    cli.define_path('config.data.path', None, 'Where the same data lie now.')
    cli.define_path('config.data.data_dir', None, 'Where the same data sets of TFDS lie now.')
    flags.DEFINE_integer('config.data.skip_bad', None, 'Unreadable images to leave out.')
    flags.DEFINE_bool('json', False, 'Print one JSON object, all metrics in it.')
    flags.DEFINE_bool('watch', False, 'Evaluate each checkpoint of a running job as it appears.')
    cli.run(main, distributed=True)
