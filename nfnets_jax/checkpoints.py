"""Checkpoints that survive: the one module that knows Orbax.

A checkpoint is a directory named by its step. It appears under that name only when it is
whole (Orbax writes beside it and renames), it holds a checksum of every array, and a damaged
one is recognised, set aside and never overwritten.
"""

import contextlib
import gc
import logging
import pathlib
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

PyTree = Any


class DamagedCheckpointError(Exception):
    """The files of a checkpoint cannot be read, or do not hold what was written."""


class _KeepLatestAndBest:
    """Orbax preservation policy: the newest `keep` checkpoints and the best-scored one."""

    def __init__(self, keep: int, scores: dict[int, float]):
        self._keep, self._scores = keep, scores

    def should_preserve(self, checkpoints, *, context):
        del context
        steps = [c.step for c in checkpoints]
        newest = set(sorted(steps)[-self._keep :])
        best = _best(self._scores, steps)
        return [step in newest or step == best for step in steps]


def _best(scores: dict[int, float], steps) -> int | None:
    scored = [step for step in steps if step in scores]
    # Of equal scores the earliest: the run got there first.
    return min(scored, key=lambda step: (-scores[step], step), default=None)


class Checkpoints:
    """The checkpoints of one run: `save`, `restore`, `latest`, `best`.

    Args:
      directory: where they are, created if need be.
      keep: how many of the newest to keep; the best-scored one is kept besides.
      read_only: for evaluation beside a running job; nothing is created, moved or removed.
    """

    def __init__(self, directory, *, keep: int = 3, read_only: bool = False):
        self._directory = pathlib.Path(directory).absolute()
        self._read_only = read_only
        self._scores: dict[int, float] = {}
        with _orbax_speaks_through_us():
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_KeepLatestAndBest(keep, self._scores),
                    cleanup_tmp_directories=not read_only,
                    read_only=read_only,
                    create=not read_only,
                ),
                item_handlers={
                    'state': ocp.StandardCheckpointHandler(),
                    'record': ocp.JsonCheckpointHandler(),
                },
            )
        for step in self.steps():
            try:
                score = self._record(step)['score']
            except DamagedCheckpointError:
                continue  # It counts as unscored; restoring it will say what is wrong.
            if score is not None:
                self._scores[step] = score

    def steps(self) -> list[int]:
        """The steps of all whole checkpoints, oldest first."""
        if self._read_only:  # Another process may have written some since.
            with _orbax_speaks_through_us():
                self._manager.reload()
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The step of the best-scored checkpoint, None if none has a score."""
        return _best(self._scores, self.steps())

    def save(self, step: int, state: PyTree, *, score: float | None = None) -> None:
        """Writes a checkpoint in the background; returns when the state may be reused.

        Args:
          step: its name; a step that is already there is left as it is.
          state: a tree of arrays.
          score: how good it is (higher is better), None if it was not evaluated.
        """
        if step in self.steps():
            return
        # A copy, not a view: the next training step takes over (donates) these buffers.
        arrays = jax.tree.map(lambda x: np.array(x), state)
        record = {'score': score, 'checksums': _checksums(arrays)}
        if score is not None:
            self._scores[step] = score
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record)
            ),
        )

    def restore(self, step: int, like: PyTree = None) -> PyTree:
        """Reads one checkpoint as numpy arrays.

        Args:
          step: one of `steps()`.
          like: a tree of arrays, or of their shapes, whose structure the result has. Without it the
            result is what was written, as nested dicts and lists.

        Raises:
          DamagedCheckpointError: it cannot be read, or is not what was written.
        """
        record = self._record(step)
        blank = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
        try:
            with _orbax_speaks_through_us():
                arrays = self._manager.restore(
                    step, args=ocp.args.Composite(state=ocp.args.StandardRestore(blank))
                )['state']
        except Exception as error:
            raise DamagedCheckpointError(_first_line(error)) from error
        # Sorted, for dicts are in another order than the fields of a tuple were.
        if sorted(_checksums(arrays)) != sorted(record['checksums']):
            raise DamagedCheckpointError('the arrays do not match their checksums')
        return arrays

    def latest(
        self, like: PyTree, *, on_damage: Callable[[str], None]
    ) -> tuple[int, PyTree] | None:
        """Reads the newest checkpoint that is whole; None if there is none at all.

        Damaged ones that are newer are told to `on_damage`, a line each, and, unless read-only,
        renamed to `damaged-<step>` so that their steps can be written anew.

        Raises:
          DamagedCheckpointError: there are checkpoints, but none can be read. Nothing was renamed.
        """
        damaged = {}
        for step in reversed(self.steps()):
            try:
                state = self.restore(step, like)
            except DamagedCheckpointError as error:
                damaged[step] = error
                continue
            for bad, error in damaged.items():
                path = self._directory / str(bad) if self._read_only else self._set_aside(bad)
                on_damage(f'checkpoint {path} is damaged ({error}); step {step} is used instead')
            return step, state
        if damaged:
            newest = next(iter(damaged.values()))
            raise DamagedCheckpointError(
                f'none of the checkpoints in {self._directory} can be read ({newest})'
            )
        return None

    def wait(self) -> None:
        """Returns when everything saved is on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def _record(self, step: int) -> dict:
        try:
            with _orbax_speaks_through_us():
                return self._manager.restore(
                    step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
                )['record']
        except Exception as error:
            raise DamagedCheckpointError(_first_line(error)) from error

    def _set_aside(self, step: int) -> pathlib.Path:
        aside = self._directory / f'damaged-{step}'
        for attempt in range(1, sys.maxsize):
            if not aside.exists():
                break
            aside = self._directory / f'damaged-{step}.{attempt}'
        (self._directory / str(step)).rename(aside)
        self._manager.reload()
        self._scores.pop(step, None)
        return aside


def _checksums(arrays: PyTree) -> list[int]:
    return [zlib.crc32(np.ascontiguousarray(x).data) for x in jax.tree.leaves(arrays)]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


@contextlib.contextmanager
def _orbax_speaks_through_us():
    """Keeps Orbax's log lines and the stack traces of its abandoned reads from the terminal.

    When one read fails, the others are still under way and report to an event loop that is gone.
    What a user must know of a failure is in the exception, which this module turns into one line.
    """

    def mute(record):
        return record.name == 'absl' and 'orbax' not in record.pathname

    def hook(unraisable):
        if 'Event loop is closed' not in str(unraisable.exc_value):
            previous_hook(unraisable)

    loggers = [logging.getLogger('absl'), logging.getLogger('asyncio')]
    previous_hook, sys.unraisablehook = sys.unraisablehook, hook
    for logger in loggers:
        logger.addFilter(mute)
    try:
        yield
    except Exception:
        time.sleep(0.2)  # Lets the abandoned reads end,
        gc.collect()  # and their futures complain while nobody listens.
        raise
    finally:
        sys.unraisablehook = previous_hook
        for logger in loggers:
            logger.removeFilter(mute)
