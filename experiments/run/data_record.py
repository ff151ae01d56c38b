"""data.json: identifies the data of a run, and is compared whenever the run is used again.

A config names a place. The data there may have changed since: a class renamed, images added. Labels
would then swap silently, and a resumed run would no longer equal the uninterrupted one bit for bit.
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
# Config keys that name the place of the data, and how to read them. They do not change the data.
PLACES = ('data.path', 'data.data_dir')
HANDLING = ('data.skip_bad', 'data.on_device')
_SAME_DATA = (*PLACES, *HANDLING, 'data.sampling')

# {'class_names': [...], 'splits': {split: {'num_examples': int, 'checksum': str}}}
Record = Mapping[str, Any]


def make_record(splits: Mapping[str, sources.Source]) -> Record:
    """Returns the record of the sources of some splits, 'train' among them."""
    identities = {split: sources.identify(source) for split, source in splits.items()}
    return {
        'class_names': list(identities['train'].class_names),
        'splits': {
            split: {'num_examples': identity.num_examples, 'checksum': identity.checksum}
            for split, identity in identities.items()
        },
    }


def key(config: ConfigDict) -> str:
    """Returns a key that is equal for configs with the same data, wherever these are."""
    options = {name: x for name, x in config.data.items() if f'data.{name}' not in _SAME_DATA}
    return json.dumps(options, sort_keys=True, default=list)


def check_study(directory: str | os.PathLike, data: Mapping[str, Record]) -> None:
    """Raises a UsageError if data of a study have changed since it was started.

    Args:
      directory: directory of the study; without a record nothing is compared.
      data: the records of the data now, by `key`.
    """
    for name, then in _of_study(directory).items():
        if name in data and (changed := changes(then, data[name])):
            raise UsageError(
                f'--workdir={directory} holds a study on other data: {in_words(changed)}'
            )


def add_to_study(directory: str | os.PathLike, data: Mapping[str, Record]) -> None:
    """Adds records to those of a study, except for data that have one already."""
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
    """Returns the record of a run; None if there is none.

    Runs of version 0.1.0 have no data.json, but their model.json names the classes.

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
            raise ValueError('it is not a record of data')
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


def assert_unchanged(directory: str | os.PathLike, now: Record) -> None:
    """Raises a UsageError if the data of a run have changed; without a record nothing is compared.

    Args:
      directory: directory of the run.
      now: the record of the data now.
    """
    then = read(directory)
    if then is not None and (changed := changes(then, now)):
        raise UsageError(f'--workdir={directory} holds a run on other data: {in_words(changed)}')


def in_words(changed: Sequence[str], else_do: str = 'choose another directory') -> str:
    """Returns the first three changes and what to do about them."""
    more = f' (and {len(changed) - 3} more changes)' if len(changed) > 3 else ''
    return (
        f'{"; ".join(changed[:3])}{more}, since it was started: bring the data back as they were, '
        f'or {else_do}'
    )


def changes(then: Record, now: Record, splits: Collection[str] | None = None) -> list[str]:
    """Describes how two records differ: ["class 'b' is now 'z'", '12 images were added to train'].

    Args:
      then, now: records; splits are compared if both records have some.
      splits: the splits to compare; None: all.
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
            # A renamed class changes the names of all its images, and is reported already.
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
