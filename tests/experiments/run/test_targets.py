import importlib.util

import jax
import jax.numpy as jnp
import pytest

from experiments.run import targets
from nfnets_jax.errors import UsageError


def needs(module, extra):
    return pytest.mark.skipif(
        importlib.util.find_spec(module) is None,
        reason=f"{module} is not installed: pip install 'nfnets_jax[{extra}]'",
    )


@pytest.mark.parametrize(
    ('name', 'problem'),
    [
        ('v5:2x2', r"unknown 'v5' \(did you mean 'v5p'\?\)"),
        ('v5e', 'give the chips along 2 axes, as v5e:2x2'),
        ('v5e:2x2x2', 'give the chips along 2 axes'),
        ('v4:2x2', 'give the chips along 3 axes, as v4:2x2x1'),
        ('v5e:0x2', 'give the chips'),
        ('v5e:3x5', 'the first two axes must be even'),
        ('v5e:32x16', 'a pod has 256 chips'),
        ('v3:64x32', 'a pod has 1024 chips'),
        ('H100', 'give the chips along 1 axes, as H100:8'),
        ('H100:9', 'up to 8, one machine, or a multiple of it'),
    ],
)
def test_targets_that_there_are_not(name, problem):
    with pytest.raises(UsageError, match=f'--target={name}: .*{problem}'):
        targets.open_target(name)


def test_chips_and_devices():
    assert targets.count_devices('v3:4x4')[1:] == (16, 32)
    assert targets.count_devices('v4:2x2x4')[1:] == (16, 16)
    assert targets.count_devices('H200:16')[1:] == (16, 16)


@pytest.mark.parametrize(('name', 'extra'), [('v5e:2x2', 'tpu'), ('H100:8', 'cuda')])
def test_a_compiler_that_is_not_installed(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UsageError, match=rf"pip install 'nfnets_jax\[{extra}\]'"):
        targets.open_target(name)


def test_what_the_compiler_says_of_memory():
    used = 'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space '
    assert targets.memory_needed(used + 'hbm. Used 20.50G of 15.75G hbm.') == 20.5 * 2**30
    needed = (
        'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
        'temporaries (2.00T) exceeds available HBM (15.75G).'
    )
    assert targets.memory_needed(needed) == 2**41
    assert targets.memory_needed('INVALID_ARGUMENT: Used 20.50G') is None


def lowered(target, size=8):
    placed = jax.sharding.SingleDeviceSharding(target.devices[0])
    x = jax.ShapeDtypeStruct((size,), jnp.float32, sharding=placed)
    return jax.jit(lambda x: x + 1).lower(x)


@needs('libtpu', 'tpu')
def test_a_program_is_compiled_once(tmp_path, monkeypatch):
    monkeypatch.setenv('NFNETS_JAX_CACHE', str(tmp_path))
    target = targets.open_target('v5e:4x4')
    assert (len(target.devices), target.chips) == (16, 16)
    assert len({device.process_index for device in target.devices}) == 4
    assert target.clock == pytest.approx(1.5e9, rel=0.01)
    first = targets.compile_program(lowered(target), target)
    assert 'ENTRY' in first.text
    (file,) = (tmp_path / 'compiled').iterdir()
    monkeypatch.setattr(targets, '_compile', None)
    assert targets.compile_program(lowered(target), target) == first
    file.write_bytes(file.read_bytes()[:-9])  # A damaged one is compiled again.
    with pytest.raises(TypeError, match='not callable'):
        targets.compile_program(lowered(target), target)


def test_a_program_that_cannot_be_kept_is_not_lost(tmp_path, monkeypatch, capsys):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('NFNETS_JAX_CACHE', str(tmp_path / 'file'))
    here = targets.Target('cpu', None, jax.devices()[:1], 1, 1e9, 1e9, {})
    assert 'ENTRY' in targets.compile_program(lowered(here), here).text
    assert capsys.readouterr().err.startswith('the compiled program is not kept: ')


@needs('libtpu', 'tpu')
def test_more_than_a_device_has(tmp_path, monkeypatch):
    monkeypatch.setenv('NFNETS_JAX_CACHE', str(tmp_path))
    target = targets.open_target('v5e:1x1')
    found = targets.compile_program(lowered(target, 2**33), target)
    assert found.text == ''
    assert found.memory['temporaries'] >= 2**36


@needs('jax_cuda12_plugin', 'cuda')
def test_gpus_in_two_machines():
    target = targets.open_target('H100:16')
    assert [device.process_index for device in target.devices] == [0] * 8 + [1] * 8
