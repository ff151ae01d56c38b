"""The directory of a run: one process claims it for one config; nothing is overwritten."""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments import config as schema
from experiments.config import default_config
from experiments.run import data_record, parallel
from nfnets_jax import fields, files, models
from nfnets_jax.data import sources
from nfnets_jax.errors import UsageError
from nfnets_jax.schedules import canonical_duration
from nfnets_jax.weights import pretrained

# Config keys that may differ on resume: what is written when, how the run fits into memory (the
# number of devices may differ too), and what is done at a step that would have ended the run.
FREE_TO_CHANGE = (
    *('log_every', 'eval', 'data.test_mode', 'checkpoint', 'profile', 'wandb'),
    *('accumulate', 'model.remat', 'model.scan', 'skip_nonfinite'),
    *data_record.HANDLING,
)

_DURATIONS = frozenset(
    ('duration', 'log_every', 'eval.every', 'checkpoint.every', 'profile')
    + ('optimizer.schedule.warmup', 'optimizer.schedule.boundaries', 'optimizer.schedule.every')
)


@contextlib.contextmanager
def claimed(
    workdir: str | os.PathLike,
    config: ConfigDict,
    data: data_record.Record | None = None,
    metadata: pretrained.Metadata | None = None,
) -> Iterator[pathlib.Path]:
    """Creates or re-opens the directory of a run, and locks it against other runs.

    Only process 0 does so; in the others this is a no-op.

    Args:
      workdir: the directory.
      config: config of the run.
      data: record of its data; None if it reads none.
      metadata: what model.json is to hold; None: no model.json.

    Raises:
      UsageError: the directory cannot be written, another run uses it, or it holds a run of another
        config or on other data (the message names the difference).
    """
    path = pathlib.Path(workdir)
    if not parallel.is_primary():
        yield path
        return
    check_config(workdir, config)
    if data:
        data_record.assert_unchanged(path, data)
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
        files.atomic_write(path / 'config.json', json.dumps(as_json(config), indent=2) + '\n')
        # Written once: the files that exist are of this run, and its data have been compared.
        if data and not (path / data_record.DATA_FILE).exists():
            files.atomic_write(path / data_record.DATA_FILE, json.dumps(data, indent=2) + '\n')
        if metadata and not (path / 'model.json').exists():
            files.atomic_write(path / 'model.json', pretrained.encode_metadata(metadata) + '\n')
        yield path


def assert_same(config: ConfigDict, data: data_record.Record) -> None:
    """Raises a UsageError in all processes of a run if their configs or data differ."""
    here, there = as_json(config), parallel.broadcast_json(as_json(config))
    process = f'in process {jax.process_index()}'
    differing = differences(flatten(here), flatten(there), (process, 'in process 0'))
    for difference in parallel.gather_text(differing[0] if differing else ''):
        if difference:
            raise UsageError(f'{difference}: start all with the same --config')
    changed = data_record.changes(parallel.broadcast_json(data), data)
    for difference in parallel.gather_text(changed[0] if changed else ''):
        if difference:
            raise UsageError(
                f'config.data: a process does not see the data of process 0: {difference} there'
            )


def has_checkpoints(workdir: str | os.PathLike) -> bool:
    """Returns whether a directory holds a run that can be resumed."""
    return any(path.name.isdigit() for path in (pathlib.Path(workdir) / 'checkpoints').glob('*'))


def load_config(workdir: str | os.PathLike) -> ConfigDict:
    """Reads the config of a run, of this or any earlier version.

    Raises:
      UsageError: there is no run, or its config.json cannot be read.
    """
    path = pathlib.Path(workdir) / 'config.json'
    try:
        fields = json.loads(path.read_text())
        if not isinstance(fields, dict):
            raise ValueError('it must hold one JSON object')
        return ConfigDict(_with_test_mode(schema.upgrade(fields), path.parent))
    except FileNotFoundError:
        raise UsageError(f'--workdir={workdir} holds no run: there is no {path}') from None
    except (OSError, ValueError) as error:
        raise UsageError(f'{path} cannot be read: {error}') from error


def _with_test_mode(fields: dict[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns the config of a run with the evaluation preprocessing that the run used.

    If the config named none, earlier versions used 'crop_resize' for every network; now the default
    is that of the network. The model.json of the run names the one that was used.
    """
    path, data = directory / 'model.json', fields.get('data')
    if not path.exists() or not isinstance(data, dict) or 'test_mode' in data:
        return fields
    try:
        metadata = pretrained.decode_metadata(path.read_text(), path)
    except (OSError, UsageError):
        return fields
    model = models.variant_info(metadata.model)  # type: ignore[arg-type]  # a run names its model
    if metadata.eval_mode == 'crop_resize' != model.eval_mode:
        data['test_mode'] = metadata.eval_mode
    return fields


def as_json(config: ConfigDict) -> dict[str, Any]:
    """Returns a config as JSON values: dicts, lists, strings, numbers."""
    return json.loads(json.dumps(config.to_dict()))


def check_config(workdir: str | os.PathLike, config: ConfigDict) -> None:
    """Raises a UsageError on process 0 if a directory cannot hold a run of this config."""
    if not parallel.is_primary():
        return
    if not os.fspath(workdir):
        raise UsageError('--workdir= is empty: name a directory')
    path = pathlib.Path(workdir)
    if path.exists() and not path.is_dir():
        raise UsageError(f'--workdir={path} is a file: give a directory')
    if not (path / 'config.json').exists():
        if (path / 'checkpoints').exists():
            raise UsageError(f'--workdir={path} holds checkpoints without a config.json')
        return
    there, here = flatten(as_json(load_config(path))), flatten(as_json(config))
    if differing := differences(there, here, free=free_to_change(path)):
        more = f' (and {len(differing) - 1} more)' if len(differing) > 1 else ''
        raise UsageError(
            f'--workdir={path} holds another experiment: {differing[0]}{more}; '
            'choose another directory'
        )


def free_to_change(workdir: str | os.PathLike) -> tuple[str, ...]:
    """Returns the config keys that may differ when the run in a directory is resumed.

    The place of the data is one of them if there is a record that identifies the data.
    """
    recorded = (pathlib.Path(workdir) / data_record.DATA_FILE).exists()
    return FREE_TO_CHANGE + (data_record.PLACES if recorded else ())


def free_changes(workdir: str | os.PathLike, config: ConfigDict) -> list[str]:
    """Describes the allowed differences of a config from that of the run in a directory.

    There are none in other processes than 0, which do not read the directory.
    """
    if not parallel.is_primary() or not (pathlib.Path(workdir) / 'config.json').exists():
        return []
    before, now = flatten(as_json(load_config(workdir))), flatten(as_json(config))
    where = 'before', 'now'
    refused = differences(before, now, where, free=free_to_change(workdir))
    return [change for change in differences(before, now, where) if change not in refused]


def differences(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    where: tuple[str, str] = ('there', 'here'),
    *,
    prefix: str = 'config.',
    free: Collection[str] = (),
) -> list[str]:
    """Describes how two flat configs differ: ['config.seed is 0 there and 1 here', ...].

    Two spellings of one value are equal, and a missing option of the data equals its default.

    Args:
      first, second: configs from `flatten`.
      where: what to call each of them.
      prefix: prefix of the keys.
      free: keys that may differ, with everything below them.
    """
    keys = (
        key
        for key in sorted(first.keys() | second.keys())
        if not any(f'{key}.'.startswith(f'{name}.') for name in free)
    )
    values = ((key, _value(first, key), _value(second, key)) for key in keys)
    return [
        f'{prefix}{key} is {here!r} {where[0]} and {there!r} {where[1]}'
        for key, here, there in values
        if _canonical(key, here) != _canonical(key, there)
    ]


def _value(config: Mapping[str, Any], key: str) -> Any:
    """Returns a field of a flat config.

    A missing option of the data has its default, and a field that earlier versions lacked has the
    value of what these did.
    """
    node, _, option = key.partition('.')
    if key in config or node != 'data' or config.get('data.name') not in sources.SOURCES:
        return config.get(key, schema.ADDED_FIELDS.get(key))
    runner = default_config().data
    if option in runner:
        return runner[option]
    default = fields.defaults(sources.source_options(config['data.name'])).get(option)
    return json.loads(json.dumps(default))


def _canonical(key: str, value: Any) -> Any:
    """Returns the same value for two spellings of it: '40 epoch' and '40 epochs'."""
    if key in _DURATIONS and isinstance(value, list):
        return [_canonical(key, one) for one in value]
    with contextlib.suppress(UsageError):  # The user of the value reports what is wrong with it.
        if key in _DURATIONS:
            return canonical_duration(value)
        if key == 'model.name':
            return models.variant_info(value).name
    return value


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Returns a nested config with dotted keys: {'a': {'b': 1}} -> {'a.b': 1}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f'{prefix}{key}.'))
        else:
            flat[prefix + key] = value
    return flat
