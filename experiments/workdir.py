"""The directory of one run: claimed by one process, for one config, never overwritten."""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments import config as experiment
from nfnets_jax import files, models, parallel, pretrained
from nfnets_jax.errors import UsageError

# What may change when a run is continued: where it is written and how it fits into memory, as the
# number of devices may; and what to do from a step on that would have ended it.
FREE_TO_CHANGE = (
    *('log_every', 'eval', 'data.test_mode', 'checkpoint', 'profile', 'wandb'),
    *('accumulate', 'model.remat', 'model.scan', 'skip_nonfinite'),
)


@contextlib.contextmanager
def claimed(
    workdir: str | os.PathLike, config: ConfigDict, *, active: bool = True
) -> Iterator[pathlib.Path]:
    """Creates or re-opens a run's directory, and holds it against another run.

    Args:
      workdir: the directory.
      config: of the run.
      active: whether this process is the one of the run that writes; any other does nothing.

    Raises:
      UsageError: it cannot be written, another run uses it, or it holds a run of
        another config (the message names the keys that differ).
    """
    if not os.fspath(workdir):
        raise UsageError('--workdir= is empty: name a directory')
    path = pathlib.Path(workdir)
    if not active:
        yield path
        return
    _check_config(path, config)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / '.lock', 'a')  # noqa: SIM115, it is closed below
    except OSError as error:
        raise UsageError(f'--workdir={workdir} cannot be written: {error.strerror}') from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f'--workdir={workdir} is in use by another process: wait for it, or choose another'
            ) from error
        files.write_whole(path / 'config.json', json.dumps(as_json(config), indent=2) + '\n')
        yield path


def assert_same(config: ConfigDict) -> None:
    """Raises a UsageError, in all processes, if those of a run were given different configs."""
    here, there = as_json(config), parallel.broadcast_json(as_json(config))
    where = f'in process {jax.process_index()}', 'in process 0'
    differing = differences(flatten(here), flatten(there), where)
    for difference in parallel.gather_text(differing[0] if differing else ''):
        if difference:
            raise UsageError(f'{difference}: start all with the same --config')


def has_checkpoints(workdir: str | os.PathLike) -> bool:
    """Whether there is a run that can be continued."""
    return any(path.name.isdigit() for path in (pathlib.Path(workdir) / 'checkpoints').glob('*'))


def load_config(workdir: str | os.PathLike) -> ConfigDict:
    """Reads the config of the run in a directory, of this or any earlier version.

    Raises:
      UsageError: there is no run, or its config.json cannot be read.
    """
    path = pathlib.Path(workdir) / 'config.json'
    try:
        fields = json.loads(path.read_text())
        if not isinstance(fields, dict):
            raise ValueError('it must hold one JSON object')
        return ConfigDict(_with_test_mode(experiment.upgrade(fields), path.parent))
    except FileNotFoundError:
        raise UsageError(f'--workdir={workdir} holds no run: there is no {path}') from None
    except (OSError, ValueError) as error:
        raise UsageError(f'{path} cannot be read: {error}') from error


def _with_test_mode(fields: dict[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns a run's config with the evaluation preprocessing it was evaluated with.

    Earlier versions took 'crop_resize' for every network where the config named none; since then
    the default is the network's own. The run's model.json tells which of the two it was.
    """
    path, data = directory / 'model.json', fields.get('data')
    if not path.exists() or not isinstance(data, dict) or 'test_mode' in data:
        return fields
    try:
        metadata = pretrained.decode_metadata(path.read_text(), path)
    except (OSError, UsageError):
        return fields
    if metadata.eval_mode == 'crop_resize' != models.variant_info(metadata.model).eval_mode:
        data['test_mode'] = metadata.eval_mode
    return fields


def as_json(config: ConfigDict) -> dict[str, Any]:
    """A config as JSON keeps it: dicts, lists, strings, numbers."""
    return json.loads(json.dumps(config.to_dict()))


def _check_config(path: pathlib.Path, config: ConfigDict) -> None:
    if path.exists() and not path.is_dir():
        raise UsageError(f'--workdir={path} is a file: give a directory')
    if not (path / 'config.json').exists():
        if (path / 'checkpoints').exists():
            raise UsageError(f'--workdir={path} holds checkpoints without a config.json')
        return
    there, here = flatten(as_json(load_config(path))), flatten(as_json(config))
    if differing := differences(there, here, free=FREE_TO_CHANGE):
        more = f' (and {len(differing) - 1} more)' if len(differing) > 1 else ''
        raise UsageError(
            f'--workdir={path} holds another experiment: {differing[0]}{more}; '
            'choose another directory'
        )


def free_changes(workdir: str | os.PathLike, config: ConfigDict) -> list[str]:
    """Tells in what a config differs from that of the run in a directory, as far as it may."""
    if not (pathlib.Path(workdir) / 'config.json').exists():
        return []
    before, now = flatten(as_json(load_config(workdir))), flatten(as_json(config))
    where = 'before', 'now'
    refused = differences(before, now, where, free=FREE_TO_CHANGE)
    return [change for change in differences(before, now, where) if change not in refused]


def differences(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    where: tuple[str, str] = ('there', 'here'),
    *,
    prefix: str = 'config.',
    free: Collection[str] = (),
) -> list[str]:
    """Tells how two flat configs differ: ['config.seed is 0 there and 1 here', ...].

    Args:
      first, second: as `flatten` returns them.
      where: what to call each.
      prefix: of the keys.
      free: keys that may differ, with all that is in them.
    """
    return [
        f'{prefix}{key} is {first.get(key)!r} {where[0]} and {second.get(key)!r} {where[1]}'
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key)
        and not any(f'{key}.'.startswith(f'{name}.') for name in free)
    ]


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f'{prefix}{key}.'))
        else:
            flat[prefix + key] = value
    return flat
