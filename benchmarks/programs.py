"""What training steps are once compiled: cycles on TPUs, kernels and bytes on GPUs; none is run.

    pip install 'nfnets_jax[tpu]' 'nfnets_jax[cuda]'
    python -m benchmarks.programs --json=FILE
    python -m benchmarks.programs --json=FILE --models=NFNet-F0 --targets=v5e:2x2 --augment

The step is the runner's, with AGC, decay, Nesterov and moving average, in bfloat16, for so many
--rows on each device; with --augment the published augmentation is in it. `ms` is the
compiler's estimate, `ms/0.82` that over the part of measured steps that such estimates were, and so
are images/s and chip-hours (docs/preflight.md); `measured` is the paper's, on a TPU v3. `flags` is
what a step needs in order to fit.

Rows that FILE has are kept, and each is written as soon as it is there. With --nocompile those that
it lacks are computed by the fitted formula of experiments.scaling instead, marked ~, and not kept.
"""

import itertools
import json
import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from benchmarks import timing
from configs.imagenet import nf_resnet, nfnet
from experiments import preflight, scaling
from experiments.run import targets
from nfnets_jax.errors import UsageError

KEY = ('model', 'target', 'rows', 'augment')
PLAN = {'examples': None, 'classes': None}  # ImageNet's are known


def main(argv=None):
    models, kinds = (
        'NFNet-F0,NFNet-F1,NF-ResNet-50',
        'v3:2x2,v4:2x2x1,v5e:2x2,v6e:2x2,H100:1,A100:1',
    )
    parser = timing.parser(__doc__, models=models, targets=kinds, rows=32)
    parser.add_argument('--augment', action='store_true', help='with the published augmentation')
    parser.add_argument('--nocompile', action='store_true', help='the formula for missing rows')
    args = parser.parse_args(argv)
    if not args.json:
        parser.error('--json=FILE: say where the rows are kept')
    jax.config.update('jax_platforms', 'cpu')
    path = pathlib.Path(args.json)
    kept = json.loads(path.read_text())['rows'] if path.exists() else []
    found = {tuple(row[key] for key in KEY): row for row in kept}
    asked = []
    for model, target in itertools.product(args.models.split(','), args.targets.split(',')):
        key = model, target, args.rows, args.augment
        row = found.get(key)
        try:
            if row is None and args.nocompile:
                row = by_formula(*key)
            elif row is None:
                row = found[key] = compiled(*key)
                timing.write(args.json, timing.about(), list(found.values()))
        except UsageError as error:
            parser.error(str(error))
        asked.append(row)
    timing.show([in_short(row) for row in asked])


def compiled(model: str, target: str, rows: int, augment: bool) -> dict[str, Any]:
    """Returns the row of one program, compiled."""
    opened = targets.open_target(target)
    config = published_config(model, rows * len(opened.devices), augment)
    report = preflight.preflight(config, opened, PLAN, preflight.Progress(f'{model} on {target}'))
    flags = report.get('flags', [])
    report = report.get('with_flags', report)
    memory = sum(report['memory'][key] for key in ('arguments', 'temporaries', 'code'))
    return {
        **dict(zip(KEY, (model, target, rows, augment), strict=True)),
        'flags': ' '.join(flags).replace('--config.', ''),
        'needed': memory,
        **report,
    }


def published_config(model: str, batch_size: int, augment: bool) -> ConfigDict:
    """Returns the published recipe of a network, in bfloat16 and with a moving average."""
    family, _, variant = model.rpartition('-')
    config = (
        nfnet.get_config(variant)
        if family == 'NFNet'
        else nf_resnet.get_config(f'{variant},clipping')
    )
    config.batch_size = batch_size
    config.precision, config.ema = 'bfloat16', 0.99999
    if not augment:
        config.augment.update(flip=False, mixup=0.0, cutmix=0.0, randaugment_layers=0)
    return config


def by_formula(model: str, target: str, rows: int, augment: bool) -> dict[str, Any]:
    """Returns the row of a program that is not compiled, as `experiments.scaling` computes it."""
    device, chips, devices = targets.count_devices(target)
    estimate = scaling.estimate(model, device, devices, rows * devices)
    flags = [f'accumulate={estimate.accumulate}'] if estimate.accumulate > 1 else []
    flags += ['model.remat=true'] if estimate.remat else []
    steps = 360 * scaling.IMAGES / (rows * devices)
    return {
        **dict(zip(KEY, (f'~{model}', target, rows, augment), strict=True)),
        'calibrated': estimate.step,
        'chip_hours': steps * estimate.step / 3600 * chips,
        'needed': estimate.memory,
        'flags': ' '.join(flags),
    }


def in_short(row: dict[str, Any]) -> dict[str, Any]:
    """Returns what the table shows of a row; None where there is nothing to show."""

    def scaled(key: str, scale: float) -> float | None:
        return None if row.get(key) is None else row[key] * scale

    is_estimate = 'calibrated' not in row
    share = preflight.MEASURED_SHARE if is_estimate else 1
    calibrated = row.get('step_seconds', 0) / share if is_estimate else row['calibrated']
    published = scaling.PUBLISHED_MS.get(row['model'].removeprefix('~').removeprefix('NFNet-'))
    on_v3 = row['target'].startswith('v3') and row['rows'] == 32
    return {
        'model': row['model'],
        'target': row['target'],
        'Mcycles': scaled('cycles', 1e-6),
        'ms': scaled('step_seconds', 1e3),
        f'ms/{preflight.MEASURED_SHARE}': calibrated * 1e3 or None,
        'measured': published[0] if published and on_v3 else None,
        'images/s': row['rows'] * targets.count_devices(row['target'])[2] / calibrated
        if calibrated
        else None,
        'chip-hours': scaled('chip_hours', 1 / share),
        'kernels': scaled('kernels', 1.0),
        'GB moved': scaled('bytes_accessed', 1e-9),
        'GB': scaled('needed', 1e-9),
        'flags': row['flags'] or '-',
    }


if __name__ == '__main__':
    main()
