"""Evaluates a trained run exactly: every test picture once, raw and EMA parameters.

    python -m experiments.evaluate --workdir=runs/digits [--checkpoint=best]

It prints the figures that training printed for the same checkpoint, whatever the batch size and
the number of devices and processes. With --watch it follows a job that is training: it evaluates
each checkpoint as it appears, keeps the figures in evaluations.jsonl, and ends with the run.
"""

import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments import cli, task, workdir
from experiments.task import describe
from nfnets_jax import files, parallel
from nfnets_jax.checkpoints import Checkpoints, DamagedCheckpointError
from nfnets_jax.errors import UsageError

EVALUATIONS_FILE = 'evaluations.jsonl'


def evaluate(directory: str, checkpoint: str = 'latest', batch_size: int | None = None) -> dict:
    """Returns {'step', 'test/top1', 'test/top5', 'test/loss'} of a run, and 'test_ema/...'.

    Of several processes process 0 alone needs to see the directory.

    Raises:
      UsageError: there is no run, or not that checkpoint, or it is damaged.
    """
    fields = _fields(directory) if parallel.is_primary() else None
    evaluate_state, like = _evaluator(parallel.broadcast_json(fields), batch_size)
    step, state = None, like
    if parallel.is_primary():
        step, state = _restore(directory, checkpoint, like)
    return {'step': parallel.broadcast_json(step)} | evaluate_state(state)


def watch(
    directory: str, batch_size: int | None = None, *, seconds: float = 10.0
) -> Iterator[dict]:
    """Yields what `evaluate` returns for each checkpoint of a run, once, until that is complete.

    Each is appended to the run's EVALUATIONS_FILE; what is there already is not evaluated again.
    A checkpoint that the run has removed before its turn is passed over, a damaged one is told.

    Args:
      directory: of the run; where there is none yet, it is waited for.
      batch_size: as in `evaluate`.
      seconds: between two looks at the directory.
    """
    config_file = pathlib.Path(directory) / 'config.json'
    if parallel.is_primary() and not config_file.exists():
        print(f'waiting for a run in {directory}', file=sys.stderr)
    fields = _wait_for(lambda: _fields(directory) if config_file.exists() else None, seconds)
    evaluate_state, like = _evaluator(fields, batch_size)
    follow = _Follower(directory, like) if parallel.is_primary() else None
    while (step := _wait_for(lambda: follow.next_step(), seconds)) != 'complete':
        results = {'step': step} | evaluate_state(follow.state if follow else like)
        if follow:
            follow.record(results)
        yield results


def _fields(directory: str) -> dict:
    return workdir.as_json(workdir.load_config(directory))


def _evaluator(fields: dict, batch_size: int | None) -> tuple[Callable, task.TrainState]:
    """Returns a function (process 0's state) -> metrics, and the shapes of such a state."""
    config = ConfigDict(fields)
    if batch_size is not None:
        config.eval.batch_size = batch_size
    setting = task.prepare(config, training=False)
    eval_step = task.make_eval_step(setting)

    def evaluate_state(state):
        variables = task.TrainState(*state).variables()
        return task.evaluate(setting, eval_step, parallel.replicate(parallel.broadcast(variables)))

    return evaluate_state, jax.eval_shape(lambda: task.init_state(setting))


def _restore(directory: str, checkpoint: str, like: task.TrainState) -> tuple[int, task.TrainState]:
    checkpoints = Checkpoints(f'{directory}/checkpoints', read_only=True)
    try:
        step = checkpoints.choose(checkpoint)
        return step, checkpoints.restore(step, like)
    except DamagedCheckpointError as error:
        raise UsageError(
            f'checkpoint {step} of {directory} is damaged ({error}); '
            'choose another with --checkpoint=STEP'
        ) from error
    finally:
        checkpoints.close()


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

    def __init__(self, directory: str, like: task.TrainState):
        self._directory, self._like = pathlib.Path(directory), like
        self._checkpoints = Checkpoints(self._directory / 'checkpoints', read_only=True)
        self._file = self._directory / EVALUATIONS_FILE
        self._lines = self._file.read_text().splitlines() if self._file.exists() else []
        try:
            self._seen = {json.loads(line)['step'] for line in self._lines}
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
        files.write_whole(self._file, '\n'.join([*self._lines, '']))


def main() -> None:
    args = flags.FLAGS
    if args.watch:
        if args.checkpoint != 'latest':
            raise UsageError('--watch evaluates all checkpoints: leave --checkpoint out')
        found = watch(args.workdir, args.batch_size)
    else:
        found = iter([evaluate(args.workdir, args.checkpoint, args.batch_size)])
    for results in found:
        if parallel.is_primary():
            line = f'step {results["step"]:,}: {describe(results)}'
            print(json.dumps(results) if args.json else line, flush=True)


if __name__ == '__main__':
    cli.define_workdir('The directory of the run.', required=True)
    flags.DEFINE_string(
        'checkpoint', 'latest', "Which one: 'latest', 'best', or the step of one that is kept."
    )
    flags.DEFINE_integer(
        'batch_size', None, 'Examples at a time; by default as in training.', lower_bound=1
    )
    flags.DEFINE_bool('json', False, 'Print one JSON object, all metrics in it.')
    flags.DEFINE_bool('watch', False, 'Evaluate each checkpoint of a running job as it appears.')
    cli.run(main, distributed=True)
