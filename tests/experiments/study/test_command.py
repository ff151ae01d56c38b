import collections
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from ml_collections import ConfigDict

from experiments import train_step
from experiments.config import ADDED_FIELDS
from experiments.experiment import build
from experiments.report import reading, results
from experiments.run import metric_writers, workdir
from experiments.run.init_weights import load_weights
from experiments.study import command as study
from experiments.study import config as study_config
from experiments.study.config import default_study, make_trials
from experiments.study.journal import MAX_ATTEMPTS, Journal, round_robin
from nfnets_jax.errors import UsageError
from tests import processes
from tests.experiments.conftest import ONE_BLOCK, ROOT, tiny_config


def tiny_study(**changes) -> ConfigDict:
    """Five trials of six steps, one compiled program; one of them diverges."""
    tiny = default_study()
    tiny.name, tiny.size = 'tiny', 'digits'
    tiny.base = tiny_config()
    tiny.axes.clipping = 'optimizer.clip.clipping'
    tiny.grid.seed = (0, 1)
    tiny.arms = (
        {'name': 'agc', 'label': 'with AGC', 'grid': {'learning_rate': (0.1, 0.4)}},
        {
            'name': 'loose',
            'config': {'optimizer': {'weight_decay': 0.0}},
            'grid': {'learning_rate': (1e30,), 'clipping': (1e30,), 'seed': (0,)},
        },
    )
    tiny.update(changes)
    return tiny


def read(directory):
    return json.loads((directory / 'study.json').read_text())


def states(directory):
    return {trial['id']: trial['state'] for trial in read(directory)['trials']}


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    """A study that was run to its end in this process, and what was compiled for it."""
    directory, compiled = tmp_path_factory.mktemp('studies') / 'done', []

    def make_train_step(experiment):
        compiled.append(experiment.config.optimizer.learning_rate)
        return original(experiment)

    original = train_step.make_train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, 'make_train_step', make_train_step)
        study.run_study(tiny_study(), directory, command='python -m experiments.study ...')
    return directory, compiled


def test_every_trial_has_its_end_in_study_json(done):
    directory, _ = done
    summary = read(directory)
    assert summary['axes'] == {
        'arm': ['agc', 'loose'],
        'clipping': [1e30],
        'learning_rate': [0.1, 0.4, 1e30],
        'seed': [0, 1],
    }
    assert summary['arms'] == {'agc': 'with AGC', 'loose': 'loose'}
    ends = collections.Counter(trial['state'] for trial in summary['trials'])
    assert ends == {'complete': 4, 'diverged': 1}
    first, *_, last = summary['trials']
    assert first['axes'] == {'arm': 'agc', 'learning_rate': 0.1, 'seed': 0}
    assert first['id'] == 'agc-learning_rate=0.1-seed=0'
    assert first['step'] == 6
    assert first['seconds'] > 0
    run = json.loads((directory / 'trials' / first['id'] / 'summary.json').read_text())
    assert first['metrics'].items() >= run['final'].items()
    assert {'train/loss', 'images_per_second', 'parameters'} <= first['metrics'].keys()
    assert last['config_diff']['optimizer.clip.clipping'] == 1e30
    assert 'not finite at step' in last['error']
    assert summary['command'] == 'python -m experiments.study ...'
    assert {'python', 'jax', 'optuna'} <= summary['versions'].keys()
    assert 'cpu' in summary['hardware']
    assert summary['seconds'] == pytest.approx(sum(t['seconds'] for t in summary['trials']))


def test_trials_that_differ_in_numbers_share_a_program(done):
    _, compiled = done
    assert compiled == [0.1]


def test_an_ended_study_is_added_to_and_not_done_again(done, monkeypatch):
    directory, _ = done
    monkeypatch.setitem(study.measurements.MEASUREMENTS, 'train', lambda *_: {'test/top1': 0.5})
    before = {t['id']: t for t in read(directory)['trials']}
    study.run_study(tiny_study(grid={'seed': (0, 1, 2)}), directory, max_trials=1)
    after = {t['id']: t for t in read(directory)['trials']}
    assert {id: after[id] for id in before} == before
    added = {id: t['state'] for id, t in after.items() if id not in before}
    assert sorted(added.values()) == ['complete', 'pending']
    assert read(directory)['axes']['seed'] == [0, 1, 2]


def test_a_study_of_an_earlier_version_is_the_same_study(tmp_path):
    """Its base lacks the fields that were added since."""
    journal = study.open_journal(tiny_study(), tmp_path)
    base = workdir.flatten(workdir.as_json(tiny_study().base))
    earlier = {key: base[key] for key in base.keys() - ADDED_FIELDS.keys()}
    journal._study.set_user_attr('base', earlier)
    journal.add([], [], base)
    with pytest.raises(UsageError, match=r'config.base.optimizer.schedule.end_value is 0.0 there'):
        journal.add([], [], base | {'optimizer.schedule.end_value': 0.1})


def test_a_study_with_another_config_is_refused(done):
    directory, _ = done
    with pytest.raises(UsageError, match='config.base.batch_size is 64 there and 32 here'):
        study.run_study(tiny_study(base=tiny_config(batch_size=32)), directory)
    with pytest.raises(UsageError, match="holds the study 'tiny', not 'other'"):
        study.run_study(tiny_study(name='other'), directory)


def test_a_trial_told_to_stop_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    def write(self, step, scalars):
        original(self, step, scalars)
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.undo()

    original = metric_writers.Writer.write
    monkeypatch.setattr(metric_writers.Writer, 'write', write)
    only = tiny_study(arms=tiny_study().arms[:1], grid={'seed': (0,)})
    study.run_study(only, tmp_path)
    first, second = read(tmp_path)['trials']
    assert (first['state'], second['step']) == ('pending', 0)
    assert 0 < first['step'] < 6
    assert 'the same command goes on' in capsys.readouterr().err
    before = metric_writers.read_metrics(tmp_path / 'trials' / first['id'])
    study.run_study(only, tmp_path)
    assert set(states(tmp_path).values()) == {'complete'}
    after = metric_writers.read_metrics(tmp_path / 'trials' / first['id'])
    assert after[: len(before)] == before, 'not trained anew'


def test_a_trial_that_fails_does_not_end_the_study(tmp_path, monkeypatch, capsys):
    def training(config, directory, programs):
        if config.seed == 1:
            raise MemoryError('too large\nfor this machine')
        return {'test/top1': 0.5}

    monkeypatch.setitem(study.measurements.MEASUREMENTS, 'train', training)
    study.run_study(tiny_study(), tmp_path)
    failed = [trial for trial in read(tmp_path)['trials'] if trial['state'] == 'failed']
    assert [trial['axes']['seed'] for trial in failed] == [1, 1]
    assert failed[0]['error'] == 'MemoryError: too large'
    assert 'seed=1: failed: MemoryError: too large' in capsys.readouterr().err
    assert 'Traceback' in (tmp_path / 'trials' / failed[0]['id'] / 'error.txt').read_text()

    monkeypatch.setitem(study.measurements.MEASUREMENTS, 'train', lambda *_: {'test/top1': 0.25})
    study.run_study(tiny_study(), tmp_path)
    assert collections.Counter(states(tmp_path).values()) == {'complete': 3, 'failed': 2}
    study.run_study(tiny_study(), tmp_path, retry=True)
    assert set(states(tmp_path).values()) == {'complete'}
    assert [t['metrics']['test/top1'] for t in read(tmp_path)['trials']] == [
        0.5,
        0.25,
        0.5,
        0.25,
        0.5,
    ]


def test_a_terminal_of_80_columns_is_told_what_came_out_and_how_long(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, 'stderr', terminal)
    monkeypatch.setenv('COLUMNS', '80')
    monkeypatch.setenv('LINES', '24')
    monkeypatch.setitem(
        study.measurements.MEASUREMENTS, 'train', lambda *_: time.sleep(0.01) or {'test/top1': 0.5}
    )
    study.run_study(tiny_study(), tmp_path)
    written = re.split('[\r\n]', terminal.getvalue())
    assert any('agc-learning_rate=0.1-seed=0: test/top1 0.5' in line for line in written)
    bars = [line for line in written if line.startswith('trial 2/5')]
    assert bars
    assert all('left' in bar and len(bar) <= 80 for bar in bars)


def test_a_metric_that_no_trial_gives_is_named_after_the_first(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setitem(
        study.measurements.MEASUREMENTS, 'train', lambda *_: begun.append(1) or {'test/top1': 0.5}
    )
    with pytest.raises(UsageError, match=r"config.metric='test/top2'.*did you mean 'test/top1'"):
        study.run_study(tiny_study(metric='test/top2'), tmp_path)
    assert len(begun) == 1
    study.run_study(tiny_study(), tmp_path)
    assert set(states(tmp_path).values()) == {'complete'}


CHART = {'kind': 'line', 'x': 'seed', 'y': 'test/top1', 'series': 'arm', 'title': 'T'}
CLAIM = {'text': 'AGC is better.', 'source': 'me'}
BOTH_SIDES = {'better': {'arm': 'a'}, 'worse': {'arm': 'a'}}


def test_claims_and_words_may_change_and_the_grid_may_leave_them_out(tmp_path, monkeypatch):
    monkeypatch.setitem(study.measurements.MEASUREMENTS, 'train', lambda *_: {'test/top1': 0.5})
    study.run_study(tiny_study(), tmp_path)
    trials = read(tmp_path)['trials']
    sides = {'better': {'arm': 'agc', 'learning_rate': 6.4}, 'worse': {'arm': 'loose'}}
    claims = ({**CLAIM, 'compare': sides},)
    study.run_study(tiny_study(title='Another', claims=claims), tmp_path)
    assert read(tmp_path)['trials'] == trials
    found = reading.load(tmp_path)
    assert found.title == 'Another'
    (judged,) = results.judge(found)
    assert judged.comparison.reason == 'this study does not test it'


CLAIMER = """
import sys, time
from experiments.study import command as study
from tests.experiments.study.test_command import tiny_study
tiny = tiny_study()
journal = study.open_journal(tiny, sys.argv[1])
print(journal.acquire([r.id for r in journal.records()], None).id, flush=True)
time.sleep(60)
"""


def killed_with_a_trial(directory):
    """Lets a process take a trial, kills it, and returns which trial it was."""
    process = processes.start(['-c', CLAIMER, directory], cwd=ROOT, stdout=subprocess.PIPE)
    id = process.stdout.readline().strip()
    yield id
    process.kill()
    process.wait()
    yield id


def test_a_killed_process_gives_its_trial_back(tmp_path):
    trials = make_trials(tiny_study())
    journal = study.open_journal(tiny_study(), tmp_path)
    journal.add(trials, [{}] * len(trials), {})
    process = killed_with_a_trial(tmp_path)
    taken = next(process)
    assert taken == trials[0].id
    assert {r.id: r.state for r in journal.records()}[taken] == 'running'
    assert journal.acquire([taken], None) is None, 'somebody is at it'
    next(process)
    assert {r.id: r.state for r in journal.records()}[taken] == 'pending'
    assert journal.acquire([t.id for t in trials], None).id == taken


@pytest.fixture
def journal(tmp_path):
    """An empty journal, and trials a0, a1 of program a and b0, b1 of b to put in it."""
    trials = [
        study_config.Trial(
            f'{program}{seed}', {'arm': program, 'seed': seed}, ConfigDict(), program
        )
        for program in 'ab'
        for seed in (0, 1)
    ]
    return Journal(tmp_path, 'tiny', higher_is_better=True), trials


def test_a_worker_keeps_to_its_program_and_out_of_others(journal):
    journal, trials = journal
    journal.add(trials, [{}] * 4, {})
    ids = [trial.id for trial in trials]
    first = journal.acquire(ids, None)
    assert first.id == 'a0'
    assert journal.acquire(ids, None).id == 'b0', 'a new worker takes a program that nobody runs'
    journal.finish(first, 'complete', seconds=1.0, value=0.5)
    assert journal.acquire(ids, 'a').id == 'a1'
    assert journal.acquire(ids, 'a').id == 'b1', 'and helps where there is nothing else'
    assert journal.acquire(ids, 'a') is None


def test_a_trial_that_kills_every_process_has_failed(journal):
    journal, trials = journal
    journal.add(trials[:1], [{}], {})
    for _ in range(MAX_ATTEMPTS):
        journal._unlock(journal.acquire(['a0'], None))  # as when the process is killed
    assert journal.acquire(['a0'], None) is None
    (record,) = journal.records()
    assert record.state == 'failed'
    assert record.error == 'its process was killed 3 times at step 0: out of memory?'


def test_what_was_cut_off_at_the_end_of_the_journal_is_dropped(journal, tmp_path):
    journal, trials = journal
    journal.add(trials, [{}] * 4, {})
    with open(tmp_path / 'journal.log', 'a') as file:
        file.write('{"op_code": 4, "work')
    again = Journal(tmp_path, 'tiny', higher_is_better=True)
    assert [record.id for record in again.records()] == ['a0', 'a1', 'b0', 'b1']
    (tmp_path / 'journal.log').write_text('{}\nnothing\n')
    with pytest.raises(UsageError, match=r'journal.log, line 1 cannot be read.*move the file away'):
        Journal(tmp_path, 'tiny', higher_is_better=True)


def test_without_its_journal_a_study_takes_the_runs_there_are(done, tmp_path):
    directory = tmp_path / 'copy'
    shutil.copytree(done[0], directory)
    only = tiny_study(
        arms=({'name': 'agc', 'grid': {'learning_rate': (0.1,)}},), grid={'seed': (0,)}
    )
    before = read(directory)['trials'][0]
    assert before['id'] == 'agc-learning_rate=0.1-seed=0'
    (directory / 'journal.log').unlink()
    study.run_study(only, directory)
    assert read(directory)['trials'] == [before | {'seconds': read(directory)['seconds']}]


def test_the_recipe_is_told_as_it_is():
    config = default_study()
    config.setting = 'digits'
    config.base.batch_size, config.base.duration = 48, '7 epochs'
    told = study_config.to_json(config)['setting']
    assert told.startswith('digits. Where arms and figures do not say otherwise: batch size 48, ')
    assert '7 epochs, SGD with Nesterov momentum 0.9' in told
    assert 'learning rates of SGD for 256 examples' in told
    config.axes.batch_size = 'batch_size'
    config.base.optimizer.name, config.base.optimizer.scale_lr_by_batch = 'adam', False
    told = study_config.recipe(config)
    assert 'batch size' not in told, 'it is an axis'
    assert 'Adam' in told
    assert 'SGD' not in told
    config.measure = ('signal_propagation',)
    assert study_config.to_json(config)['setting'] == 'digits'


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'arms': ()}, 'config.arms is empty'),
        ({'measure': ('trian',)}, "config.measure: unknown 'trian' (did you mean 'train'?)"),
        ({'grid': {'sed': (0,)}}, "config.grid.sed: no such axis (did you mean 'seed'?)"),
        ({'grid': {'seed': 3}}, 'config.grid.seed=3: give a tuple of values'),
        ({'grid': {'seed': (1, 1)}}, 'config.grid.seed=(1, 1): a value twice'),
        ({'arms': ({'name': 'a/b'},)}, "config.arms[0].name: 'a/b' becomes part of a directory"),
        ({'arms': ({'name': 'a', 'conf': 1},)}, 'unknown key config.arms[0].conf'),
        (
            {'arms': ({'name': 'a', 'config': {'optimizer': {'clp': 1}}},)},
            "unknown key config.arms[0].config.optimizer.clp (did you mean 'clip'?)",
        ),
        ({'arms': ({'name': 'a'}, {'name': 'a'})}, "config.arms[1].name='a': another arm"),
        ({'axes': {'seed': 'sed'}}, "config.axes.seed='sed': there is no such key"),
        ({'tuned': ('rate',)}, "config.tuned='rate': no such axis"),
        ({'charts': ({'kind': 'pie'},)}, "config.charts[0].kind='pie'"),
        ({'charts': ({'x': 'seed'},)}, 'config.charts[0].kind is missing'),
        ({'charts': ({**CHART, 'x': 'sed'},)}, "config.charts[0].x='sed': no such axis"),
        ({'charts': ({**CHART, 'logx': True},)}, 'unknown key config.charts[0].logx'),
        ({'claims': ({**CLAIM, 'compares': {}},)}, 'unknown key config.claims[0].compares'),
        ({'claims': ({**CLAIM, 'compare': {}},)}, 'config.claims[0].compare.better is missing'),
        (
            {'claims': ({**CLAIM, 'compare': {**BOTH_SIDES, 'better': {'arm': 'b'}}},)},
            "config.claims[0].compare.better.arm='b'",
        ),
        (
            {'claims': ({**CLAIM, 'compare': {**BOTH_SIDES, 'direction': 'lesss'}},)},
            "config.claims[0].compare.direction='lesss' is unknown (did you mean 'less'?)",
        ),
    ],
)
def test_a_mistake_in_a_study_is_named(changes, message):
    base = {'arms': ({'name': 'a'},), 'axes': {'seed': 'seed'}, 'tuned': ()}
    wrong = default_study()
    wrong.update(base)
    with wrong.ignore_type():
        wrong.update(changes)
        for key in ('axes', 'grid'):
            if key in changes:
                wrong[key] = ConfigDict(changes[key])
    with pytest.raises(UsageError, match=re.escape(message)):
        make_trials(wrong)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'base': tiny_config(batch_size=66)}, r'trial agc-\S+: config.base.batch_size=66'),
        ({'base': tiny_config(data__name='folder')}, r'config.base.data.path'),
        (
            {'arms': ({'name': 'agc', 'grid': {'clipping': (0.1, 0.0)}},)},
            r'trial agc-clipping=0.0-\S+: config.arms\[0\].grid.clipping=0.0: must',
        ),
        (
            {'arms': ({'name': 'agc', 'config': {'optimizer': {'momentum': 2.0}}},)},
            r'trial agc-\S+: config.arms\[0\].config.optimizer.momentum=2.0: must',
        ),
        (
            {
                'base': tiny_config(accumulate=3),
                'axes': ConfigDict({'batch': 'batch_size'}),
                'arms': ({'name': 'agc', 'grid': {'batch': (64,)}},),
            },
            r'config.base.accumulate=3: .* of config.arms\[0\].grid.batch=64$',
        ),
        (  # The value is not a key.
            {'base': tiny_config(init__weights='config.seed/nowhere.npz')},
            r'config.base.init.weights: .*\bconfig.seed/nowhere.npz',
        ),
        (
            {'base': tiny_config(optimizer__groups=({'match': '.*', 'lr_scale': -1.0},))},
            r'config.base.optimizer.groups\[0\].lr_scale=-1.0: must',
        ),
        (
            {'pretrain': tiny_config(init__weights='nowhere.npz')},
            r'config.pretrain.init.weights\b.*nowhere.npz',
        ),
    ],
)
def test_every_trial_is_checked_and_keys_are_those_of_the_study(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        study.run_study(tiny_study(**changes), tmp_path / 's')
    assert not (tmp_path / 's').exists()


def test_a_trials_config_does_not_say_where_the_study_is(tmp_path, monkeypatch):
    """So a trial that was stopped can go on where the directory is mounted elsewhere."""

    def training(config, directory, compiled):
        assert config.init.weights == '{study}/pretrained'
        with pytest.raises(UsageError, match=re.escape(f'{tmp_path}/pretrained')):
            load_weights(build(config), directory)
        return {'test/top1': 0.5}

    monkeypatch.setitem(study.measurements.MEASUREMENTS, 'train', training)
    monkeypatch.setattr(study, 'train', lambda *_, **__: {'final': {}})
    base = tiny_config(init__weights=study_config.PRETRAINED)
    study.run_study(tiny_study(base=base, pretrain=tiny_config()), tmp_path, max_trials=1)
    assert collections.Counter(states(tmp_path).values()) == {'complete': 1, 'pending': 4}


def test_a_model_of_another_name_takes_no_options_over():
    two = tiny_study(
        arms=(
            {'name': 'same', 'config': {'model': {'width': 0.25}}},
            {'name': 'other', 'config': {'model': {'name': 'ResNet-8'}}},
        ),
        grid={'seed': (0,)},
    )
    same, other = make_trials(two)
    assert same.config.model.to_dict() == {'name': 'NF-ResNet-8', 'width': 0.25, **ONE_BLOCK}
    assert other.config.model.to_dict() == {'name': 'ResNet-8'}
    assert study_config.difference(other, two) == {'model.name': 'ResNet-8'}


@pytest.fixture(scope='module')
def config_file(tmp_path_factory):
    file = tmp_path_factory.mktemp('config') / 'tiny_study.py'
    file.write_text(
        'from tests.experiments.study.test_command import tiny_study as get_config\n'
        'from tests.experiments.study.test_command import long_study\n'
    )
    return file


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.mark.slow  # Each worker imports JAX; workers that end a study are quick, below.
def test_two_jobs_share_a_study(command, config_file, tmp_path):
    status, _, err = finish(
        command(
            'study', f'--config={config_file}', f'--workdir={tmp_path}', '--jobs=2', '--seeds=1'
        )
    )
    assert status == 0, err
    assert err.startswith('tiny (digits): 3 trials with 1 compiled programs\n')
    assert err.count('complete') == err.count('diverged') - 1 == 1
    assert collections.Counter(states(tmp_path).values()) == {'complete': 2, 'diverged': 1}
    assert len(study.open_journal(tiny_study(), tmp_path).records()) == 3
    assert '--jobs=2' in read(tmp_path)['command']


def test_a_mistake_on_the_command_line_is_one_line(command, config_file, tmp_path):
    start = ('study', f'--config={config_file}', f'--workdir={tmp_path / "s"}')
    status, _, err = finish(command(*start, '--config.base.model.name=NF-ResNet-9'))
    assert status == 2
    assert re.fullmatch(
        r"error: trial agc-\S+: config.base.model: .*unknown 'NF-ResNet-9'.*\n", err
    )
    assert not (tmp_path / 's').exists()


# Runs a study whose two workers are forks, which need not import everything anew.
FORKING = """
import multiprocessing, os, sys
from experiments.study import command as study
from nfnets_jax.errors import UsageError
from tests.experiments.study.test_command import tiny_study

def work(*_, **__):
    assert kept == [True, True]  # by the command and by this worker
    if sys.argv[2] == 'killed':
        os.kill(os.getpid(), 9)
    raise UsageError('something is wrong')

forking = multiprocessing.get_context('fork')
multiprocessing.get_context = lambda _: forking
study.work = work
kept = []
study.allocator.keep_memory = lambda: kept.append(True)
try:
    study.run_study(tiny_study(), sys.argv[1], jobs=2, keep_memory=True)
except (UsageError, study.LostWorkersError) as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ('fate', 'said'),
    [
        ('mistaken', 'UsageError something is wrong\n'),
        (
            'killed',
            'LostWorkersError 2 of 2 worker processes ended with status -9, -9 '
            '(killed: out of memory?)\n',
        ),
    ],
)
def test_what_befalls_workers_ends_the_study(tmp_path, fate, said):
    done = processes.run(['-c', FORKING, tmp_path, fate], cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, said), done.stderr
    assert set(states(tmp_path).values()) == {'pending'}


def test_a_file_in_the_place_of_the_pretraining_is_told(tmp_path):
    (tmp_path / 'pretrained').write_text('in the way')
    with pytest.raises(UsageError, match='pretrained is a file'):
        study.run_study(tiny_study(pretrain=tiny_config()), tmp_path)
    assert set(states(tmp_path).values()) == {'pending'}


def long_study() -> ConfigDict:
    return tiny_study(
        base=tiny_config(duration='600 steps', checkpoint__every='50 steps', log_every='50 steps'),
        grid={'seed': (0,)},
        arms=tiny_study().arms[:1],
    )


@pytest.mark.slow
def test_a_killed_study_continues_its_runs(command, tmp_path):
    file = tmp_path / 'long.py'
    file.write_text('from tests.experiments.study.test_command import long_study as get_config\n')
    start = ('study', f'--config={file}', f'--workdir={tmp_path / "s"}')
    process, id = command(*start), 'agc-learning_rate=0.1-seed=0'
    checkpoint = tmp_path / 's' / 'trials' / id / 'checkpoints' / '100'
    for _ in range(1200):
        time.sleep(0.1)
        if checkpoint.exists():
            break
    process.kill()
    process.communicate()
    before = metric_writers.read_metrics(tmp_path / 's' / 'trials' / id)
    assert before[-1]['step'] < 600
    status, _, err = finish(command(*start))
    assert status == 0, err
    assert set(states(tmp_path / 's').values()) == {'complete'}
    after = metric_writers.read_metrics(tmp_path / 's' / 'trials' / id)
    assert after[:2] == before[:2]


def test_arms_share_a_budget(journal):
    journal, trials = journal
    journal.add(trials, [{}] * 4, {})
    ids = [trial.id for trial in trials]
    taken = []
    for done in range(3):
        record = journal.acquire(ids, 'a', budget=3 - done)
        journal.finish(record, 'complete', seconds=1.0, value=0.5)
        taken.append(record.id)
    assert sorted(taken) == ['a0', 'a1', 'b0'], 'not a0, a1 and then b0 only if there is time'
    assert [r.id for r in round_robin(journal.records())] == ['a0', 'b0', 'a1', 'b1']
    assert journal.acquire(ids, 'a', budget=1).id == 'b1', 'the next of the turn'


def test_a_budget_goes_to_one_seed_of_each_arm_first(tmp_path):
    config = importlib.import_module('configs.studies.sam').get_config('digits')
    trials = make_trials(config)
    journal = study.open_journal(config, tmp_path)
    journal.add(trials, [{}] * len(trials), {})
    first = round_robin(journal.records())[:15]
    assert {r.axes['seed'] for r in first} == {0}
    for n in (5, 10, 15):
        arms = collections.Counter(r.axes['arm'] for r in first[:n])
        assert set(arms.values()) == {n // 5}
    assert len({(r.axes['arm'], r.axes['learning_rate']) for r in first}) == 15


def test_the_time_left_is_that_of_the_trials_that_will_run(journal, capsys):
    journal, trials = journal
    journal.add(trials, [{}] * 4, {})
    progress = study.StudyProgress(journal, lambda: [trial.id for trial in trials], 1, max_trials=2)
    progress.start(ConfigDict({'name': 'n', 'size': 's', 'cost': '', 'metric': 'm'}), 2)
    assert '4 trials with 2 compiled programs, 2 more at most now' in capsys.readouterr().err
    for i in range(2):
        record = journal.acquire([t.id for t in trials], None, budget=2 - i)
        journal.finish(record, 'complete', seconds=100.0, value=0.5, metrics={'m': 0.5})
        progress.update()
    told = capsys.readouterr().err.splitlines()
    assert told[0].endswith('(100.0 s), 01:40 left'), 'of one trial, not of three'
    assert told[1].endswith('(100.0 s)')
