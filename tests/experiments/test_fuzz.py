"""Random mistakes in configs and on command lines: each runs two steps, or is one clear line.

    .venv/bin/python -m pytest tests/experiments/test_fuzz.py -m slow

Every case is the real command, in a process of its own.
"""

import os
import random
import re

import pytest

from tests import processes
from tests.experiments.conftest import ROOT, tiny_config

CASES = 1000
FEW = 10

CONFIG_FILE = """
from tests.experiments.conftest import tiny_config
from tests.experiments.test_fuzz import mutate
def get_config(seed=''):
    config = tiny_config(duration=2, eval__every=2, checkpoint__every=2)
    return mutate(config, int(seed)) if seed else config
"""

NUMBERS = (0, 1, 2, 3, 5, 64, -1, 0.5, 1.0, -0.0, 1e30, -1e-30, float('inf'), float('nan'), 2**70)
STRINGS = (
    '',
    'x',
    'agc',
    'none',
    'sgd',
    '10%',
    '1 epochs',
    '-3 steps',
    '3 parsecs',
    'ü\n',
    "'",
    '{',
)
OTHERS = (True, False, None, (), (1, 2), {}, {'a': 1}, ('x',))
# A run of a million steps, or of pictures or networks as large, is no mistake that one could see.
TOO_LARGE = re.compile(r'image_size|width|depths|test_image_size')
LARGE = (5, 64, 1e30, float('inf'), 2**70)


def nodes(config, prefix=''):
    """All (node, field, dotted name) of a config."""
    for field in sorted(config):
        yield config, field, prefix + field
        if hasattr(config[field], 'keys'):
            yield from nodes(config[field], f'{prefix}{field}.')


def value(rng, name):
    pool = rng.choice((NUMBERS, NUMBERS, STRINGS, OTHERS))
    if name == 'duration' or TOO_LARGE.search(name):
        pool = [x for x in pool if x not in LARGE and x != '1 epochs']
    return rng.choice(pool)


def mutate(config, seed):
    """The config with one to three fields changed, removed, renamed or added."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 3)):
        node, field, name = rng.choice(list(nodes(config)))
        with node.ignore_type(), node.unlocked():
            match rng.randrange(6):
                case 0:
                    del node[field]
                case 1:
                    node[misspelt(rng, field)] = node[field]
                case _:
                    node[field] = value(rng, name)
    return config


def misspelt(rng, name):
    at = rng.randrange(len(name))
    return name[:at] + rng.choice(('', 'x', name[at] * 2)) + name[at + 1 :]


def command_line(seed):
    """Overrides of one to three fields, some of them misspelt."""
    rng = random.Random(seed)
    names = [name for _, _, name in nodes(tiny_config())]
    arguments = []
    for _ in range(rng.randint(1, 3)):
        name = rng.choice(names)
        text = str(value(rng, name))
        name = misspelt(rng, name) if rng.randrange(5) == 0 else name
        arguments.append(
            rng.choice((f'--config.{name}={text}', f'--config.{name}={text}', f'--{name}'))
        )
    return arguments


@pytest.fixture(scope='module')
def train(tmp_path_factory):
    """A function that runs a case: its exit status, its errors and its workdir."""
    path = tmp_path_factory.mktemp('fuzz')
    (path / 'fuzz.py').write_text(CONFIG_FILE)
    environment = {
        **os.environ,
        'XLA_FLAGS': re.sub(r'(device_count)=\d+', r'\1=1', os.environ['XLA_FLAGS']),
    }

    def run(seed, arguments):
        workdir = path / f'{seed}.run'
        flags = [f'--config={path}/fuzz.py{arguments[0]}', f'--workdir={workdir}', *arguments[1:]]
        done = processes.run(['-m', 'experiments.train', *flags], cwd=ROOT, env=environment)
        return done.returncode, done.stderr, workdir

    return run


def check(train, seed):
    """Runs a case; returns its exit status, and what is wrong with how it ended, if anything."""
    arguments = [f':{seed}'] if seed % 2 else ['', *command_line(seed)]
    status, err, workdir = train(seed, arguments)
    match status:
        case 0:
            right = (workdir / 'summary.json').exists()
        case 1:
            right = re.fullmatch(r'(.*\n)*stopped: .* not finite at step .*\n', err)
        case 2:
            right = re.fullmatch(r'error: .{10,}\n', err) and not workdir.exists()
        case _:
            right = False
    return status, None if right else f'{arguments}: status {status}\n{err}'


def check_all(train, seeds):
    ends = [check(train, seed) for seed in seeds]
    problems = [problem for _, problem in ends if problem]
    assert not problems, '\n'.join(problems)
    return {status for status, _ in ends}


def test_a_few(train):
    assert 2 in check_all(train, range(FEW))


@pytest.mark.slow
def test_what_no_mistake_was_put_into_is_trained(train):
    status, _, workdir = train(CASES, [''])
    assert (status, (workdir / 'summary.json').exists()) == (0, True)


@pytest.mark.slow
@pytest.mark.parametrize('first', range(FEW, CASES, FEW))
def test_many(train, first):
    check_all(train, range(first, first + FEW))
