"""Assigns the trials of a study to workers and stores their results. Only this module uses Optuna.

Optuna keeps the trials in a journal, a file that any number of processes and machines may share.
Its samplers are not used: the grid sampler draws points in random order, so that a program would be
compiled again and again, gives the same point to two workers that ask at the same moment, and does
not support learning rates that differ from arm to arm. Instead, all points are added to the journal
at the start, and each worker takes the one that suits it best.

A worker holds a file lock on its trial. A trial that has started, has not ended and is not locked
belongs to a process that was killed; the next worker resumes it.
"""

import contextlib
import fcntl
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TextIO

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import TrialState, create_trial

from experiments import config as schema
from experiments.run import workdir
from experiments.run.metric_writers import METRICS_FILE
from experiments.study.config import Trial
from nfnets_jax.errors import UsageError

# Final states, in our words and Optuna's.
_ENDS = {
    'complete': TrialState.COMPLETE,
    'diverged': TrialState.PRUNED,
    'failed': TrialState.FAIL,
}
_STATES = {state: end for end, state in _ENDS.items()}

MAX_ATTEMPTS = 3  # at the same step; a trial whose process is killed again has failed


class TrialRecord(NamedTuple):
    """A trial in the journal."""

    number: int  # in the journal
    id: str
    axes: dict[str, Any]
    program: str
    config_diff: dict[str, Any]  # from the study's base
    state: str  # 'pending', 'running', 'complete', 'diverged' or 'failed'
    step: int  # last recorded step of its run
    metrics: dict[str, float]
    seconds: float | None  # duration of the session that ended it
    error: str | None

    @property
    def ended(self) -> bool:
        return self.state in _ENDS


def round_robin(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Returns trials in the order in which they use up a budget, including those that have ended.

    The first trial of each arm, then the second of each arm, ...; within an arm by seed.
    """
    arms: dict[Any, list[TrialRecord]] = {}
    for record in sorted(records, key=lambda r: (r.axes.get('seed', 0), r.number)):
        arms.setdefault(record.axes.get('arm'), []).append(record)
    rounds = itertools.zip_longest(*arms.values())
    return [record for one_each in rounds for record in one_each if record is not None]


class Journal:
    """The trials of the study in a directory.

    Args:
      directory: directory of the study, created if missing.
      name: name of the study.
      higher_is_better: whether its metric is to be maximized.

    Raises:
      UsageError: the directory cannot be written, or holds another study or a damaged journal.
    """

    def __init__(self, directory: str | os.PathLike, name: str, *, higher_is_better: bool):
        self.directory = pathlib.Path(directory)
        file = self.directory / 'journal.log'
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._locks: dict[str, TextIO] = {}
            with self.exclusive():
                # The lock of a killed process expires after half a minute.
                lock = JournalFileOpenLock(os.fspath(file))
                _drop_torn_line(file, lock)
                self._storage = JournalStorage(JournalFileBackend(os.fspath(file), lock))
                others = [s.study_name for s in self._storage.get_all_studies()]
                if others and others != [name]:
                    raise UsageError(
                        f'--workdir={directory} holds the study {others[0]!r}, not {name!r}; '
                        'choose another directory'
                    )
                self._study = optuna.create_study(
                    storage=self._storage,
                    study_name=name,
                    direction='maximize' if higher_is_better else 'minimize',
                    load_if_exists=True,
                )
                self._study_id = self._storage.get_study_id_from_name(name)
        except OSError as error:
            raise UsageError(f'--workdir={directory} cannot be used: {error.strerror}') from error
        except (ValueError, KeyError) as error:
            if isinstance(error, UsageError):
                raise
            line = _damaged_line(file)
            where = f'{file}, line {line}' if line else f'{file}'
            raise UsageError(
                f'{where} cannot be read: {error}; move the file away and give the same command, '
                'which takes the runs in trials/ as they are'
            ) from error

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Enters a critical section of all processes that share the directory."""
        with open(self.directory / '.lock', 'a') as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def add(
        self,
        trials: Iterable[Trial],
        differences: Iterable[Mapping[str, Any]],
        base: Mapping[str, Any],
        *,
        retry: bool = False,
    ) -> None:
        """Adds the trials that the journal does not have.

        Args:
          trials: all trials of the study.
          differences: how the config of each differs from the base.
          base: the study's base config, flat.
          retry: whether to add failed trials again.

        Raises:
          UsageError: the journal was made with another config; nothing has been added.
        """
        trials = list(trials)
        with self.exclusive():
            existing = self.records()
            attributes = self._study.user_attrs
            # Fields that newer versions added have the value that reproduces the old behavior.
            added = {key: x for key, x in schema.ADDED_FIELDS.items() if key in base}
            earlier = added | attributes.get('base', base)
            self._assert_same(earlier, base, 'config.base.')
            known = {record.id: record for record in existing}
            new = []
            for trial, difference in zip(trials, differences, strict=True):
                if record := known.get(trial.id):
                    self._assert_same(record.config_diff, difference, f'of {trial.id}, config.')
                    if not (retry and record.state == 'failed'):
                        continue
                new.append((trial, difference))
            choices: dict[str, dict] = {}
            for axes in [*(trial.axes for trial in trials), *(record.axes for record in existing)]:
                for axis, value in axes.items():
                    choices.setdefault(axis, {})[value] = None
            if 'base' not in attributes:
                self._study.set_user_attr('base', dict(base))
            for trial, difference in new:
                self._study.add_trial(
                    create_trial(
                        state=TrialState.WAITING,
                        params=trial.axes,
                        distributions={
                            axis: CategoricalDistribution(list(choices[axis]))
                            for axis in trial.axes
                        },
                        user_attrs={
                            'id': trial.id,
                            'program': trial.program,
                            'config_diff': dict(difference),
                        },
                    )
                )

    def _assert_same(self, there: Mapping[str, Any], here: Mapping[str, Any], prefix: str) -> None:
        free = workdir.free_to_change(self.directory)
        if differing := workdir.differences(there, here, prefix=prefix, free=free):
            raise UsageError(
                f'--workdir={self.directory} holds this study with another config: {differing[0]}; '
                'choose another directory'
            )

    def records(self) -> list[TrialRecord]:
        """Returns the trials in the order they were added; of a retried one, the last."""
        frozen = self._storage.get_all_trials(self._study_id, deepcopy=False)
        latest = {trial.user_attrs['id']: trial for trial in frozen}
        return [self._record(trial) for trial in latest.values()]

    def acquire(
        self, ids: Iterable[str], program: str | None, budget: int | None = None
    ) -> TrialRecord | None:
        """Locks a free trial for this worker, until `finish` or `release`.

        It prefers trials that run `program`, then those whose program no other worker runs.

        Args:
          ids: the trials to choose from.
          program: the program that this worker has compiled.
          budget: how many trials the worker may still acquire; it chooses among as many free ones,
            in the order of `round_robin`.

        Returns:
          The trial; None if all have ended or are taken.
        """
        ids = set(ids)
        with self.exclusive():
            while True:
                known = [r for r in self.records() if r.id in ids]
                busy = {r.program for r in known if r.state == 'running'}
                free = [r for r in round_robin(known) if r.state == 'pending'][:budget]
                if not free:
                    return None
                record = min(
                    free, key=lambda r: (r.program != program, r.program in busy, r.number)
                )
                self._lock(record)
                if self._start(record):
                    return record
                reason = f'its process was killed {MAX_ATTEMPTS} times at step {record.step:,}'
                self.finish(record, 'failed', error=f'{reason}: out of memory?', seconds=None)

    def finish(
        self,
        record: TrialRecord,
        state: str,
        *,
        seconds: float | None,
        value: float | None = None,
        metrics: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> None:
        """Stores the result of a trial and unlocks it; `value` is the metric of a complete one."""
        self._set(record.number, 'metrics', dict(metrics or {}))
        self._set(record.number, 'seconds', seconds)
        self._set(record.number, 'error', error)
        self._set(record.number, 'step', self._steps_done(record.id))
        self._study.tell(record.number, value, state=_ENDS[state])
        self._unlock(record)

    def release(self, record: TrialRecord) -> None:
        """Unlocks a trial that has not ended, so that another worker can resume it."""
        self._set(record.number, 'attempts', {'step': record.step, 'count': 0})
        self._unlock(record)

    def remember(self, name: str, value: str) -> None:
        """Appends a value to a list stored with the study, unless it is in it."""
        with self.exclusive():
            values = self.remembered(name)
            if value not in values:
                self._study.set_user_attr(name, [*values, value])

    def remembered(self, name: str) -> list[str]:
        """Returns the list that `remember` stored."""
        return self._study.user_attrs.get(name, [])

    def trial_directory(self, id: str) -> pathlib.Path:
        return self.directory / 'trials' / id

    def _record(self, trial: optuna.trial.FrozenTrial) -> TrialRecord:
        attributes = trial.user_attrs
        state = _STATES.get(trial.state)
        if state is None:
            begun = trial.state == TrialState.RUNNING
            state = 'running' if begun and self._is_locked(attributes['id']) else 'pending'
        step = attributes.get('step')
        return TrialRecord(
            trial.number,
            attributes['id'],
            {axis: trial.params[axis] for axis in trial.params},
            attributes['program'],
            attributes['config_diff'],
            state,
            self._steps_done(attributes['id']) if step is None else step,
            attributes.get('metrics', {}),
            attributes.get('seconds'),
            attributes.get('error'),
        )

    def _start(self, record: TrialRecord) -> bool:
        """Counts an attempt and marks a trial as running; False after too many attempts."""
        trial_id = self._trial_id(record.number)
        before = self._storage.get_trial(trial_id).user_attrs.get('attempts', {})
        count = before['count'] + 1 if before.get('step') == record.step else 1
        if count > MAX_ATTEMPTS:
            return False
        self._set(record.number, 'attempts', {'step': record.step, 'count': count})
        if self._storage.get_trial(trial_id).state == TrialState.WAITING:
            self._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        return True

    def _set(self, number: int, name: str, value: Any) -> None:
        self._storage.set_trial_user_attr(self._trial_id(number), name, value)

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _lock(self, record: TrialRecord) -> None:
        path = self.trial_directory(record.id)
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / '.claim', 'a')  # noqa: SIM115, _unlock closes it
        fcntl.flock(file, fcntl.LOCK_EX)  # Waits for a process that is testing the lock.
        self._locks[record.id] = file

    def _unlock(self, record: TrialRecord) -> None:
        self._locks.pop(record.id).close()

    def _is_locked(self, id: str) -> bool:
        try:
            with open(self.trial_directory(id) / '.claim') as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True

    def _steps_done(self, id: str) -> int:
        """Returns the step of the last complete line of a run's metrics."""
        try:
            lines = (self.trial_directory(id) / METRICS_FILE).read_bytes().split(b'\n')
            return json.loads(lines[-2])['step']
        except (OSError, IndexError, ValueError, KeyError):
            return 0


def _damaged_line(file: pathlib.Path) -> int | None:
    """Returns the number, from 1, of the first line that is not an Optuna record."""
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            json.loads(line)['op_code']
        except (ValueError, KeyError, TypeError):
            return number
    return None


def _drop_torn_line(file: pathlib.Path, lock: JournalFileOpenLock) -> None:
    """Drops an incomplete last line, left by a crash, which Optuna cannot read."""
    if not file.exists():
        return
    lock.acquire()
    try:
        written = file.read_bytes()
        if not written.endswith(b'\n'):
            os.truncate(file, written.rfind(b'\n') + 1)
    finally:
        lock.release()
