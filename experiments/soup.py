"""Averages weights of one network: a model soup (arXiv 2203.05482).

    python -m experiments.soup --weights=A.safetensors --weights=B.safetensors --out=C.safetensors
    python -m experiments.soup --workdir=RUN --checkpoints=all --out=C.safetensors
    python -m experiments.soup --greedy --workdir=RUN --out=C.safetensors

The members are all --weights and the --checkpoints of the run in --workdir, of one network with the
same classes; statistics of batch norm are averaged as well. --greedy is recipe 1 of the paper: it
takes the members in the order of their top-1 on the validation images of --workdir or --config, or
on those of --data, and keeps each with which that of the average does not fall. It never looks at
test images.
"""

import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments.experiment import Experiment, build, describe_data
from experiments.launch import cli, weights_flags
from experiments.run import (
    data_record,
    evaluation,
    init_weights,
    other_data,
    parallel,
    workdir,
)
from experiments.train_step import make_eval_step
from nfnets_jax import models
from nfnets_jax.errors import UsageError
from nfnets_jax.weights import pretrained
from nfnets_jax.weights.checkpoints import CheckpointReader


class Member(NamedTuple):
    """Weights that may be part of the average; they are read when they are needed."""

    name: str
    metadata: pretrained.Metadata
    load: Callable[[], pretrained.Weights]


class Sum(NamedTuple):
    """The sum of the variables of some weights; floats in float64, counters of the first weights.

    The mean of equal float32 values is exact.
    """

    size: int
    total: Any
    first: pretrained.Weights

    def mean(self) -> pretrained.Weights:
        """Returns the average in the dtypes and with the metadata of the first weights."""
        variables = jax.tree.map(
            lambda total, x: (total / self.size).astype(x.dtype) if _is_float(x) else x,
            self.total,
            self.first[:2],
        )
        return self.first._replace(params=variables[0], state=variables[1])


def add(total: Sum | None, weights: pretrained.Weights) -> Sum:
    """Returns a sum with more weights; None is the empty sum."""
    variables = jax.tree.map(
        lambda x: np.asarray(x, np.float64 if _is_float(x) else None), weights[:2]
    )
    if total is None:
        return Sum(1, variables, weights)
    return total._replace(size=total.size + 1, total=jax.tree.map(np.add, total.total, variables))


def _is_float(leaf: np.ndarray) -> bool:
    return np.issubdtype(leaf.dtype, np.floating)


def uniform(members: Iterable[Member], log: Callable[[str], None]) -> pretrained.Weights:
    """Returns the average of all members."""
    total = None
    for member in members:
        total = add(total, member.load())
        log(f'{member.name}: added')
    assert total is not None
    return total.mean()


def greedy(
    members: Sequence[Member],
    accuracy: Callable[[pretrained.Weights], float],
    log: Callable[[str], None],
) -> pretrained.Weights:
    """Returns the average of those members that do not lower its accuracy, tried best first.

    Args:
      members: at least one; of equally good ones the earlier is tried first.
      accuracy: the score of weights on the validation images.
      log: receives a line for each member.
    """
    alone = [accuracy(member.load()) for member in members]
    total, best = None, 0.0
    for i in sorted(range(len(members)), key=lambda i: -alone[i]):
        candidate = add(total, members[i].load())
        together = accuracy(candidate.mean()) if total else alone[i]
        verdict = 'left out'
        if together >= best:
            total, best, verdict = candidate, together, 'added'
        average = f', the average with it {together:.2%}' if candidate.size > 1 else ''
        metric = 'mAP' if candidate.first.metadata.multi_label else 'top-1'
        log(f'{members[i].name}: validation {metric} {alone[i]:.2%}{average}: {verdict}')
    assert total is not None
    return total.mean()


def find_members(
    weights: Sequence[str], directory: str | None, checkpoints: str | None, ema: bool = True
) -> Iterator[Member]:
    """Yields the weights that the flags name, then checkpoints of the run in a directory.

    Args:
      weights: paths or names.
      directory: of a run.
      checkpoints: 'all', or steps, 'best' or 'latest', separated by commas; None: all if there are
        no `weights`, else none.
      ema: take the moving average of runs, if there is one.
    """
    for path in weights:
        load = functools.partial(pretrained.load_pretrained, path, ema=ema)
        yield Member(path, pretrained.load_metadata(path), load)
    if directory is None or (weights and checkpoints is None):
        return
    reader = CheckpointReader(pathlib.Path(directory) / 'checkpoints')
    names = reader.steps() if checkpoints in (None, 'all') else checkpoints.split(',')
    for step in dict.fromkeys(reader.choose(str(name)) for name in names):
        load = functools.partial(pretrained.load_pretrained, directory, checkpoint=step, ema=ema)
        yield Member(f'{directory} step {step:,}', pretrained.load_metadata(directory), load)


def check_same(
    name: str, metadata: pretrained.Metadata, others: str, theirs: pretrained.Metadata
) -> None:
    """Raises a UsageError that says what differs unless two weights are of one network.

    Options that no parameter depends on, like dropout, may differ, and the sizes of images.
    """
    where = f'in {name}', f'in {others}'
    found = workdir.differences(_network(metadata), _network(theirs), where, prefix='')
    named = metadata.class_names, theirs.class_names
    if not found and all(named):
        found += [f'class {i} is {a!r} in {name} and {b!r} in {others}'
                  for i, (a, b) in enumerate(zip(*named, strict=True)) if a != b]  # fmt: skip
    for key in ('mean', 'std'):
        values = getattr(metadata, key), getattr(theirs, key)
        if not found and not np.allclose(*values, rtol=0, atol=0.01):  # Files round them otherwise.
            found.append(f'{key} is {values[0]} in {name} and {values[1]} in {others}')
    if found:
        raise UsageError(f'these weights cannot be averaged: {found[0]}')


def _network(metadata: pretrained.Metadata) -> dict[str, Any]:
    if metadata.model is None:
        return {'model': None}
    options = models.resolved_options(metadata.model, **metadata.options)
    kept = {key: value for key, value in options.items() if key not in init_weights.FREE_OPTIONS}
    same = ('channels', 'num_classes', 'multi_label')
    return kept | {name: getattr(metadata, name) for name in same}


def make_accuracy(
    config: ConfigDict,
    directory: str | None,
    log: Callable[[str], None],
    other: str | None = None,
) -> tuple[pretrained.Metadata, Callable[[pretrained.Weights], float]]:
    """Returns what weights must be of, and the function weights -> top-1 on the validation images.

    Args:
      config: of a run, which names the data.
      directory: of that run, with the record of its data; None if there is none.
      log: receives lines about the data.
      other: path of other data to validate on, with the classes of the run in `directory`.

    Raises:
      UsageError: there are no validation images, or the data of the run have changed.
    """
    if other and directory:
        return _accuracy_on_other(config, directory, log, other)
    experiment = build(config, training=False)
    if experiment.validation_source is None:
        raise UsageError(
            f'--greedy needs validation images, and the data {config.data.name!r} have none: '
            'make a validation split, the test images must not choose'
        )
    if directory is not None:
        data_record.assert_unchanged(directory, data_record.make_record(experiment.splits))
    for line in describe_data(experiment):
        log(line)
    return init_weights.model_metadata(experiment), _accuracy(experiment, 'validation')


def _accuracy_on_other(
    config: ConfigDict, directory: str, log: Callable[[str], None], path: str
) -> tuple[pretrained.Metadata, Callable[[pretrained.Weights], float]]:
    metadata = pretrained.load_metadata(directory)
    config = other_data.other_config(config, path, metadata)
    source = other_data.open_other(config, metadata, default='validation')
    log(other_data.describe(source))
    open_source = other_data.opener(source, config, metadata)
    experiment = build(config, training=False, open_source=open_source)
    return init_weights.model_metadata(experiment), _accuracy(experiment, 'test')


def _accuracy(experiment: Experiment, split: str) -> Callable[[pretrained.Weights], float]:
    eval_step = make_eval_step(experiment)

    def accuracy(weights: pretrained.Weights) -> float:
        variables = parallel.replicate({'': (weights.params, weights.state)})
        metrics = evaluation.evaluate(experiment, eval_step, variables, split)
        return evaluation.score(metrics, split)

    return accuracy


def main() -> None:
    args = flags.FLAGS
    out = pathlib.Path(args.out)
    cli.check_out(out, ('.safetensors',))
    if args.workdir is not None:
        weights_flags.check_workdir(args.workdir)
    if args.checkpoints is not None and args.workdir is None:
        raise UsageError('--checkpoints are those of a run: give its --workdir')
    if not args.greedy and args.data is not None:
        raise UsageError('--data names the validation images of --greedy: give both or neither')
    if not args.greedy and args.config is not None:
        raise UsageError('--config names the validation images of --greedy: give both or neither')
    members = list(find_members(args.weights or (), args.workdir, args.checkpoints, args.ema))
    if not args.greedy and args.workdir and args.weights and args.checkpoints is None:
        raise UsageError('--weights and --workdir: add --checkpoints of the run, or --greedy')
    if len(members) < 2:
        raise UsageError(
            f'an average needs two weights or more, not {len(members)}: give --weights several '
            'times, or --workdir of a run with several checkpoints'
        )
    first = members[0]
    if first.metadata.model is None:
        raise UsageError(f'{first.name}: the parameters are not those of a known model')
    for member in members[1:]:
        check_same(member.name, member.metadata, first.name, first.metadata)

    def log(line: str) -> None:
        print(line, flush=True)

    if args.greedy:
        if args.config is None and args.workdir is None:
            raise UsageError('--greedy needs --workdir or --config: whose validation images?')
        own = args.config is None  # the config of the run
        config = workdir.load_config(args.workdir) if own else args.config
        if args.data is not None and not own:
            raise UsageError('--data is for the run of --workdir: leave it or --config out')
        wanted, accuracy = make_accuracy(config, args.workdir if own else None, log, args.data)
        check_same(first.name, first.metadata, 'the config of the validation images', wanted)
        weights = greedy(members, accuracy, log)
    else:
        weights = uniform(members, log)
    pretrained.save_weights(out, weights)
    print(f'{out}: {pretrained.describe(weights)}')


if __name__ == '__main__':
    cli.define_paths('weights', None, 'A file, a published name or a run; may be repeated.')
    cli.define_workdir('Directory of a run: its checkpoints, its validation images.')
    flags.DEFINE_string(
        'checkpoints', None, "Of the run: 'all', or steps, 'best', 'latest', with commas."
    )
    flags.DEFINE_bool('ema', True, 'Take the moving average of runs, if there is one.')
    flags.DEFINE_bool('greedy', False, 'Leave out weights that lower the validation top-1.')
    config_flags.DEFINE_config_file(
        'config', None, 'Config file whose validation images --greedy uses.', lock_config=True
    )
    cli.define_path('data', None, 'Other images that --greedy uses, of the classes of --workdir.')
    cli.define_path('out', None, 'The .safetensors to write.', required=True)
    cli.run(main)
