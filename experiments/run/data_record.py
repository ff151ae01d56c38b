"""Which data a run was started on: kept beside its config, and compared whenever it goes on.

A config names a place. What lies there may have changed since: a class renamed, images added.
Labels would then swap in silence, and a resumed run would no longer be bit for bit the one that
never stopped. So a run keeps the identity of its data in data.json, and all who use it compare.
"""

import json
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from nfnets_jax import files
from nfnets_jax.data import sources
from nfnets_jax.errors import UsageError
from nfnets_jax.weights import pretrained

DATA_FILE = 'data.json'
# Keys of a config that say where the data lie, and how they are read: the data are the same.
PLACES = ('data.path', 'data.data_dir')
HANDLING = ('data.skip_bad', 'data.on_device')

# {'class_names': [...], 'splits': {split: {'num_examples': int, 'checksum': str}}}
Record = Mapping[str, Any]


def describe(splits: Mapping[str, sources.Source]) -> Record:
    """Returns the record of some data, as JSON holds it.

    Args:
      splits: 'train' and others -> source, see `nfnets_jax.data.sources`.
    """
    identities = {split: sources.identify(source) for split, source in splits.items()}
    return {
        'class_names': list(identities['train'].class_names),
        'splits': {
            split: {'num_examples': identity.num_examples, 'checksum': identity.checksum}
            for split, identity in identities.items()
        },
    }


def key(config: ConfigDict) -> str:
    """Returns what data a config asks for, wherever they lie."""
    options = {
        name: x for name, x in config.data.items() if f'data.{name}' not in PLACES + HANDLING
    }
    return json.dumps(options, sort_keys=True, default=list)


def check_study(directory: str | os.PathLike, data: Mapping[str, Record]) -> None:
    """Raises a UsageError if data of a study are no longer those that it was started on.

    Args:
      directory: of the study; where it has no record yet nothing is compared.
      data: the records of today, by `key`.
    """
    for name, then in _of_study(directory).items():
        if name in data and (changed := changes(then, data[name])):
            raise UsageError(
                f'--workdir={directory} holds a study on other data: {in_words(changed)}'
            )


def add_to_study(directory: str | os.PathLike, data: Mapping[str, Record]) -> None:
    """Adds records to those of a study, but for data that have one already."""
    known = _of_study(directory)
    if new := {name: record for name, record in data.items() if name not in known}:
        text = json.dumps(known | new, indent=1)
        files.atomic_write(pathlib.Path(directory) / DATA_FILE, text + '\n')


def _of_study(directory: str | os.PathLike) -> dict[str, Record]:
    path = pathlib.Path(directory) / DATA_FILE
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f'{path} cannot be read: {error}') from error


def read(directory: str | os.PathLike) -> Record | None:
    """Returns the record of a run; None if there is no run, or one that says nothing of its data.

    Runs of version 0.1.0 have no data.json. Their model.json names the classes.

    Raises:
      UsageError: the file cannot be read.
    """
    path = pathlib.Path(directory) / DATA_FILE
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
        splits = record['splits'].values()
        if not all(isinstance(name, str) for name in record['class_names']) or not all(
            isinstance(split['num_examples'], int) and isinstance(split['checksum'], str)
            for split in splits
        ):
            raise ValueError('it is no record of data')
        return record
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f'{path} cannot be read: {error}') from error
    model = pathlib.Path(directory) / 'model.json'
    if not model.exists():
        return None
    names = pretrained.load_metadata(directory).class_names
    return {'class_names': list(names), 'splits': {}} if names else None


def write_once(directory: str | os.PathLike, record: Record) -> None:
    """Writes the record of a run if it has none."""
    path = pathlib.Path(directory) / DATA_FILE
    if not path.exists():
        files.atomic_write(path, json.dumps(record, indent=2) + '\n')


def check(directory: str | os.PathLike, now: Record, splits: Collection[str] | None = None) -> None:
    """Raises a UsageError if the data are no longer those that a run was started on.

    Args:
      directory: of the run; nothing is compared where it has no record.
      now: what `describe` says of the data today.
      splits: those that matter; None: all.
    """
    then = read(directory)
    if then is not None and (changed := changes(then, now, splits)):
        raise UsageError(f'--workdir={directory} holds a run on other data: {in_words(changed)}')


def in_words(changed: Sequence[str], else_do: str = 'choose another directory') -> str:
    """Returns what `changes` found, the first few of it, and what to do about it."""
    more = f' (and {len(changed) - 3} more changes)' if len(changed) > 3 else ''
    return (
        f'{"; ".join(changed[:3])}{more}, since it was started: bring the data back as they were, '
        f'or {else_do}'
    )


def changes(then: Record, now: Record, splits: Collection[str] | None = None) -> list[str]:
    """Says how two records differ: ["class 'b' is now 'z'", '12 images were added to train'].

    Args:
      then, now: records; a split is compared where both sides know of splits.
      splits: those to compare; None: all.
    """
    found = _class_changes(then['class_names'], now['class_names'])
    before, after = then['splits'], now['splits']
    if not before:
        return found
    for split in [*before, *(split for split in after if split not in before)]:
        if splits is not None and split not in splits:
            continue
        if split not in after:
            found.append(f'there is no {split} split any more')
        elif split not in before:
            found.append(f'there is a {split} split now')
        elif more := after[split]['num_examples'] - before[split]['num_examples']:
            found.append(
                f'{_count(more)} added to {split}'
                if more > 0
                else f'{_count(-more)} removed from {split}'
            )
        elif before[split]['checksum'] != after[split]['checksum'] and not found:
            # A renamed class changes the names of all images in it: that has been said.
            found.append(f'the {after[split]["num_examples"]} images of {split} are others')
    return found


def _class_changes(then: Sequence[str], now: Sequence[str]) -> list[str]:
    gone = [name for name in then if name not in now]
    new = [name for name in now if name not in then]
    if len(gone) == len(new):
        found = [f'class {a!r} is now {b!r}' for a, b in zip(gone, new, strict=True)]
    else:
        found = [f'class {name!r} was removed' for name in gone]
        found += [f'class {name!r} was added' for name in new]
    if not found and list(then) != list(now):
        at = next(i for i, (a, b) in enumerate(zip(then, now, strict=True)) if a != b)
        found = [f'the classes are in another order: label {at} was {then[at]!r}, is {now[at]!r}']
    return found


def _count(number: int) -> str:
    return f'{number:,} image{"s were" if number > 1 else " was"}'
