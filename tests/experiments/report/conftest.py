"""A study of three arms, small enough to know all its numbers."""

import itertools
import json

import pytest

# Test top-1 of seed 0 at the better learning rate; the other costs 0.1, the next seed adds 0.01.
BEST = {
    ('bn', 32): 0.80,
    ('bn', 256): 0.90,
    ('nf', 32): 0.85,
    ('nf', 256): 0.60,
    ('agc', 32): 0.85,
    ('agc', 256): 0.90,
}
CLIPPING_COST = {None: 0.0, 0.01: 0.0, 0.16: 0.05}
STEPS = (10, 20, 30)
AGC, LARGE = {'arm': 'agc', 'clipping': 0.01}, {'batch_size': 256, 'learning_rate': 0.4}


def fields() -> dict:
    """What study.json holds; `nf` diverges at learning rate 1.6, and the rest is as in `BEST`."""
    trials = []
    for arm, batch, rate, seed in itertools.product(
        ('bn', 'nf', 'agc'), (32, 256), (0.4, 1.6), (0, 1, 2)
    ):
        for clipping in (0.01, 0.16) if arm == 'agc' else (None,):
            top1 = BEST[arm, batch] + 0.01 * seed - 0.1 * (rate == 1.6) - CLIPPING_COST[clipping]
            diverged = arm == 'nf' and rate == 1.6
            axes = {'arm': arm, 'batch_size': batch, 'learning_rate': rate, 'seed': seed}
            axes |= {} if clipping is None else {'clipping': clipping}
            trials.append(
                {
                    'id': '-'.join(map(str, axes.values())),
                    'axes': axes,
                    'state': 'diverged' if diverged else 'complete',
                    'step': 15 if diverged else 30,
                    'metrics': {} if diverged else {'test/top1': top1, 'train/gradient_norm': 1e3},
                    'seconds': 2.0,
                    'error': 'the loss was not finite at step 15' if diverged else None,
                    'config_diff': {},
                }
            )
    return {
        'name': 'small',
        'title': 'A small study',
        'question': 'Is it small?',
        'setting': 'Made up.',
        'size': 'digits',
        'command': 'python -m experiments.study --workdir=S',
        'axes': {
            'arm': ['bn', 'nf', 'agc'],
            'batch_size': [32, 256],
            'clipping': [0.01, 0.16],
            'learning_rate': [0.4, 1.6],
            'seed': [0, 1, 2],
        },
        'arms': {'bn': 'batch norm', 'nf': 'NF', 'agc': 'NF with AGC'},
        'tuned': ['learning_rate', 'clipping'],
        'chance': 0.1,
        'metric': 'test/top1',
        'higher_is_better': True,
        'claims': [
            claim('AGC is better than nothing', AGC, {'arm': 'nf'}, **LARGE),
            claim('Nothing is better than AGC', {'arm': 'nf'}, AGC, **LARGE),
            claim('AGC is better than batch norm', AGC, {'arm': 'bn'}, **LARGE),
        ],
        'charts': [
            chart('curves', 'step', where={'batch_size': 256}),
            chart('line', 'learning_rate', log_x=True, where={'batch_size': 32}),
            chart('heatmap', 'batch_size', series='clipping', where={'arm': 'agc'}),
            chart('bars', 'arm', y='train/gradient_norm'),
            chart('parallel', 'arm'),
            chart('table', 'arm', series='batch_size'),
        ],
        'trials': trials,
        'versions': {'jax': '0.10.2'},
        'hardware': '2 cores',
        'seconds': 120.0,
        'commands': ['python -m experiments.study --workdir=S --jobs=2'],
    }


def claim(text: str, better: dict, worse: dict, margin: float = 0.0, **shared) -> dict:
    sides = {'better': better | shared, 'worse': worse | shared}
    compare = sides | {'margin': margin, 'direction': 'greater'}
    return {'text': text, 'source': 'the paper', 'compare': compare}


def chart(kind: str, x: str, y: str = 'test/top1', series: str = 'arm', **more) -> dict:
    return {'kind': kind, 'x': x, 'y': y, 'series': series, 'title': f'The {kind}', **more}


def write(directory, fields: dict):
    """Writes a study directory: every trial's curve rises to its final top-1, or stops at 10."""
    directory.mkdir(exist_ok=True)
    (directory / 'study.json').write_text(json.dumps(fields))
    for trial in fields['trials']:
        if trial['state'] in ('pending', 'failed'):
            continue
        final = trial['metrics'].get('test/top1') or 0.3
        steps = [step for step in STEPS if step <= trial['step']]
        records = [{'step': s, 'test/top1': final * s / STEPS[-1]} for s in steps]
        folder = directory / 'trials' / trial['id']
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
    return directory


@pytest.fixture
def study_fields():
    return fields()


@pytest.fixture
def write_study(tmp_path):
    """A function that writes fields as a study and returns its directory."""
    return lambda content, name='study': write(tmp_path / name, content)


@pytest.fixture
def study_directory(write_study, study_fields):
    return write_study(study_fields)


@pytest.fixture
def study(study_directory):
    from experiments.report import reading

    return reading.load(study_directory)
