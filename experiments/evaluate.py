"""Evaluates a trained run exactly: every test image once, raw and EMA parameters.

    python -m experiments.evaluate --workdir=runs/digits
    python -m experiments.evaluate --weights=eca_nfnet_l0 --data=imagenet/val

Of a run it prints the figures that training printed for the same checkpoint, whatever the batch
size and the number of devices and processes, on its own data unless --data names others. --watch
also keeps them in evaluations.jsonl.
"""

import dataclasses
import fcntl
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import config as schema
from experiments.experiment import build, describe_data, describe_devices, describe_network
from experiments.launch import cli
from experiments.run import (
    data_record,
    evaluation,
    other_data,
    parallel,
    real_labels,
    workdir,
)
from experiments.run.predictions import make_predict_step, predict
from experiments.run.summary import SUMMARY_FILE
from experiments.train_step import TrainState, init_state, make_eval_step, make_logits_fn
from nfnets_jax import files
from nfnets_jax.data import sources
from nfnets_jax.data.sources import Source
from nfnets_jax.data.splits import SPLITS
from nfnets_jax.errors import UsageError, nearest
from nfnets_jax.image_size import ImageSize, height_width
from nfnets_jax.weights import pretrained
from nfnets_jax.weights.checkpoints import CheckpointReader, DamagedCheckpointError

EVALUATIONS_FILE = 'evaluations.jsonl'
WATCH_OPTIONS = ('tta', 'image_size')  # besides the split, they tell lines of one step apart

# Options of config.data that do not change the data, and their types.
DATA_OPTIONS: Mapping[str, type] = MappingProxyType({'path': str, 'data_dir': str, 'skip_bad': int})


def evaluate(
    directory: str,
    checkpoint: str = 'latest',
    *,
    report: str | None = None,
    real: str | None = None,
    log: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> dict:
    """Returns {'step', 'test/top1', 'test/loss'} and more of a run, and 'test_ema/...'.

    Only process 0 needs to see the directory.

    Args:
      directory: directory of the run.
      checkpoint: 'latest', 'best' or a step.
      report: a directory for the report of `run.evaluation_report`, of the moving average if there
        is one.
      real: file of reassessed labels, see `run.real_labels`; adds '<split>/real_top1'.
      log: receives lines about network, data and checkpoint before anything is compiled.
      **options: options of `_Evaluator`; the split is 'test' by default.

    Raises:
      UsageError: there is no such run or checkpoint, it is damaged, or its data have changed.
    """
    fields = parallel.from_primary(_read_fields, directory)
    options = {'split': None if options.get('other') else 'test'} | options
    evaluator = _Evaluator(fields, directory, **options)
    if real:
        evaluator.use_real_labels(real)
    step, state = None, evaluator.template
    if parallel.is_primary():
        step, state = _restore(directory, checkpoint, evaluator.template)
    results = _evaluate_once(evaluator, state, f'run: {directory}, step {step or 0:,}', report, log)
    return {'step': parallel.broadcast_json(step)} | results


def evaluate_weights(
    path: str,
    other: str,
    *,
    report: str | None = None,
    real: str | None = None,
    log: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> dict:
    """Returns {'test/top1', 'test/loss'} and more of weights on data with their classes.

    Args:
      path: any weights that `load_pretrained` accepts, in every process.
      other: path of the data, see `run.other_data`. Weights that name no classes have the classes
        '0', '1', ...: directories are then called by numbers.
      report, real, log: as in `evaluate`.
      **options: options of `_Evaluator`.

    Raises:
      UsageError: the weights cannot be read, or the data are not of their classes.
    """
    loaded = pretrained.from_pretrained(path)
    metadata = dataclasses.replace(loaded.metadata, class_names=loaded.metadata.class_labels)
    config = schema.default_config()
    config.model = {'name': metadata.model, **metadata.options}
    config.ema = 0.0
    with config.data.unlocked():
        config.data.update(mean=metadata.mean, std=metadata.std, value_range=metadata.value_range)
    encoded = pretrained.encode_metadata(metadata)
    fields = {'config': workdir.as_json(config), 'data': None, 'metadata': encoded}
    evaluator = _Evaluator(fields, path, other=other, **options)
    if real:
        evaluator.use_real_labels(real)
    state = evaluator.template._replace(params=loaded.params, state=loaded.state)
    return _evaluate_once(evaluator, state, f'weights: {path}', report, log)


def _evaluate_once(
    evaluator: '_Evaluator',
    state: TrainState,
    origin: str,
    report: str | None,
    log: Callable[[str], None],
) -> dict:
    """Returns the metrics of a state; `origin` is the line that says where it comes from."""
    for line in (*evaluator.lines, origin, 'compiling') if parallel.is_primary() else ():
        log(line)
    results = evaluator(state)
    if report:
        evaluator.write_report(state, report)
    return results


def watch(
    directory: str,
    *,
    seconds: float = 10.0,
    log: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Iterator[dict]:
    """Yields the result of `evaluate` for each checkpoint of a run until the run is complete.

    Each result is appended to the run's EVALUATIONS_FILE, with those of WATCH_OPTIONS that are
    given; those in it are not computed again with the same split and options. A checkpoint that the
    run has removed is skipped, and a damaged one is reported.

    Args:
      directory: directory of the run; if there is no run yet, `watch` waits for it.
      seconds: seconds between two looks at the directory.
      log: as in `evaluate`.
      **options: options of `_Evaluator`.
    """
    config_file = pathlib.Path(directory) / 'config.json'
    if parallel.is_primary() and not config_file.exists():
        print(f'waiting for a run in {directory}', file=sys.stderr)
    fields = _wait_for(lambda: _read_fields(directory) if config_file.exists() else None, seconds)
    evaluator, follow = _Evaluator(fields, directory, **options), None
    if parallel.is_primary():
        for line in (*evaluator.lines, f'run: {directory}, every checkpoint'):
            log(line)
        follow = _Follower(directory, evaluator)
    while (step := _wait_for(lambda: follow and follow.next_step(), seconds)) != 'complete':
        results = evaluator(follow.state if follow else evaluator.template)
        results = {'step': step} | evaluator.marks | results
        if follow:
            follow.record(results)
        yield results


def _read_fields(directory: str) -> dict:
    """Returns the config of a run, the record of its data and its metadata, as text."""
    config = workdir.as_json(workdir.load_config(directory))
    fields = {'config': config, 'data': data_record.read(directory), 'metadata': ''}
    if (pathlib.Path(directory) / 'model.json').exists():
        fields['metadata'] = pretrained.encode_metadata(pretrained.load_metadata(directory))
    return fields


class _Evaluator:
    """Evaluates states of a run on a split: a function of process 0's state.

    Args:
      fields: from `_read_fields`.
      directory: directory of the run.
      batch_size: examples at a time; None: as in training.
      split: 'test', 'validation' or 'train'; None: the one that chooses the best checkpoint.
      data: options of config.data that differ, see `DATA_OPTIONS`.
      image_size: side of the images in pixels, or height and width; None: as in training.
      flip: whether to average over each image and its mirror image.
      other: path of other data with the same classes, see `run.other_data`; then `split` is theirs.
      val_labels: file with the labels of other data that lie directly in a directory.

    Attributes: the `split`, the `template` of a state, `lines` that describe network and data, and
    `marks`, those of WATCH_OPTIONS that are given, as JSON values.
    """

    def __init__(
        self,
        fields: dict,
        directory: str,
        *,
        batch_size: int | None = None,
        split: str | None = None,
        data: Mapping[str, Any] = MappingProxyType({}),
        image_size: ImageSize | None = None,
        flip: bool = False,
        other: str | None = None,
        val_labels: str | None = None,
    ):
        config = ConfigDict(fields['config'])
        open_source: Callable[..., Source] = sources.open_source
        described: list[str] = []
        if val_labels and not other:
            raise UsageError(f'--val_labels={val_labels} is for --data: give that, too')
        if other:
            for name in {'path', 'data_dir'} & set(data):
                raise UsageError(f'--config.data.{name} is of the data of the run: leave it out')
            if not fields['metadata']:
                raise UsageError(f'{directory} holds no model.json, by which --data is prepared')
            metadata = pretrained.decode_metadata(fields['metadata'], directory)
            config = other_data.other_config(config, other, metadata, val_labels)
            source = other_data.open_other(config, metadata, split)
            open_source, split = other_data.opener(source, config, metadata), 'test'
            described = [other_data.describe(source)]
        if batch_size is not None:
            config.eval.batch_size = batch_size
        with config.data.ignore_type():
            for name, value in data.items():
                if name != 'skip_bad' and name not in config.data:
                    raise UsageError(f'config.data.{name}: not an option of {config.data.name!r}')
                config.data[name] = value
            if image_size is not None:
                config.data.test_image_size = image_size
        self._experiment = experiment = build(config, training=False, open_source=open_source)
        self.split = split = split or experiment.watched
        if split not in experiment.splits:
            raise UsageError(f'--split={split}: no such split{nearest(split, experiment.splits)}')
        if fields['data'] and not other:
            found = data_record.make_record(experiment.splits)
            if changed := data_record.changes(fields['data'], found, (split,)):
                raise UsageError(
                    f'--workdir={directory} holds a run on other data: '
                    f'{data_record.in_words(changed, "give --config.data.path of the same data")}'
                )
        self.lines = [
            describe_network(experiment),
            *(described or describe_data(experiment)),
            f'evaluation: {"these" if other else f"the {split}"} images, on {describe_devices()}',
        ]
        self.template = jax.eval_shape(lambda: init_state(experiment))
        self._flip, self._step = flip, make_eval_step(experiment, flip=flip)
        self.marks: dict[str, Any] = {'tta': 'flip'} if flip else {}
        if image_size is not None:
            self.marks['image_size'] = list(height_width(image_size))
        self._real: tuple[list[list[int]], np.ndarray] | None = None

    def __call__(self, state: TrainState) -> dict[str, float]:
        variables = _placed(state)
        found = evaluation.evaluate(self._experiment, self._step, variables, self.split)
        if self._real:
            labels, numbers = self._real
            step = make_predict_step(make_logits_fn(self._experiment, flip=self._flip))
            for name, each in predict(self._experiment, step, variables, self.split).items():
                found[f'{self.split}{name}/real_top1'] = real_labels.top1(each, numbers, labels)
        return found

    def use_real_labels(self, path: str) -> None:
        """Adds the accuracy on the reassessed labels in a file to the results."""
        labels = real_labels.read(path)
        source = self._experiment.splits[self.split]
        self._real = labels, real_labels.image_numbers(source, len(labels))

    def write_report(self, state: TrainState, directory: str) -> None:
        from experiments.run import evaluation_report  # here: Matplotlib is slow to import

        logits_fn = make_logits_fn(self._experiment, flip=self._flip)
        evaluation_report.report_split(
            self._experiment, logits_fn, _placed(state), self.split, directory
        )


def _placed(state: TrainState) -> dict[str, tuple]:
    """Returns the variables of process 0's state by name, on every device."""
    return parallel.replicate(parallel.broadcast(TrainState(*state).variables()))


def _restore(directory: str, checkpoint: str, template: TrainState) -> tuple[int, TrainState]:
    checkpoints = CheckpointReader(f'{directory}/checkpoints')
    step = checkpoints.choose(checkpoint)
    try:
        return step, checkpoints.restore(step, template)
    except DamagedCheckpointError as error:
        raise UsageError(
            f'checkpoint {step} of {directory} is damaged ({error}); '
            'choose another with --checkpoint=STEP'
        ) from error


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

    def __init__(self, directory: str, evaluator: _Evaluator):
        self._directory, self._template = pathlib.Path(directory), evaluator.template
        self._checkpoints = CheckpointReader(self._directory / 'checkpoints')
        self._file = self._directory / EVALUATIONS_FILE
        try:
            self._seen = {
                one['step']
                for one in map(json.loads, self._lines())
                if any(name.startswith(f'{evaluator.split}/') for name in one)
                and {name: one[name] for name in WATCH_OPTIONS if name in one} == evaluator.marks
            }
        except (ValueError, TypeError, KeyError):
            raise UsageError(
                f'{self._file} holds a line that is not an evaluation: remove it'
            ) from None
        self.state = evaluator.template

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
        # Another process may watch the same run with another split or other options.
        with open(self._directory / '.evaluations.lock', 'a') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lines = [*self._lines(), json.dumps(results), '']
            files.atomic_write(self._file, '\n'.join(lines))

    def _lines(self) -> list[str]:
        return self._file.read_text().splitlines() if self._file.exists() else []


def _make_report_directory(path: str) -> None:
    try:
        files.make_directory(path)
    except UsageError as error:
        raise UsageError(f'--report={error}') from error


def main() -> None:
    args = flags.FLAGS
    given = {name: args[f'config.data.{name}'].value for name in DATA_OPTIONS}
    options = {
        'batch_size': args.batch_size,
        'data': {name: value for name, value in given.items() if value is not None},
        'log': lambda line: print(line, file=sys.stderr, flush=True),
    }
    options |= {'image_size': args.image_size, 'flip': args.tta == 'flip', 'other': args.data}
    options['val_labels'] = args.val_labels
    options |= {'split': args.split} if args.split else {}
    if (args.workdir is None) == (args.weights is None):
        raise UsageError('give one of --workdir and --weights')
    asked = {'report': args.report, 'real': args.real}
    if args.report and not args.watch:
        parallel.from_primary(_make_report_directory, args.report)
    if args.weights:
        if not args.data:
            raise UsageError(f'--weights={args.weights}: give --data, the images to evaluate on')
        if args.watch or args.checkpoint != 'latest':
            raise UsageError('--watch and --checkpoint are of a run: give --workdir')
        found = iter([evaluate_weights(args.weights, **asked, **options)])
    elif args.watch:
        if args.checkpoint != 'latest':
            raise UsageError('--watch evaluates all checkpoints: leave --checkpoint out')
        for flag in ('report', 'data', 'val_labels', 'real'):
            if args[flag].value:
                raise UsageError(f'--watch evaluates all checkpoints: leave --{flag} out')
        found = watch(args.workdir, **options)
    else:
        found = iter([evaluate(args.workdir, args.checkpoint, **asked, **options)])
    for results in found:
        if parallel.is_primary():
            step = f'step {results["step"]:,}: ' if 'step' in results else ''
            line = step + evaluation.describe_accuracy(results)
            print(json.dumps(results) if args.json else line, flush=True)
            if args.report:
                print(f'report: {args.report}', file=sys.stderr, flush=True)


if __name__ == '__main__':
    cli.define_workdir('Directory of the run.')
    cli.define_path('weights', None, 'Or weights: a file, a published name, a run.')
    flags.DEFINE_string('checkpoint', 'latest', "'latest', 'best', or a step.")
    flags.DEFINE_enum(
        'split',
        None,
        SPLITS,
        'By default test; with --watch those that choose the best checkpoint.',
    )
    flags.DEFINE_integer(
        'batch_size', None, 'Examples at a time; by default as in training.', lower_bound=1
    )
    cli.define_image_size('image_size', 'Pixels of the images; by default as in training.')
    flags.DEFINE_enum('tta', None, ('flip',), 'Average over each image and its mirror image.')
    cli.define_path('report', None, 'Directory for scores by class, confusions and more.')
    cli.define_path('data', None, 'Images elsewhere: a directory, a table, an .npz.')
    cli.define_path('val_labels', None, 'Classes of the images that lie directly in --data.')
    cli.define_path('real', None, "real.json, ImageNet's reassessed labels: ReaL.")
    cli.define_path('config.data.path', None, 'Where the same data are now.')
    cli.define_path('config.data.data_dir', None, 'Where the same TFDS data are now.')
    flags.DEFINE_integer('config.data.skip_bad', None, 'How many unreadable images to skip.')
    flags.DEFINE_bool('json', False, 'Print all metrics as one JSON object.')
    flags.DEFINE_bool('watch', False, 'Evaluate each checkpoint as it appears.')
    moved = ('config.data.path', 'config.data.data_dir', 'config.data.skip_bad')
    cli.run(
        main,
        distributed=True,
        groups={
            'what to evaluate': ('workdir', 'weights', 'checkpoint'),
            'other data': ('data', 'val_labels', 'real'),
            'data that have moved': moved,
        },
    )
