"""Reads the checkpoints of a run; `experiments.run.checkpoints` writes them.

A checkpoint is a directory named by its step. It appears under that name only when it is complete
(Orbax writes to a temporary directory and renames it). `state` in it holds the arrays, `record` a
checksum of each array, the score and a note.
"""

import contextlib
import gc
import json
import logging
import os
import pathlib
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from nfnets_jax import extras
from nfnets_jax.errors import UsageError, first_line

with extras.optional():
    import orbax.checkpoint as ocp
PyTree = Any

SCORES_FILE = 'scores.json'  # beside the checkpoints: {step: score}


class DamagedCheckpointError(Exception):
    """The files of a checkpoint cannot be read or do not match their checksums."""


def best_step(scores: Mapping[int, float], steps: Collection[int]) -> int | None:
    """Returns the step with the highest score, the earliest of equals; None if none has a score."""
    scored = [step for step in steps if step in scores]
    return min(scored, key=lambda step: (-scores[step], step), default=None)


class CheckpointReader:
    """Reads the checkpoints in a directory without changing it, also beside a running job."""

    def __init__(self, directory: str | os.PathLike):
        self._directory = pathlib.Path(directory).absolute()

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, oldest first."""
        return sorted(int(path.name) for path in self._directory.glob('*') if path.name.isdigit())

    def scores(self) -> dict[int, float]:
        """Returns {step: score} of the checkpoints that have one."""
        scores = {}
        for step in self.steps():
            # Treat a damaged checkpoint as unscored; restoring it raises the error.
            with contextlib.suppress(DamagedCheckpointError):
                scores[step] = self._record(step).get('score')
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            late = json.loads((self._directory / SCORES_FILE).read_text())
            scores |= {int(step): float(score) for step, score in late.items()}
        return {step: score for step, score in scores.items() if score is not None}

    def best(self) -> int | None:
        """Returns the step of the best-scored checkpoint, None if none has a score."""
        return best_step(self.scores(), self.steps())

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

    def restore(self, step: int, template: PyTree = None) -> PyTree:
        """Reads one checkpoint as numpy arrays.

        Args:
          step: one of `steps()`.
          template: a tree of arrays or shapes with the structure of the result; without it, the
            result is nested dicts and lists.

        Raises:
          DamagedCheckpointError: the checkpoint cannot be read or fails its checksums.
        """
        blank = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
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
        if sorted(checksums(written)) != sorted(self._record(step).get('checksums', ())):
            raise DamagedCheckpointError('the arrays do not match their checksums')
        return arrays

    def _read(self, step: int, blank: PyTree) -> PyTree:
        """Returns the arrays of a checkpoint in the structure of `blank`; None: nested dicts."""
        options = {'multiprocessing_options': this_process_alone()}
        with (
            quiet_orbax(),
            ocp.Checkpointer(ocp.StandardCheckpointHandler(**options), **options) as checkpointer,
        ):
            path = self._directory / str(step) / 'state'
            return checkpointer.restore(path, args=ocp.args.StandardRestore(blank))

    def _record(self, step: int) -> dict:
        try:
            record = json.loads((self._directory / str(step) / 'record' / 'metadata').read_bytes())
            if isinstance(record, dict):
                return record
        except (OSError, ValueError) as error:
            raise DamagedCheckpointError(first_line(error)) from error
        raise DamagedCheckpointError('its record is not a dict')


def this_process_alone() -> ocp.options.MultiprocessingOptions:
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
        return {
            jax.tree_util.keystr(path, simple=True, separator='/'): leaf
            for path, leaf in jax.tree.leaves_with_path(tree)
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


def checksums(arrays: PyTree) -> list[int]:
    """Returns the CRC-32 of every array."""
    return [zlib.crc32(np.ascontiguousarray(x).data) for x in jax.tree.leaves(arrays)]


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
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
