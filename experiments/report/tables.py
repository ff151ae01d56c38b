"""trials.csv and correct.npz: what the numbers of a report were computed from.

trials.csv has a row for each trial: id, arm and other axes, state, error, last step, seconds of the
session that ended it (trials share the machine), the study's versions, and every metric.
correct.npz has the arrays of `experiments.study.per_image` for each trial, as 'ID/test'. `restore`
makes the directory of a study of the two and its study.json, so that a report can be made again.
"""

import csv
import io
import json
import os
import pathlib
from typing import Any

import numpy as np

from experiments.report.reading import Study
from experiments.study import per_image
from experiments.study.schema import SUMMARY_FILE
from nfnets_jax import files
from nfnets_jax.errors import UsageError, first_line

TRIALS_FILE, CORRECT_FILE = 'trials.csv', per_image.PER_IMAGE_FILE


def write(study: Study, directory: str | os.PathLike, prefix: str = '') -> list[str]:
    """Writes the tables of a study into a directory; returns their names, which begin with prefix.

    Without per-image results, as in studies of earlier versions, there is no correct.npz.
    """
    path = pathlib.Path(directory)
    summary = json.loads((study.path / SUMMARY_FILE).read_text(encoding='utf-8'))
    contents: dict[str, bytes | str] = {TRIALS_FILE: _to_csv(summary)}
    arrays = {
        f'{trial.id}/{name}': array
        for trial in study.trials
        for name, array in per_image.pack(per_image.read(study.path / 'trials' / trial.id)).items()
    }
    if arrays:
        contents[CORRECT_FILE] = per_image.to_bytes(arrays)
    settings = {name: value for name, value in summary.items() if name != 'trials'}
    contents[SUMMARY_FILE] = json.dumps(settings, indent=1) + '\n'
    for name, content in contents.items():
        files.atomic_write(path / f'{prefix}{name}', content)
    return [f'{prefix}{name}' for name in contents]


def restore(directory: str | os.PathLike, to: str | os.PathLike, prefix: str = '') -> None:
    """Writes the study whose tables are in a directory into another, without learning curves."""
    path, study = pathlib.Path(directory), pathlib.Path(to)
    summary = json.loads((path / f'{prefix}{SUMMARY_FILE}').read_text(encoding='utf-8'))
    with open(path / f'{prefix}{TRIALS_FILE}', newline='', encoding='utf-8') as file:
        summary['trials'] = [_from_row(row, summary) for row in csv.DictReader(file)]
    study.mkdir(parents=True, exist_ok=True)
    if (path / f'{prefix}{CORRECT_FILE}').exists():
        with np.load(path / f'{prefix}{CORRECT_FILE}', allow_pickle=False) as arrays:
            by_trial: dict[str, dict[str, np.ndarray]] = {}
            for name, array in arrays.items():
                id, _, split = name.rpartition('/')
                by_trial.setdefault(id, {})[split] = array
        for id, own in by_trial.items():
            (study / 'trials' / id).mkdir(parents=True, exist_ok=True)
            per_image.write(study / 'trials' / id, per_image.unpack(own))
    files.atomic_write(study / SUMMARY_FILE, json.dumps(summary, indent=1) + '\n')


def restore_all(directory: str | os.PathLike, to: str | os.PathLike) -> list[pathlib.Path]:
    """Restores every study whose tables are in a directory; returns their new directories.

    Raises:
      UsageError: there are none, or one is damaged.
    """
    found = sorted(pathlib.Path(directory).glob(f'*-{TRIALS_FILE}'))
    if not found:
        raise UsageError(f'--tables={directory}: holds no *-{TRIALS_FILE}')
    prefixes = [path.name.removesuffix(TRIALS_FILE) for path in found]
    for prefix in prefixes:
        try:
            restore(directory, pathlib.Path(to) / f'{prefix}restored', prefix)
        except OSError as error:
            raise UsageError(f'{error.filename or directory}: {error.strerror or error}') from error
        except (*files.DAMAGED_ARCHIVE, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f'--tables={directory}: {prefix}* are damaged: {first_line(error)}'
            ) from error
    return [pathlib.Path(to) / f'{prefix}restored' for prefix in prefixes]


def _to_csv(summary: dict[str, Any]) -> str:
    trials, axes = summary['trials'], list(summary['axes'])
    metrics = sorted({name for trial in trials for name in trial.get('metrics') or {}})
    versions = ' '.join(f'{name}={x}' for name, x in summary.get('versions', {}).items())
    table = io.StringIO()
    writer = csv.writer(table, lineterminator='\n')
    own = ('id', 'state', 'error', 'step', 'seconds')
    writer.writerow([*own, 'versions', *(f'axis:{axis}' for axis in axes), *metrics])
    for trial in trials:
        values = [json.dumps(trial['axes'][a]) if a in trial['axes'] else '' for a in axes]
        found = [json.dumps(trial.get('metrics', {}).get(name, '')) for name in metrics]
        blanks = ['' if value == '""' else value for value in found]
        writer.writerow([*(trial.get(name) for name in own), versions, *values, *blanks])
    return table.getvalue()


def _from_row(row: dict[str, str], summary: dict[str, Any]) -> dict[str, Any]:
    axes = {axis: row[f'axis:{axis}'] for axis in summary['axes']}
    fixed = {'id', 'state', 'error', 'step', 'seconds', 'versions', *(f'axis:{a}' for a in axes)}
    return {
        'id': row['id'],
        'state': row['state'],
        'error': row['error'] or None,
        'step': int(row['step'] or 0),
        'seconds': float(row['seconds']) if row['seconds'] else None,
        'axes': {axis: json.loads(value) for axis, value in axes.items() if value},
        'metrics': {k: json.loads(v) for k, v in row.items() if k not in fixed and v},
    }
