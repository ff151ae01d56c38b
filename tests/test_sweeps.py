"""The sweep of Weights & Biases is the study's grid, and its command is one of ours."""

import itertools
import json
import pathlib
import subprocess

import pytest
import yaml

from configs.studies import agc_batch_size as study
from configs.sweeps import agc_batch_size as sweep

ROOT = pathlib.Path(__file__).parents[1]
SWEEP = yaml.safe_load((ROOT / 'configs/sweeps/agc_batch_size.yaml').read_text())


def test_the_values_are_those_of_the_studys_grid():
    planned = study.get_config('digits')
    expected = {f'config.{planned.axes[axis]}': values for axis, values in planned.grid.items()}
    found = {key: tuple(options['values']) for key, options in SWEEP['parameters'].items()}
    assert found == expected
    assert SWEEP['method'] == 'grid'
    # A run without a moving average logs none.
    assert SWEEP['metric']['name'] == f'test{"_ema" if planned.base.ema else ""}/top1'


@pytest.mark.parametrize('size', sweep.VARIANTS)
def test_the_config_is_the_studys(size):
    assert sweep.get_config(size) == study.get_config(size).base


def test_the_command_trains_with_the_values(tmp_path):
    """Runs it as the agent does, with a program in Python's place that tells its arguments."""
    python = tmp_path / 'python'
    python.write_text('#!/usr/bin/env python3\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n')
    python.chmod(0o755)
    names = list(SWEEP['parameters'])
    values = next(itertools.product(*(SWEEP['parameters'][name]['values'] for name in names)))
    *command, placeholder = SWEEP['command']
    assert placeholder == '${args}'
    given = [f'--{name}={value}' for name, value in zip(names, values, strict=True)]
    environment = {'PATH': f'{tmp_path}:/usr/bin:/bin', 'WANDB_RUN_ID': 'a1b2'}
    done = subprocess.run([*command, *given], env=environment, capture_output=True, check=True)
    arguments = json.loads(done.stdout)
    assert arguments[:2] == ['-m', 'experiments.train']
    assert arguments[2:] == [
        '--config=configs/sweeps/agc_batch_size.py:digits',
        '--workdir=runs/sweep/a1b2',
        '--config.wandb.project=agc',
        *given,
    ]
