import re

import pytest

from configs.imagenet import nf_resnet
from configs.studies import sam
from experiments import config as schema
from experiments.launch import config_help
from experiments.study import config as study_config
from tests import processes
from tests.experiments.conftest import ROOT, tiny_config


def run(command, *arguments):
    return processes.run(['-m', f'experiments.{command}', *arguments], cwd=ROOT)


def listing(config):
    return list(config_help.describe('x.py', ('a', 'b'), schema.declared(config), config))


def test_every_field_is_listed_with_its_value():
    config = tiny_config(model__width=2, optimizer__groups=({'match': '.*', 'lr_scale': 0.5},))
    lines = listing(config)
    text = '\n'.join(lines)
    assert max(map(len, lines)) <= config_help.WIDTH
    assert '--config=x.py:VARIANT, where VARIANT is one of: a b' in text
    for line in (
        "  precision = 'float32'  ('float32' or 'bfloat16')",
        '      Dtype of the computation in training.',
        '  width = 2  (None or a number above 0)',  # as the config says
        '  alpha = 0.2  (a number above 0)',  # the model's own, which the config does not name
        '  per_class = None  (None or an integer of at least 1)',
        "      [0] = {'match': '.*', 'lr_scale': 0.5}",
    ):
        assert line in lines, line
    nodes = [line.partition(':')[0] for line in lines if line.startswith('config')]
    assert nodes[:3] == ['config', 'config.model', 'config.init']
    assert 'config.optimizer.groups[i]' in nodes
    assert {'config.augment', 'config.optimizer.schedule', 'config.wandb'} <= set(nodes)


def test_an_option_that_must_be_given_has_no_value():
    assert '  path  (a string or a path)' in listing(tiny_config(data={'name': 'folder'}))


def test_fields_of_a_study_and_of_its_base():
    study = study_config.default_study()
    lines = list(config_help.describe('x.py', (), study_config.declared(study), study))
    assert "  grid = {'seed': (0, 1, 2)}  (a mapping)" in lines
    assert 'config.base: The config that all trials start from.' in lines
    assert 'config.base.optimizer.clip: Gradient clipping.' in lines
    assert not any('VARIANT' in line for line in lines)


@pytest.mark.parametrize(
    ('command', 'config', 'expected'),
    [
        ('train', 'imagenet/nf_resnet.py:101', "name = 'NF-ResNet-101'"),
        ('study', 'studies/sam.py', 'config.base.sam: Sharpness-aware minimization.'),
    ],
)
def test_help_with_a_config_lists_it_after_the_flags(command, config, expected):
    done = run(command, f'--config=configs/{config}', '--help')
    assert (done.returncode, done.stderr) == (0, '')
    flags, _, fields = done.stdout.partition('\nconfigs/')
    assert '--workdir' in flags
    assert expected in fields
    variants = re.search(r'VARIANT is one of:((?: +\S+\n?)+?)  --config', fields)[1].split()
    assert variants == list(nf_resnet.VARIANTS if command == 'train' else sam.VARIANTS)


def test_help_without_a_config_and_with_a_wrong_one():
    done = run('train', '--help')
    assert (done.returncode, 'config.model' in done.stdout) == (0, False)
    done = run('train', '--config=configs/digits.py:nff', '--help')
    assert done.returncode == 2
    assert done.stderr == (
        "error: --config=configs/digits.py:nff: no variant 'nff' (did you mean 'nf'?)\n"
    )
