"""Each benchmark runs, at the smallest size, and writes what it prints."""

import json
import shlex

import pytest

from benchmarks import (
    all_on_gpu,
    convolution,
    dispatch,
    frozen,
    inference,
    optimizer,
    programs,
    runner_step,
    sam,
    timing,
    train_step,
)
from nfnets_jax.convolution.conv import ConvSignature, Impl

SMALL = ['--model=SmallCNN', '--image-size=16', '--batch=2', '--rounds=1']


def rows(main, arguments, path):
    main([*arguments, f'--json={path}'])
    written = json.loads(path.read_text())
    assert written['versions']['jax']
    return written['rows']


@pytest.mark.slow
def test_train_step(tmp_path, capsys):
    ours, plain = rows(train_step.main, [*SMALL, '--rows=ours,plain'], tmp_path / 'table.json')
    assert ours['row'] == 'ours'
    assert ours['images/s'] > 0
    assert ours['memory'] > plain['memory'] / 10
    assert 'images/s' in capsys.readouterr().out


def test_a_row_that_is_none(capsys):
    with pytest.raises(SystemExit) as exit_:
        train_step.main(['--rows=ours,tim'])
    assert exit_.value.code == 2
    assert 'tim is not one of ours' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('path', 'told'), [('nowhere/x.json', 'there is no directory'), ('~nobody-/x', 'no user')]
)
def test_a_table_that_cannot_be_written_is_told_first(tmp_path, monkeypatch, capsys, path, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        dispatch.main([f'--json={path}'])
    assert exit_.value.code == 2
    assert told in capsys.readouterr().err


def test_inference(tmp_path):
    ours, folded = rows(inference.main, SMALL, tmp_path / 'table.json')[:2]
    assert (ours['row'], folded['row']) == ('ours', 'folded')
    assert folded['latency ms'] > 0


@pytest.mark.slow
def test_optimizer(tmp_path):
    arguments = ['--model=SmallCNN', '--rounds=1']
    sgd, *chains, dot = rows(optimizer.main, arguments, tmp_path / 'table.json')
    assert sgd['x SGD'] == sgd['floor'] == 1
    assert [row['floor'] for row in chains] == [7 / 5] * 3
    assert all(row['ms'] > 0 and row['scratch MB'] >= 0 for row in chains)
    assert dot['row'] == 'BLAS dot'


@pytest.mark.slow
def test_sam(tmp_path):
    plain, *ascents = rows(sam.main, SMALL, tmp_path / 'table.json')
    assert plain['x plain'] == 1
    assert [row['row'] for row in ascents] == [f'SAM, ascent on {k}%' for k in (20, 50, 100)]


@pytest.mark.slow
def test_frozen(tmp_path):
    arguments = ['--model=NF-ResNet-8', '--image-size=16', '--batch=8', '--rounds=1']
    everything, head = rows(frozen.main, arguments, tmp_path / 'table.json')
    assert (everything['row'], head['row']) == ('everything', 'head only')
    assert head['memory'] < everything['memory']


def test_programs_without_a_compiler(tmp_path, capsys):
    arguments = ['--models=NF-ResNet-50', '--targets=v3:2x2,H100:8', '--nocompile']
    programs.main([*arguments, f'--json={tmp_path}/rows.json'])
    header, v3, h100 = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ['model', 'target', 'Mcycles']
    assert v3.split()[:3] == ['~NF-ResNet-50', 'v3:2x2', '-']
    assert not list(tmp_path.iterdir())  # The formula's rows are not kept.


def test_rows_of_programs_are_kept(tmp_path, capsys, monkeypatch):
    def compiled(model, target, rows, augment):
        key = dict(zip(programs.KEY, (model, target, rows, augment), strict=True))
        return key | {'flags': '', 'cycles': 55.5e6, 'step_seconds': 0.059, 'needed': 2e9}

    monkeypatch.setattr(programs, 'compiled', compiled)
    arguments = ['--models=NFNet-F0', '--targets=v3:2x2']
    (row,) = rows(programs.main, arguments, tmp_path / 'rows.json')
    monkeypatch.setattr(programs, 'compiled', None)
    assert rows(programs.main, arguments, tmp_path / 'rows.json') == [row]
    line = capsys.readouterr().out.splitlines()[-1].split()
    # Cycles in millions, the estimate, that over 0.82, and what the paper measured.
    assert line[:6] == ['NFNet-F0', 'v3:2x2', '55.5', '59', '72', '73.3']


def test_dispatch(tmp_path):
    table = rows(dispatch.main, ['--leaves=3', '--rounds=1'], tmp_path / 'table.json')
    assert [row['row'] for row in table] == ['runner', 'stacked', 'jit']
    assert all(0 < row['call ms'] <= row['done ms'] for row in table)


def test_convolution_writes_its_platform_and_leaves_the_others(tmp_path, monkeypatch):
    found = convolution.signatures('NF-RegNet-B0:32', 1)
    signature = min(found)
    source = tmp_path / 'table.py'
    source.write_text('"""Why."""\n\nTABLE: dict = {}\n')
    others = {'tpu': {(1, 1, 1, 8, 8, 64): ('xla', 'xla', 'xla')}}
    monkeypatch.setattr(convolution.table, '__file__', str(source))
    monkeypatch.setattr(convolution.table, 'TABLE', others | {'cpu': {}})
    monkeypatch.setattr(convolution, 'signatures', lambda *_: {signature: found[signature]})

    arguments = ['--rounds=1', '--seconds=0', '--write']
    table = rows(convolution.main, arguments, tmp_path / 'table.json')
    assert [row['implementation'] for row in table] == ['xla', 'pointwise']
    module: dict = {}
    exec(source.read_text(), module)
    assert module['__doc__'] == 'Why.'
    assert list(module['TABLE']) == ['cpu', 'tpu']
    assert module['TABLE']['tpu'] == others['tpu']
    # No entry, should XLA's own implementation be the fastest.
    assert set(module['TABLE']['cpu']) <= {signature}


def test_an_entry_that_says_nothing_new_is_left_out():
    wide, narrow = Impl('per_group', 'per_group', 'per_group'), Impl('im2col', 'im2col', 'im2col')
    part = {
        ConvSignature(3, 1, 6, 128, 128, 288): wide,
        ConvSignature(3, 1, 6, 128, 128, 1152): wide,
        ConvSignature(3, 1, 43, 8, 8, 392): narrow,
        ConvSignature(3, 1, 1, 64, 64, 288): Impl(),
    }
    short = convolution.shorten(part)
    assert sorted(set(short.values())) == [narrow, wide]
    assert len(short) == 2


def test_signatures_of_a_network():
    signatures = convolution.signatures('NFNet-F0:64', 8)
    assert ConvSignature(3, 1, 6, 128, 128, 8 * 4 * 4) in signatures
    assert ConvSignature(3, 2, 1, 3, 16, 8 * 32 * 32) in signatures


def test_another_implementation_must_win_by_a_tenth():
    def measured(seconds, compile_seconds=0.0):
        times = {'xla': timing.Times(1.0, 1.0, 1.0), 'per_group': timing.Times(*[seconds] * 3)}
        return {
            (impl, name): (times[impl], compile_seconds if impl == 'per_group' else 0.0)
            for impl in times
            for name in Impl._fields
        }

    impls = ['xla', 'per_group']
    assert convolution.fastest(measured(0.85), impls, False) == ('per_group',) * 3
    assert convolution.fastest(measured(0.95), impls, False) == ('xla',) * 3
    assert convolution.fastest(measured(0.85, 100), impls, False) == ('xla',) * 3


@pytest.mark.slow
def test_runner_step(tmp_path):
    table = rows(
        runner_step.main, shlex.split(all_on_gpu.QUICK_RUNNER_STEP)[1:], tmp_path / 'a.json'
    )
    training, evaluation, plain = table
    assert [row['row'] for row in table] == ['training', 'evaluation', 'not augmented']
    assert training['share'] == 1
    assert evaluation['GB'] < plain['GB'] <= training['GB']


def test_batches_double_as_long_as_that_pays(tmp_path):
    def write(batch, speed):
        name = 'step' if batch == 32 else f'step-{batch}'
        table = {'batch': batch, 'rows': [{'images/s': speed}]}
        (tmp_path / f'{name}.json').write_text(json.dumps(table))

    assert list(all_on_gpu.larger_batches(tmp_path, 'step')) == []  # It failed at 32.
    write(32, 100.0)
    tried = []
    for batch in all_on_gpu.larger_batches(tmp_path, 'step'):
        tried.append(batch)
        write(batch, {64: 150.0, 128: 151.0}[batch])
    assert tried == [64, 128]
    (tmp_path / 'step-128.json').unlink()  # Out of memory.
    assert list(all_on_gpu.larger_batches(tmp_path, 'step')) == [64, 128]


@pytest.mark.parametrize(
    ('code', 'seconds', 'error'),
    [
        ('print(7)', 60, None),
        ('print(7); exit(3)', 60, 'failed with status 3'),
        ('print(7, flush=True); import time; time.sleep(60)', 2, 'stopped after 2 s'),
        ('print(7)', 0, 'not run: the time was over'),
    ],
)
def test_a_benchmark_that_fails_or_takes_too_long_says_so(code, seconds, error):
    result = all_on_gpu.timed(['python', '-c', code], seconds)
    assert result.error == error
    assert result.output == ('7\n' if seconds else '')
