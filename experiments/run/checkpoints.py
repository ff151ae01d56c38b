"""Crash-safe checkpoints of a training run, written with Orbax.

All training processes hold the same state, so only one of them writes. A damaged checkpoint is
detected, renamed and never overwritten; `nfnets_jax.weights.checkpoints` describes the files.
"""

import contextlib
import errno
import itertools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from nfnets_jax import files
from nfnets_jax.errors import UsageError, first_line
from nfnets_jax.weights import checkpoints as reading
from nfnets_jax.weights.checkpoints import DamagedCheckpointError, PyTree


class _KeepLatestAndBest:
    """Orbax preservation policy: the newest `keep` checkpoints and the best-scored one."""

    def __init__(self, keep: int, scores: dict[int, float]):
        self._keep, self._scores = keep, scores

    def should_preserve(self, checkpoints, *, context):
        del context
        steps = [c.step for c in checkpoints]
        kept = {*sorted(steps)[-self._keep :], reading.best_step(self._scores, steps)}
        return [step in kept for step in steps]


class Checkpoints(reading.CheckpointReader):
    """The checkpoints of one run: `latest`, `save`, `score`.

    Args:
      directory: directory of the checkpoints, created if missing.
      keep: how many of the newest to keep; the best-scored one is kept in addition.
      enabled: whether this process writes; `False` makes every method a no-op.

    Raises:
      UsageError: the directory cannot be created.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 3, enabled: bool = True):
        super().__init__(directory)
        self._scores = reading.CheckpointReader(directory).scores() if enabled else {}
        self._writing = contextlib.ExitStack()  # open while a checkpoint is being written
        self._manager: Any = None  # Orbax ships no types
        if not enabled:
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f'{self._directory} cannot be written: {error.strerror}') from error
        alone = reading.this_process_alone()
        with reading.quiet_orbax():
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_KeepLatestAndBest(keep, self._scores),
                    cleanup_tmp_directories=True,
                    create=False,
                    multiprocessing_options=alone,
                ),
                item_handlers={
                    'state': ocp.StandardCheckpointHandler(multiprocessing_options=alone),
                    'record': ocp.JsonCheckpointHandler(multiprocessing_options=alone),
                },
            )

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, oldest first, with the one being written."""
        return sorted(self._manager.all_steps()) if self._manager else []

    def scores(self) -> dict[int, float]:
        return self._scores

    def save(
        self, step: int, state: PyTree, *, score: float | None = None, note: str | None = None
    ) -> None:
        """Writes a checkpoint in the background; returns when the state may be reused.

        Args:
          step: name of the checkpoint; an existing step is left unchanged.
          state: a tree of arrays.
          score: quality (higher is better); None if it is not known yet, see `score`.
          note: stored with the checkpoint; the method `note` returns it.

        Raises:
          UsageError: this checkpoint, or one begun before, cannot be written. Existing ones remain.
        """
        if not self._manager or step in self.steps():
            return
        self.wait()
        if not self._directory.is_dir():  # Orbax would recreate it without the rest.
            raise UsageError(f'{self._directory} has vanished while the run was going on')
        # A copy, not a view: the next training step donates these buffers.
        arrays = jax.tree.map(lambda x: np.array(x), state)
        record = {'score': score, 'note': note, 'checksums': reading.checksums(arrays)}
        if score is not None:
            self._scores[step] = score
        self._writing.enter_context(reading.quiet_orbax())
        with self._usage_errors():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record)
                ),
            )

    def score(self, step: int, score: float) -> None:
        """Stores the score of a checkpoint that is already saved; `save` does not wait for it.

        Args:
          step: step of a checkpoint; any other step is ignored.
          score: higher is better.

        Raises:
          UsageError: the score cannot be written.
        """
        if self._scores.get(step) == score or step not in self.steps():
            return
        self._scores[step] = score
        scores = {str(step): score for step, score in sorted(self._scores.items())}
        files.atomic_write(self._directory / reading.SCORES_FILE, json.dumps(scores) + '\n')

    def latest(
        self, template: PyTree, *, on_damage: Callable[[str], None]
    ) -> tuple[int, PyTree] | None:
        """Reads the newest undamaged checkpoint; returns None if there is no checkpoint.

        Calls `on_damage` with one line for each newer, damaged checkpoint and renames these to
        `damaged-<step>`, so that their steps can be written again.

        Raises:
          DamagedCheckpointError: there are checkpoints, but none can be read. None is renamed.
        """
        damaged = {}
        for step in reversed(self.steps()):
            try:
                state = self.restore(step, template)
            except DamagedCheckpointError as error:
                damaged[step] = error
                continue
            for bad, damage in damaged.items():
                path = self._set_aside(bad)
                on_damage(f'checkpoint {path} is damaged ({damage}); step {step} is used instead')
            return step, state
        if damaged:
            newest = next(iter(damaged.values()))
            raise DamagedCheckpointError(
                f'none of the checkpoints in {self._directory} can be read ({newest})'
            )
        return None

    def wait(self) -> None:
        """Returns when everything saved is on disk.

        Raises:
          UsageError: it cannot be written.
        """
        if self._manager:
            with self._writing, self._usage_errors():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Closes the manager once everything saved is on disk.

        Raises:
          UsageError: it cannot be written.
        """
        if not self._manager:
            return
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # It raises the error of `wait` again.
                self._manager.close()

    @contextlib.contextmanager
    def _usage_errors(self):
        """Turns the errors of a failed write into a UsageError."""
        try:
            yield
        except Exception as error:
            # TensorStore raises ValueErrors whose message starts with the gRPC code.
            full = 'RESOURCE_EXHAUSTED' in str(error) or getattr(error, 'errno', 0) == errno.ENOSPC
            steps = super().steps()
            raise UsageError(
                f'{self._directory}: a checkpoint cannot be written: '
                + ('no space left on the device' if full else first_line(error))
                + (f'; the last whole one is step {steps[-1]}' if steps else '')
            ) from error

    def _set_aside(self, step: int) -> pathlib.Path:
        suffixes = itertools.chain([''], (f'.{attempt}' for attempt in itertools.count(1)))
        paths = (self._directory / f'damaged-{step}{suffix}' for suffix in suffixes)
        aside = next(path for path in paths if not path.exists())
        (self._directory / str(step)).rename(aside)
        self._manager.reload()
        self._scores.pop(step, None)
        return aside
