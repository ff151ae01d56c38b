"""A training run small enough for a test: two seconds after compilation."""

import os
import pathlib
import re
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from experiments.config import default_config
from tests import processes

ROOT = pathlib.Path(__file__).parents[2]
# Compilation dominates a small run, and grows with the network's depth.
ONE_BLOCK = {'widths': (8,), 'depths': (1,)}


def tiny_config(**changes) -> ConfigDict:
    """Returns six steps of one block on 8x8 digits; `changes` are dotted keys, `a__b=1`."""
    config = default_config()
    config.model = {'name': 'NF-ResNet-8', **ONE_BLOCK}
    config.data.image_size = 8
    config.augment.shift = 1
    config.batch_size = 64
    config.duration = '6 steps'
    config.log_every = '2 steps'
    config.eval.every = '3 steps'
    config.eval.batch_size = 100
    config.checkpoint.every = '3 steps'
    for key, value in changes.items():
        *nodes, field = key.split('__')
        node = config
        for name in nodes:
            node = node[name]
        with node.ignore_type():
            node[field] = value
    return config


@pytest.fixture
def tiny():
    return tiny_config


CONFIG_FILE = """
from tests.experiments.conftest import tiny_config
def get_config():
    return tiny_config()
"""


@pytest.fixture(scope='session')
def command(tmp_path_factory):
    """Returns a function that starts `python -m experiments.NAME`, by default for the tiny run.

    `host` is one of `launch.hosts`, instead of this machine.
    """
    file = tmp_path_factory.mktemp('config') / 'tiny.py'
    file.write_text(CONFIG_FILE)

    def start(name, *arguments, devices=4, host=None, **options):
        if name == 'train' and not any(str(x).startswith('--config=') for x in arguments):
            arguments = (f'--config={file}', *arguments)
        program = ['-m', f'experiments.{name}', *map(str, arguments)]
        options = {
            'stdout': subprocess.PIPE,
            'stderr': subprocess.PIPE,
            'cwd': ROOT,
            'env': {
                **os.environ,
                'PYTHONPATH': str(ROOT),
                'XLA_FLAGS': re.sub(
                    r'(device_count)=\d+', rf'\1={devices}', os.environ['XLA_FLAGS']
                ),
            },
            **options,
        }
        if host:
            return subprocess.Popen(host.command(sys.executable, *program), text=True, **options)
        return processes.start(program, **options)

    return start
