"""The directory of one run: claimed by one process, for one config, never overwritten."""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from nfnets_jax import files, parallel
from nfnets_jax.errors import UsageError

# What may change when a run is continued, since the parameters it ends with do not depend on it.
FREE_TO_CHANGE = ('log_every', 'eval', 'checkpoint', 'profile', 'wandb')


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
    here, there = flatten(as_json(config)), flatten(parallel.broadcast_json(as_json(config)))
    differences = [
        f'config.{key} is {here.get(key)!r} in process {jax.process_index()} and '
        f'{there.get(key)!r} in process 0: start all with the same --config'
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key)
    ]
    for difference in parallel.gather_text(differences[0] if differences else ''):
        if difference:
            raise UsageError(difference)


def has_checkpoints(workdir: str | os.PathLike) -> bool:
    """Whether there is a run that can be continued."""
    return any(path.name.isdigit() for path in (pathlib.Path(workdir) / 'checkpoints').glob('*'))


def load_config(workdir: str | os.PathLike) -> ConfigDict:
    """Reads the config of the run in a directory.

    Raises:
      UsageError: there is no run, or its config.json cannot be read.
    """
    path = pathlib.Path(workdir) / 'config.json'
    try:
        fields = json.loads(path.read_text())
        if not isinstance(fields, dict):
            raise ValueError('it must hold one JSON object')
        return ConfigDict(fields)
    except FileNotFoundError:
        raise UsageError(f'--workdir={workdir} holds no run: there is no {path}') from None
    except (OSError, ValueError) as error:
        raise UsageError(f'{path} cannot be read: {error}') from error


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
    differences = [
        f'config.{key} is {there.get(key)!r} there and {here.get(key)!r} here'
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key) and key.split('.')[0] not in FREE_TO_CHANGE
    ]
    if differences:
        more = f' (and {len(differences) - 1} more)' if len(differences) > 1 else ''
        raise UsageError(
            f'--workdir={path} holds another experiment: {differences[0]}{more}; '
            'choose another directory'
        )


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f'{prefix}{key}.'))
        else:
            flat[prefix + key] = value
    return flat
