"""The average is NumPy's; the greedy one leaves out what lowers the validation top-1."""

import json
import re

import chex
import jax
import numpy as np
import pytest

from experiments import soup, train
from experiments.run import metric_writers
from nfnets_jax.errors import UsageError
from nfnets_jax.weights import pretrained
from nfnets_jax.weights.checkpoints import CheckpointReader
from tests.experiments.run.test_image_files import METADATA


def make_member(seed, name=None, **changes):
    metadata = pretrained.dataclasses.replace(METADATA, **changes)
    rng = np.random.RandomState(seed)
    params, state = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32),
        pretrained.variable_shapes(metadata),
    )
    state = {'bn': {'average': np.float32([seed, 1]), 'counter': np.int32(seed)}}
    weights = pretrained.Weights(params, state, metadata)
    return soup.Member(name or f'member {seed}', metadata, lambda: weights)


def test_the_average_is_that_of_numpy():
    members, lines = [make_member(seed) for seed in range(3)], []
    average = soup.uniform(members, lines.append)
    expected = jax.tree.map(
        lambda *leaves: np.mean(np.float64(leaves), axis=0).astype(np.float32),
        *(member.load().params for member in members),
    )
    chex.assert_trees_all_equal(average.params, expected)
    chex.assert_trees_all_equal_dtypes(average.params, expected)
    chex.assert_trees_all_equal(average.state['bn']['average'], np.float32([1, 1]))
    assert (average.state['bn']['counter'], average.metadata) == (0, METADATA)
    assert len(lines) == 3


def test_the_average_of_equal_weights_is_exact():
    members = [make_member(1)] * 7
    average = soup.uniform(members, lambda line: None)
    chex.assert_trees_all_equal(average.params, members[0].load().params)


def test_greedy_takes_the_best_first_and_leaves_out_what_lowers_the_average():
    """A made case in which each member is a number, and the accuracy is known for each average."""
    members = [make_member(seed) for seed in (0, 4, 8, 12)]
    # Of the members, and of averages as they arise: 8 alone, with 4, with 12 (no), with 0 (equal).
    known = {0: 0.5, 4: 0.7, 8: 0.8, 12: 0.6, 6: 0.9} | {(8 + 4 + 12) / 3: 0.85, 4.0: 0.7}
    asked = []

    def accuracy(weights):
        value = float(weights.state['bn']['average'][0])
        asked.append(value)
        return 0.9 if asked.count(4.0) > 1 and value == 4.0 else known[value]

    lines = []
    result = soup.greedy(members, accuracy, lines.append)
    assert asked == [0, 4, 8, 12, 6, 8, 4]
    assert result.state['bn']['average'][0] == 4  # (8 + 4 + 0) / 3
    assert [line.split(':')[0] for line in lines] == [f'member {i}' for i in (8, 4, 12, 0)]
    assert [line.split(': ')[-1] for line in lines] == ['added', 'added', 'left out', 'added']
    assert lines[1] == 'member 4: validation top-1 70.00%, the average with it 90.00%: added'


@pytest.mark.parametrize(
    ('changes', 'problem'),
    [
        ({'model': 'ResNet-8', 'options': {'widths': (8,)}}, 'is .* in B and .* in A'),
        ({'options': METADATA.options | {'depths': (2,)}}, r'depths is \[2\] in B and \[1\] in A'),
        ({'num_classes': 4}, 'num_classes is 4 in B and 3 in A'),
        ({'options': METADATA.options | {'channels': 1}}, 'channels is 1 in B and 3 in A'),
        ({'multi_label': True}, 'multi_label is True in B and False in A'),
        ({'class_names': ('a', 'b', 'd')}, "class 2 is 'd' in B and 'c' in A"),
        ({'mean': (1.0, 2.0, 3.0)}, r'mean is \(1.0, 2.0, 3.0\) in B'),
        ({'options': METADATA.options | {'drop_rate': 0.5}, 'test_size': 20}, None),
        ({'class_names': ()}, None),
    ],
)
def test_weights_of_another_network_are_refused_by_what_differs(changes, problem):
    a = pretrained.dataclasses.replace(METADATA, class_names=('a', 'b', 'c'))
    b = pretrained.dataclasses.replace(a, **({'class_names': ()} | changes))
    if problem is None:
        soup.check_same('B', b, 'A', a)
        return
    with pytest.raises(UsageError, match=f'^these weights cannot be averaged: .*{problem}'):
        soup.check_same('B', b, 'A', a)


@pytest.fixture(scope='module')
def three_splits(tmp_path_factory):
    rng, path = np.random.RandomState(0), tmp_path_factory.mktemp('data') / 'digits.npz'
    arrays = {}
    for split in ('train', 'validation', 'test'):
        labels = np.arange(80) % 4
        noise = rng.randint(0, 128, (80, 8, 8, 3))
        arrays[f'{split}_images'] = (noise + 40 * labels[:, None, None, None]).astype(np.uint8)
        arrays[f'{split}_labels'] = labels
    np.savez(path, **arrays)
    return path


def test_checkpoints_of_a_run(command, tiny, three_splits, tmp_path):
    config = tiny(
        batch_size=16,
        augment__shift=0,
        optimizer__clip__name='none',
        eval__batch_size=32,
        eval__every='2 steps',
        checkpoint__every='2 steps',
    )
    config.data = {'name': 'arrays', 'path': str(three_splits)}
    run = tmp_path / 'run'
    train.train(config, run, quiet=True)
    out = tmp_path / 'soup.safetensors'
    process = command('soup', '--greedy', f'--workdir={run}', f'--out={out}', devices=2)
    text, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    steps = CheckpointReader(run / 'checkpoints').steps()
    lines = [line for line in text.splitlines() if ': validation top-1 ' in line]
    assert sorted(line.split(':')[0] for line in lines) == [f'{run} step {s}' for s in steps]
    # The top-1 of each is that of the exact evaluation of its moving average.
    evaluated = [x for x in metric_writers.read_metrics(run) if 'validation_ema/top1' in x]
    assert [x['step'] for x in evaluated] == steps
    for x in evaluated:
        (line,) = (line for line in lines if line.startswith(f'{run} step {x["step"]}:'))
        assert f'top-1 {x["validation_ema/top1"]:.2%}' in line
    taken = [int(line.split(':')[0].split()[-1]) for line in lines if line.endswith(': added')]
    expected = [pretrained.load_pretrained(run, checkpoint=step).params for step in taken]
    mean = jax.tree.map(lambda *x: np.mean(np.float64(x), 0).astype(np.float32), *expected)
    chex.assert_trees_all_close(pretrained.load_pretrained(out).params, mean, rtol=1e-7)
    # The same images elsewhere choose alike, and the run's own need not be there.
    moved = three_splits.rename(tmp_path / 'moved.npz')
    wanted, accuracy = soup.make_accuracy(config, str(run), lambda line: None, str(moved))
    soup.check_same('a', wanted, 'b', pretrained.load_metadata(run))
    for step in steps:
        (line,) = (line for line in lines if line.startswith(f'{run} step {step}:'))
        assert f'top-1 {accuracy(pretrained.load_pretrained(run, checkpoint=step)):.2%}' in line
    with np.load(moved) as file:
        arrays = {name: file[name] for name in file.files if 'validation' not in name}
    np.savez(tmp_path / 'two.npz', **arrays)
    with pytest.raises(UsageError, match='no split besides those to train and test on'):
        soup.make_accuracy(config, str(run), lambda line: None, str(tmp_path / 'two.npz'))
    moved.rename(three_splits)
    # Changed data are refused; a list of steps needs no data.
    record = json.loads((run / 'data.json').read_text())
    record['splits']['validation']['num_examples'] += 1
    (run / 'data.json').write_text(json.dumps(record))
    members = list(soup.find_members((), str(run), '2,6,latest'))
    assert [member.name for member in members] == [f'{run} step {step}' for step in (2, 6)]
    with pytest.raises(UsageError, match='1 image was removed from validation'):
        soup.make_accuracy(config, str(run), lambda line: None)


def test_greedy_never_looks_at_the_test_images(tiny):
    with pytest.raises(UsageError, match="needs validation images, and the data 'digits'"):
        soup.make_accuracy(tiny(), None, lambda line: None)


@pytest.mark.parametrize(
    ('arguments', 'problem'),
    [
        (['--weights=a'], '--out is missing'),
        (['--out=x.npz', '--weights=a'], r'unknown suffix \(known: \.safetensors\)'),
        (['--checkpoints=all', '--weights=a'], '--checkpoints are those of a run'),
        (['--weights=absent.npz', '--weights=absent.npz'], r'absent\.npz: No such file'),
        (['--workdir=absent'], '--workdir=absent holds no run'),
        (['--weights=a', '--data=b'], '--data names the validation images of --greedy'),
        ([], 'an average needs two weights or more, not 0'),
    ],
)
def test_mistakes_are_one_line(command, arguments, problem, tmp_path):
    if problem != '--out is missing' and '--out=x.npz' not in arguments:
        arguments = [*arguments, f'--out={tmp_path}/out.safetensors']
    process = command('soup', *arguments, devices=1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert len(err.splitlines()) == 1, err
    assert re.search(problem, err), err
