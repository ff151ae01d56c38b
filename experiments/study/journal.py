"""Who does which trial of a study, and what became of it: the one module that knows Optuna.

Optuna keeps the trials in a journal, a file that any number of processes and machines may share.
Of its samplers none is used: its grid sampler draws the points in random order, so that a program
would be compiled again and again, hands one point to two workers that ask at the same moment, and
knows no grid whose learning rates differ from arm to arm. So all points are put in the journal at
the start, and a worker takes the one that suits it best.

A worker holds a file lock on the trial it is at. A trial that is begun, not ended and not locked is
one whose process was killed; the next worker takes it up again.
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

# What a trial came to, in our words and in Optuna's.
_ENDS = {
    'complete': TrialState.COMPLETE,
    'diverged': TrialState.PRUNED,
    'failed': TrialState.FAIL,
}
_STATES = {state: end for end, state in _ENDS.items()}

MAX_ATTEMPTS = 3  # at the same step; a trial whose process is killed once more has failed


class Record(NamedTuple):
    """What the journal says of a trial."""

    number: int  # in the journal
    id: str
    axes: dict[str, Any]
    program: str
    config_diff: dict[str, Any]  # from the study's base
    state: str  # 'pending', 'running', 'complete', 'diverged' or 'failed'
    step: int  # how far its run has come
    metrics: dict[str, float]
    seconds: float | None  # of the session that ended it
    error: str | None

    @property
    def ended(self) -> bool:
        return self.state in _ENDS


def in_turn(records: Iterable[Record]) -> list[Record]:
    """Returns trials in the order in which they share a budget, those that have ended among them.

    One of each arm, then the next of each arm; in an arm one seed before the next.
    """
    arms: dict[Any, list[Record]] = {}
    for record in sorted(records, key=lambda r: (r.axes.get('seed', 0), r.number)):
        arms.setdefault(record.axes.get('arm'), []).append(record)
    rounds = itertools.zip_longest(*arms.values())
    return [record for turn in rounds for record in turn if record is not None]


class Journal:
    """The trials of the study in a directory.

    Args:
      directory: of the study; made if it is not there.
      name: of the study.
      higher_is_better: of its metric.

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
                # A lock that a killed process left behind is broken after half a minute.
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
        """Keeps every other process out of its own `exclusive` sections meanwhile."""
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
          trials: of the study.
          differences: of each from the base.
          base: the study's, flat.
          retry: whether to add those once more that failed.

        Raises:
          UsageError: what is there was made with another config; nothing has been added.
        """
        trials = list(trials)
        with self.exclusive():
            there = self.records()
            attributes = self._study.user_attrs
            # A field that was added since has the value that stood for it before.
            added = {key: x for key, x in schema.ADDED_FIELDS.items() if key in base}
            earlier = added | attributes.get('base', base)
            self._assert_same(earlier, base, 'config.base.')
            known = {record.id: record for record in there}
            new = []
            for trial, difference in zip(trials, differences, strict=True):
                if record := known.get(trial.id):
                    self._assert_same(record.config_diff, difference, f'of {trial.id}, config.')
                    if not (retry and record.state == 'failed'):
                        continue
                new.append((trial, difference))
            choices: dict[str, dict] = {}
            for axes in [*(trial.axes for trial in trials), *(record.axes for record in there)]:
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

    def records(self) -> list[Record]:
        """Returns the trials in the order they were added; of one tried again, the last."""
        frozen = self._storage.get_all_trials(self._study_id, deepcopy=False)
        latest = {trial.user_attrs['id']: trial for trial in frozen}
        return [self._record(trial) for trial in latest.values()]

    def claim(
        self, ids: Iterable[str], program: str | None, budget: int | None = None
    ) -> Record | None:
        """Takes a trial that nobody is at; `end` or `leave` gives it back.

        Preferred is one that runs `program`, then one whose program nobody runs.

        Args:
          ids: of the trials to choose from.
          program: what this worker has compiled.
          budget: how many trials the worker may still take; it chooses from the first so many of
            `in_turn`.

        Returns:
          None if all are ended or taken.
        """
        ids = set(ids)
        with self.exclusive():
            while True:
                known = [r for r in self.records() if r.id in ids]
                busy = {r.program for r in known if r.state == 'running'}
                free = [r for r in in_turn(known) if r.state == 'pending'][:budget]
                if not free:
                    return None
                record = min(
                    free, key=lambda r: (r.program != program, r.program in busy, r.number)
                )
                self._lock(record)
                if self._begin(record):
                    return record
                reason = f'its process was killed {MAX_ATTEMPTS} times at step {record.step:,}'
                self.end(record, 'failed', error=f'{reason}: out of memory?', seconds=None)

    def end(
        self,
        record: Record,
        state: str,
        *,
        seconds: float | None,
        value: float | None = None,
        metrics: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> None:
        """Writes what a trial came to: 'complete' with the value of the metric, or without."""
        told = {
            'metrics': dict(metrics or {}),
            'seconds': seconds,
            'error': error,
            'step': self._steps_done(record.id),
        }
        for name, attribute in told.items():
            self._set(record.number, name, attribute)
        self._study.tell(record.number, value, state=_ENDS[state])
        self._unlock(record)

    def leave(self, record: Record) -> None:
        """Gives a trial back that is not ended, for the next worker to go on with."""
        self._set(record.number, 'attempts', {'step': record.step, 'count': 0})
        self._unlock(record)

    def remember(self, name: str, value: str) -> None:
        """Adds a value to a list that is kept with the study, if it is not there."""
        with self.exclusive():
            values = self.remembered(name)
            if value not in values:
                self._study.set_user_attr(name, [*values, value])

    def remembered(self, name: str) -> list[str]:
        """Returns the values in such a list."""
        return self._study.user_attrs.get(name, [])

    def trial_directory(self, id: str) -> pathlib.Path:
        return self.directory / 'trials' / id

    def _record(self, trial: optuna.trial.FrozenTrial) -> Record:
        attributes = trial.user_attrs
        state = _STATES.get(trial.state)
        if state is None:
            begun = trial.state == TrialState.RUNNING
            state = 'running' if begun and self._is_locked(attributes['id']) else 'pending'
        step = attributes.get('step')
        return Record(
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

    def _begin(self, record: Record) -> bool:
        """Marks a trial as begun, once more perhaps; False if that was in vain too often."""
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

    def _lock(self, record: Record) -> None:
        path = self.trial_directory(record.id)
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / '.claim', 'a')  # noqa: SIM115, _unlock closes it
        fcntl.flock(file, fcntl.LOCK_EX)  # Somebody may be looking whether it is locked.
        self._locks[record.id] = file

    def _unlock(self, record: Record) -> None:
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
        """Returns the step of the last whole line of a run's metrics."""
        try:
            lines = (self.trial_directory(id) / METRICS_FILE).read_bytes().split(b'\n')
            return json.loads(lines[-2])['step']
        except (OSError, IndexError, ValueError, KeyError):
            return 0


def _damaged_line(file: pathlib.Path) -> int | None:
    """Returns the number of the first line that Optuna has not written, from 1."""
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            json.loads(line)['op_code']
        except (ValueError, KeyError, TypeError):
            return number
    return None


def _drop_torn_line(file: pathlib.Path, lock: JournalFileOpenLock) -> None:
    """Drops what a machine that went down left unfinished at the end, which Optuna cannot read."""
    if not file.exists():
        return
    lock.acquire()
    try:
        written = file.read_bytes()
        if not written.endswith(b'\n'):
            os.truncate(file, written.rfind(b'\n') + 1)
    finally:
        lock.release()
