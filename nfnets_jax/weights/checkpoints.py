"""Crash-safe checkpoints. Only this module uses Orbax.

Only one of the processes that train together writes them, because all hold the same state.

A checkpoint is a directory named by its step. It appears under that name only when it is complete
(Orbax writes to a temporary directory and renames it). It holds a checksum of every array. A
damaged one is detected, renamed and never overwritten.
"""

import contextlib
import errno
import gc
import json
import logging
import pathlib
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from nfnets_jax import extras, files
from nfnets_jax.errors import UsageError, first_line

with extras.optional():
    import orbax.checkpoint as ocp
PyTree = Any


_SCORES_FILE = 'scores.json'  # beside the checkpoints: {step: score}


class DamagedCheckpointError(Exception):
    """The files of a checkpoint cannot be read or do not match their checksums."""


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
      directory: directory of the checkpoints, created if missing.
      keep: how many of the newest to keep; the best-scored one is kept in addition.
      read_only: never create, rename or remove anything; for evaluation beside a running job.
      active: whether this process writes; `False` makes every method a no-op.

    Raises:
      UsageError: the directory cannot be created.
    """

    def __init__(self, directory, *, keep: int = 3, read_only: bool = False, active: bool = True):
        self._directory = pathlib.Path(directory).absolute()
        self._read_only = read_only
        self._scores: dict[int, float] = {}
        self._writing = (
            contextlib.ExitStack()
        )  # contexts entered while a checkpoint is being written
        self._manager: Any = None  # Orbax ships no types
        if not active:
            return
        alone = _this_process_alone()
        with _orbax_speaks_through_us():
            if not read_only:
                self._make_directory()
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_KeepLatestAndBest(keep, self._scores),
                    cleanup_tmp_directories=not read_only,
                    read_only=read_only,
                    create=False,
                    multiprocessing_options=alone,
                ),
                item_handlers={
                    'state': ocp.StandardCheckpointHandler(multiprocessing_options=alone),
                    'record': ocp.JsonCheckpointHandler(multiprocessing_options=alone),
                },
            )
        for step in self.steps():
            try:
                score = self._record(step)['score']
            except DamagedCheckpointError:
                continue  # Treat it as unscored; restoring it raises the error.
            if score is not None:
                self._scores[step] = score
        self._scores |= self._read_scores()

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, oldest first."""
        if not self._manager:
            return []
        if self._read_only:  # Another process may have written more.
            with _orbax_speaks_through_us():
                self._manager.reload()
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """Returns the step of the best-scored checkpoint, None if none has a score."""
        return _best(self._scores, self.steps())

    def choose(self, name: str) -> int:
        """Returns the step of the checkpoint named 'latest', 'best' or by its step.

        Raises:
          UsageError: there is no such checkpoint; the message names the existing ones.
        """
        steps = self.steps()
        if not steps:
            raise UsageError(f'{self._directory.parent} holds no checkpoint yet')
        known = {'latest': steps[-1], 'best': self.best(), **{str(s): s for s in steps}}
        if (step := known.get(name)) is None:
            best = 'latest, best' if known['best'] is not None else 'latest'
            raise UsageError(
                f'checkpoint {name!r}: {self._directory.parent} has {best}, '
                f'{", ".join(map(str, steps))}'
            )
        return step

    def note(self, step: int) -> str | None:
        """Returns the `note` that `save` stored with a checkpoint, None if there is none."""
        return self._record(step).get('note')

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
        record = {'score': score, 'note': note, 'checksums': _checksums(arrays)}
        if score is not None:
            self._scores[step] = score
        self._writing.enter_context(_orbax_speaks_through_us())
        with self._telling_what_cannot_be_written():
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
        files.atomic_write(self._directory / _SCORES_FILE, json.dumps(scores) + '\n')

    def _read_scores(self) -> dict[int, float]:
        """Returns the scores that `score` wrote; {} if the file cannot be read."""
        try:
            scores = json.loads((self._directory / _SCORES_FILE).read_text())
            return {int(step): float(score) for step, score in scores.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def restore(self, step: int, like: PyTree = None) -> PyTree:
        """Reads one checkpoint as numpy arrays.

        Args:
          step: one of `steps()`.
          like: a tree of arrays or shapes with the structure of the result. Without it the result
            is nested dicts and lists.

        Raises:
          DamagedCheckpointError: the checkpoint cannot be read or fails its checksums.
        """
        record = self._record(step)
        blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        try:
            arrays = written = self._read(step, blank)
        except Exception as error:
            try:
                written = self._read(step, None)
                arrays = _from_earlier_version(written, blank)
            except Exception:
                arrays = None
            if arrays is None:
                raise DamagedCheckpointError(first_line(error)) from error
        # Sorted, because dicts have another order than the fields of the tuple had.
        if sorted(_checksums(written)) != sorted(record['checksums']):
            raise DamagedCheckpointError('the arrays do not match their checksums')
        return arrays

    def _read(self, step: int, blank: PyTree) -> PyTree:
        """Returns the arrays of a checkpoint in the structure of `blank`; None: nested dicts."""
        with _orbax_speaks_through_us():
            return self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(blank))
            )['state']

    def latest(
        self, like: PyTree, *, on_damage: Callable[[str], None]
    ) -> tuple[int, PyTree] | None:
        """Reads the newest undamaged checkpoint; returns None if there is no checkpoint.

        Calls `on_damage` with one line for each newer, damaged checkpoint. Unless read-only, it
        renames these to `damaged-<step>`, so that their steps can be written again.

        Raises:
          DamagedCheckpointError: there are checkpoints, but none can be read. None is renamed.
        """
        damaged = {}
        for step in reversed(self.steps()):
            try:
                state = self.restore(step, like)
            except DamagedCheckpointError as error:
                damaged[step] = error
                continue
            for bad, damage in damaged.items():
                path = self._directory / str(bad) if self._read_only else self._set_aside(bad)
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
            with self._writing, self._telling_what_cannot_be_written():
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

    def _make_directory(self) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f'{self._directory} cannot be written: {error.strerror}') from error

    @contextlib.contextmanager
    def _telling_what_cannot_be_written(self):
        try:
            yield
        except Exception as error:
            # TensorStore raises ValueErrors whose message starts with the gRPC code.
            full = 'RESOURCE_EXHAUSTED' in str(error) or getattr(error, 'errno', 0) == errno.ENOSPC
            steps = [int(path.name) for path in self._directory.glob('*') if path.name.isdigit()]
            raise UsageError(
                f'{self._directory}: a checkpoint cannot be written: '
                + ('no space left on the device' if full else first_line(error))
                + (f'; the last whole one is step {max(steps)}' if steps else '')
            ) from error

    def _record(self, step: int) -> dict:
        try:
            with _orbax_speaks_through_us():
                return self._manager.restore(
                    step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
                )['record']
        except Exception as error:
            raise DamagedCheckpointError(first_line(error)) from error

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


def _this_process_alone() -> ocp.options.MultiprocessingOptions:
    """Returns options without which Orbax makes all processes participate and synchronize."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    process = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f'process{process}',
    )


def _from_earlier_version(written: PyTree, blank: PyTree) -> PyTree | None:
    """Returns the state of an earlier version in the structure of `blank`; None if it does not fit.

    Earlier versions wrote `clipped_fraction_by_group` as a dict of scalars. It describes only the
    last update, and the next update recomputes it, so the values of `blank` are used.
    """
    report = 'clipped_fraction_by_group'

    def by_path(tree):
        entries = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {
            jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in entries
        }

    found, wanted = by_path(written), by_path(blank)
    kept = {path: leaf for path, leaf in found.items() if f'/{report}/' not in f'/{path}/'}
    reports = {path: leaf for path, leaf in wanted.items() if path.split('/')[-1] == report}
    if kept.keys() | reports.keys() != wanted.keys() or not reports:
        return None
    found = kept | reports
    if any(np.shape(found[path]) != leaf.shape for path, leaf in wanted.items()):
        return None
    return jax.tree.unflatten(jax.tree.structure(blank), [found[path] for path in wanted])


def _checksums(arrays: PyTree) -> list[int]:
    return [zlib.crc32(np.ascontiguousarray(x).data) for x in jax.tree.leaves(arrays)]


@contextlib.contextmanager
def _orbax_speaks_through_us():
    """Hides Orbax's log lines and the stack traces of its abandoned reads from the terminal.

    When one read fails, the others are still running and report to a closed event loop. The
    exception holds everything a user must know, and this module turns it into one line.
    """

    def mute(record):
        return record.name == 'absl' and 'orbax' not in record.pathname

    def hook(unraisable):
        if 'Event loop is closed' not in str(unraisable.exc_value):
            previous_hook(unraisable)

    def thread_hook(failure):
        # Orbax raises it again in the thread that waits for it.
        files = [frame.filename for frame in traceback.extract_tb(failure.exc_traceback)]
        if not any('orbax' in file for file in files):
            previous_thread_hook(failure)

    loggers = [logging.getLogger('absl'), logging.getLogger('asyncio')]
    previous_hook, sys.unraisablehook = sys.unraisablehook, hook
    previous_thread_hook, threading.excepthook = threading.excepthook, thread_hook
    for logger in loggers:
        logger.addFilter(mute)
    try:
        yield
    except Exception:
        time.sleep(0.2)  # Wait until the abandoned reads end,
        gc.collect()  # and let their futures report while the hooks are muted.
        raise
    finally:
        sys.unraisablehook, threading.excepthook = previous_hook, previous_thread_hook
        for logger in loggers:
            logger.removeFilter(mute)
