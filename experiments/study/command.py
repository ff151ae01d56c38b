"""Runs a study: every trial of a grid once, on any number of processes and machines.

    python -m experiments.study --config=configs/studies/sam.py:digits --workdir=S
    python -m experiments.study --config=configs/studies/sam.py --workdir=S --jobs=2

The same command, at any time and on any machine that sees the directory, joins or resumes the
study: a trial whose process was killed continues from its last checkpoint. A trial that diverged or
failed is a result. In the directory:

    data.json    identity of the data; where it changes the study ends
    study.json   question, setting, and every trial's axes, state and metrics
    trials/ID/   each trial's run, as experiments.train writes it; correct.npz,
                 the images that it classifies correctly; error.txt if it failed
    journal.log  Optuna's journal, for optuna-dashboard
"""

import collections
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import shlex
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.queues import SimpleQueue
from typing import Any

import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from experiments import config as schema
from experiments.experiment import Experiment, build
from experiments.launch import allocator, cli, distributed
from experiments.run import data_record, init_weights, workdir
from experiments.study import config as study_config
from experiments.study import dry_run, measurements
from experiments.study.journal import Journal, TrialRecord, round_robin
from experiments.study.planning import Planner
from experiments.study.schema import SUMMARY_FILE
from experiments.train import DivergedError, train
from nfnets_jax import files
from nfnets_jax.errors import UsageError, nearest

_PACKAGES = ('jax', 'jaxlib', 'dm-haiku', 'optax', 'optuna', 'numpy')


class LostWorkersError(Exception):
    """Worker processes ended unexpectedly."""


def run_study(
    study: ConfigDict,
    directory: str | os.PathLike,
    *,
    jobs: int = 1,
    max_trials: int | None = None,
    retry: bool = False,
    extend: bool = False,
    keep_memory: bool = False,
    command: str = '',
) -> None:
    """Runs the trials of a study that have not ended, and writes the results to study.json.

    Args:
      study: as in `study_config.default_study`.
      directory: directory of the study.
      jobs: worker processes; with 1 this process does the work.
      max_trials: how many to start at most in this call; arms take turns.
      retry: whether to run failed trials again.
      extend: whether to extend grids whose best value is at the edge.
      keep_memory: see `allocator.keep_memory`; of use before JAX starts.
      command: the user's command line, for study.json.

    Raises:
      UsageError: a mistake in the study or the directory, found before the first trial; or the
        trials do not have the study's metric, found after the first trial.
      LostWorkersError: workers were killed; the same call resumes their trials.
    """
    if keep_memory:  # With several workers too, so that its error comes before anything is written.
        allocator.keep_memory()
    if jobs > 1:  # Else the first worker would take all of an accelerator's memory.
        os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
    planner = Planner(study, extend=extend)
    data = _check_configs(study, planner.grid)
    data_record.check_study(directory, data)
    journal = open_journal(study, directory)
    trials = _add_planned(study, journal, planner, retry=retry)
    with journal.exclusive():
        data_record.add_to_study(directory, data)
    if command:
        journal.remember('commands', command)
    write_summary(study, journal)

    def planned() -> list[str]:
        return [trial.id for trial in planner.plan(journal.records())]

    progress = StudyProgress(journal, planned, jobs, max_trials)
    progress.start(study, len({trial.program for trial in trials.values()}))
    lost: list[int] = []
    try:
        with contextlib.suppress(KeyboardInterrupt), _sigterm_interrupts():
            if jobs == 1:
                work(study, directory, max_trials, extend=extend, on_end=progress.update)
            else:
                lost = _run_workers(
                    study, directory, jobs, max_trials, extend, keep_memory, progress
                )
    finally:
        progress.close()
        write_summary(study, journal)
    progress.summarize(directory)
    if lost:
        statuses = ', '.join(map(str, lost))
        killed = ' (killed: out of memory?)' if min(lost) < 0 else ''
        raise LostWorkersError(
            f'{len(lost)} of {jobs} worker processes ended with status {statuses}{killed}'
        )


def _add_planned(
    study: ConfigDict, journal: Journal, planner: Planner, *, retry: bool = False
) -> dict[str, study_config.Trial]:
    """Adds the trials that the study needs now to the journal; returns them by id."""
    trials = planner.plan(journal.records())
    base = workdir.flatten(workdir.as_json(study.base))
    journal.add(trials, [study_config.difference(t, study) for t in trials], base, retry=retry)
    return {trial.id: trial for trial in trials}


def open_journal(study: ConfigDict, directory: str | os.PathLike) -> Journal:
    return Journal(directory, study.name, higher_is_better=study.higher_is_better)


def work(
    study: ConfigDict,
    directory: str | os.PathLike,
    max_trials: int | None = None,
    *,
    extend: bool = False,
    on_end: Callable[[], None] = lambda: None,
) -> None:
    """Runs trials of a study until all have ended or are taken, or `max_trials` are done.

    While the trials of other workers decide which ones come next, it waits for them.

    Args:
      study: its first trials are in the journal.
      directory: directory of the study.
      max_trials: how many at most.
      extend: as in `run_study`.
      on_end: called after each trial.

    Raises:
      KeyboardInterrupt: stopped by a signal; the current trial can be resumed.
    """
    journal = open_journal(study, directory)
    planner = Planner(study, extend=extend)
    trials = _add_planned(study, journal, planner)
    _enable_compilation_cache(pathlib.Path(directory) / '.cache' / platform.node())
    if study.pretrain:
        with journal.exclusive():  # The other workers wait for the weights.
            _pretrain(study.pretrain, directory)
    compiled = measurements.Compiled()
    program, done = None, 0
    while max_trials is None or done < max_trials:
        if planner.grows:
            trials = _add_planned(study, journal, planner)
        record = journal.acquire(trials, program, max_trials and max_trials - done)
        if record is None:
            planned = [r for r in journal.records() if r.id in trials]
            if not planner.grows or all(r.ended for r in planned):
                return
            time.sleep(1)
            continue
        if record.program != program:
            compiled = measurements.Compiled()  # Free the memory of the previous programs.
            program = record.program
        begun = time.perf_counter()
        try:
            trial_directory = journal.trial_directory(record.id)
            outcome = _run_trial(study, trials[record.id], trial_directory, compiled)
        except BaseException:
            journal.release(record)
            raise
        journal.finish(record, seconds=round(time.perf_counter() - begun, 3), **outcome)
        journal.remember('hardware', _hardware())
        write_summary(study, journal)
        done += 1
        on_end()


def _enable_compilation_cache(directory: pathlib.Path) -> None:
    """Caches compiled programs: workers share them, and batch sizes share `init`."""
    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]  # JAX adds it
    if not chosen:  # Else keep the user's directory.
        jax.config.update('jax_compilation_cache_dir', os.fspath(directory.absolute()))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def _pretrain(config: ConfigDict, directory: str | os.PathLike) -> None:
    path = study_config.PRETRAINED.format(study=directory)
    try:
        with study_config.naming_pretraining():
            summary = train(config, path, quiet=True)
    except DivergedError as error:
        raise UsageError(f'config.pretrain: {error}') from error
    if 'final' not in summary:
        raise KeyboardInterrupt


def _run_trial(
    study: ConfigDict,
    trial: study_config.Trial,
    directory: pathlib.Path,
    compiled: measurements.Compiled,
) -> dict[str, Any]:
    """Runs a trial; returns its state, and its metrics and value or its error.

    Raises:
      UsageError: the trial does not have the study's metric.
    """
    metrics: dict[str, Any] = {}
    try:
        for name in study.measure:
            results = measurements.MEASUREMENTS[name](trial.config, directory, compiled)
            if results is None:
                raise KeyboardInterrupt
            metrics |= results
    except DivergedError as error:
        return {'state': 'diverged', 'error': study_config.in_study(error, trial, study)}
    except Exception as error:
        # Whatever it is, the other trials may succeed.
        files.atomic_write(directory / 'error.txt', traceback.format_exc())
        message = f'{type(error).__name__}: {study_config.in_study(error, trial, study)}'
        return {'state': 'failed', 'error': message.splitlines()[0][:300]}
    if study.metric not in metrics:
        raise UsageError(
            f'config.metric={study.metric!r}: trial {trial.id} has no such metric'
            f'{nearest(study.metric, metrics)}'
        )
    return {'state': 'complete', 'metrics': metrics, 'value': metrics[study.metric]}


def write_summary(study: ConfigDict, journal: Journal) -> None:
    """Writes study.json: `study_config.to_json`, all trials, commands, versions and hardware."""
    with journal.exclusive():
        records = journal.records()
        # Includes values that an earlier config of the study had.
        seen: dict[str, dict] = collections.defaultdict(dict)
        for record in records:
            for axis, value in record.axes.items():
                seen[axis][value] = None
        axes = {axis: list(seen[axis]) for axis in ('arm', *study.axes) if axis in seen}
        commands = journal.remembered('commands')
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        summary = study_config.to_json(study) | {
            'axes': axes,
            'command': commands[0] if commands else '',
            'commands': commands,
            'trials': [_to_json(record) for record in records],
            'versions': {'python': platform.python_version()} | versions,
            'hardware': '; '.join(journal.remembered('hardware')),
            'seconds': round(sum(record.seconds or 0 for record in records), 3),
        }
        files.atomic_write(journal.directory / SUMMARY_FILE, json.dumps(summary, indent=1) + '\n')


def _to_json(record: TrialRecord) -> dict[str, Any]:
    fields = ('id', 'axes', 'state', 'step', 'metrics', 'seconds', 'error', 'config_diff')
    return {field: getattr(record, field) for field in fields}


def _check_configs(
    study: ConfigDict, trials: Iterable[study_config.Trial]
) -> dict[str, data_record.Record]:
    """Raises a UsageError for the first invalid config.

    Returns:
      The records of all data that the study reads, by `data_record.key`.
    """
    data = {}
    if study.pretrain:
        with study_config.naming_pretraining():
            experiment = _check_config(study.pretrain)
        data[data_record.key(study.pretrain)] = data_record.make_record(experiment.splits)
    checked = set()
    for trial in trials:
        # Tracing the model takes time; trials with the same key only differ in a few numbers.
        key = trial.program, trial.config.init.weights
        with study_config.naming_trial(trial, study):
            if key in checked:
                schema.check(trial.config)
            else:
                experiment = _check_config(trial.config, training='train' in study.measure)
                measurements.check(study.measure, experiment)
                if (name := data_record.key(trial.config)) not in data:
                    data[name] = data_record.make_record(experiment.splits)
        checked.add(key)
    return data


def _check_config(config: ConfigDict, *, training: bool = True) -> Experiment:
    experiment = build(config, training=training)
    if config.init.weights not in ('', study_config.PRETRAINED):
        init_weights.load_weights(experiment)
    return experiment


def _hardware() -> str:
    devices = f'{jax.device_count()} x {jax.devices()[0].device_kind}'
    return f'{devices}, {platform.machine()} with {os.cpu_count()} cores'


def _run_workers(
    study: ConfigDict,
    directory: str | os.PathLike,
    jobs: int,
    max_trials: int | None,
    extend: bool,
    keep_memory: bool,
    progress: 'StudyProgress',
) -> list[int]:
    """Runs `work` in `jobs` processes and reports progress.

    Returns:
      The exit statuses of the workers that failed, negative for a signal.

    Raises:
      UsageError: a worker raised it; the others have been stopped.
    """
    spawn = multiprocessing.get_context('spawn')
    shares: list[int | None] = [None] * jobs
    if max_trials is not None:
        shares = [max_trials // jobs + (i < max_trials % jobs) for i in range(jobs)]
    mistakes = spawn.SimpleQueue()
    arguments = (study.to_dict(), os.fspath(directory), mistakes, extend, keep_memory)
    workers = [
        spawn.Process(target=_worker, args=(*arguments, share)) for share in shares if share != 0
    ]
    started = []
    try:
        for worker in workers:
            worker.start()
            started.append(worker)
        while any(worker.is_alive() for worker in workers) and mistakes.empty():
            progress.update()
            time.sleep(0.5)
    finally:
        for worker in started:
            worker.terminate()  # It saves its trial first.
        for worker in started:
            worker.join()
        progress.update()
    if not mistakes.empty():
        raise UsageError(mistakes.get())
    return [worker.exitcode for worker in workers if worker.exitcode]


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Turns SIGTERM into a KeyboardInterrupt, like SIGINT; training ends its step first."""
    if threading.current_thread() is not threading.main_thread():  # Python forbids it elsewhere.
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _worker(
    study: dict[str, Any],
    directory: str,
    mistakes: SimpleQueue,
    extend: bool,
    keep_memory: bool,
    max_trials: int | None,
) -> None:
    """Runs `work` in a process of `_run_workers`, which forwards signals."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.set_verbosity(logging.ERROR)

    def stop_with_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is None or not parent.is_alive():
            raise KeyboardInterrupt

    try:
        if keep_memory:
            allocator.keep_memory()
        with contextlib.suppress(KeyboardInterrupt), _sigterm_interrupts():
            work(ConfigDict(study), directory, max_trials, extend=extend, on_end=stop_with_parent)
    except UsageError as error:
        mistakes.put(str(error))
        sys.exit(distributed.MISTAKE)


class StudyProgress:
    """Reports progress: a bar on a terminal, elsewhere a line for each trial that ends.

    Args:
      journal: the study's journal, with the trials of all workers.
      planned: returns the ids of the trials to count, which may become more.
      jobs: number of workers of this call.
      max_trials: how many more trials they start at most.
    """

    def __init__(
        self,
        journal: Journal,
        planned: Callable[[], Iterable[str]],
        jobs: int,
        max_trials: int | None,
    ):
        self._journal, self._planned, self._jobs = journal, planned, jobs
        self._reported = {record.id for record in self._records() if record.ended}
        self._last = None if max_trials is None else len(self._reported) + max_trials
        self._bar: tqdm | None = None

    def start(self, study: ConfigDict, programs: int) -> None:
        before = f', {len(self._reported)} of them done' if self._reported else ''
        cost = f'; {study.cost}' if study.cost else ''
        now = '' if self._last is None else f', {self._last - len(self._reported)} more at most now'
        trials = f'{len(self._ids)} trials with {programs} compiled programs{before}{now}{cost}'
        print(f'{study.name} ({study.size}): {trials}', file=sys.stderr, flush=True)
        self._metric = study.metric
        if sys.stderr.isatty():
            form = 'trial {n_fmt}/{total_fmt} |{bar}|{desc}'
            counts = {'total': len(self._ids), 'initial': len(self._reported)}
            self._bar = tqdm(**counts, bar_format=form, dynamic_ncols=True)

    def update(self) -> None:
        """Reports the trials that have ended since the last call."""
        records = self._records()
        for record in records:
            if not record.ended or record.id in self._reported:
                continue
            self._reported.add(record.id)
            value = record.metrics.get(self._metric) if record.state == 'complete' else None
            outcome = record.state if value is None else f'{self._metric} {value:.4g}'
            if record.state == 'failed':
                outcome += f': {record.error}'
            line = f'{len(self._reported):>4}/{len(self._ids)} {record.id}: {outcome}'
            self._print(f'{line}  ({record.seconds or 0:.1f} s)', self._time_left(records))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def summarize(self, directory: str | os.PathLike) -> None:
        """Prints the number of trials in each state, and the next command."""
        records = self._records()
        counts = collections.Counter(record.state for record in records)
        states = ', '.join(f'{count} {state}' for state, count in sorted(counts.items()))
        print(f'{os.path.join(directory, SUMMARY_FILE)}: {states}', file=sys.stderr)
        if any(not record.ended for record in records):
            print('the same command goes on from here', file=sys.stderr)
        else:
            print(f'look: python -m experiments.report --workdir={directory}', file=sys.stderr)

    def _records(self) -> list[TrialRecord]:
        self._ids = set(self._planned())
        return [record for record in self._journal.records() if record.id in self._ids]

    def _time_left(self, records: Iterable[TrialRecord]) -> str:
        """Returns ', ... left', estimated from trials with the same program."""
        durations: dict[str, list[float]] = collections.defaultdict(list)
        for record in records:
            if record.seconds is not None:
                durations[record.program].append(record.seconds)
        if not durations:
            return ''
        known = {program: statistics.median(seconds) for program, seconds in durations.items()}
        typical = statistics.mean(known.values())
        coming = [record for record in round_robin(records) if not record.ended]
        if self._last is not None:
            coming = coming[: max(0, self._last - len(self._reported))]
        left = sum(known.get(record.program, typical) for record in coming) / self._jobs
        return f', {tqdm.format_interval(left)} left' if left else ''

    def _print(self, line: str, left: str) -> None:
        if self._bar is None:
            print(line + left, file=sys.stderr, flush=True)
        else:  # Results scroll above the bar, which has room for the time left on any terminal.
            self._bar.write(line, file=sys.stderr)
            self._bar.set_description_str(left.replace(',', ''), refresh=False)
            self._bar.total = len(self._ids)
            self._bar.update(len(self._reported) - self._bar.n)


def main() -> None:
    args = flags.FLAGS
    study = args.config
    if args.seeds is not None:
        with study.grid.unlocked():
            study.grid.seed = tuple(range(args.seeds))
    if args.dry_run:
        print(dry_run.describe(study))
        return
    try:
        run_study(
            study,
            args.workdir,
            jobs=args.jobs,
            max_trials=args.max_trials,
            retry=args.retry,
            extend=args.extend,
            keep_memory=args.keep_memory,
            command=' '.join(['python -m experiments.study', *map(shlex.quote, sys.argv[1:])]),
        )
    except LostWorkersError as error:
        print(f'stopped: {error}', file=sys.stderr)
        sys.exit(distributed.PEER_LOST)


def run() -> None:
    """Defines the flags, parses the command line and runs `main`."""
    config_flags.DEFINE_config_file('config', None, 'The study.', lock_config=True)
    cli.define_workdir('Directory of the study.')
    flags.DEFINE_integer('jobs', 1, 'Number of worker processes.', lower_bound=1)
    flags.DEFINE_integer('seeds', None, 'Number of seeds, from 0 on.', lower_bound=1)
    flags.DEFINE_integer('max_trials', None, 'Start at most this many trials.', lower_bound=1)
    flags.DEFINE_bool('extend', False, 'Extend grids whose best value is at the edge.')
    flags.DEFINE_bool('retry', False, 'Run failed trials again.')
    flags.DEFINE_bool('dry_run', False, 'Only print how much there is to train; write nothing.')
    allocator.define_flag()
    flags.mark_flags_as_required(['config', 'workdir'])
    cli.run(main, declared=study_config.declared)
