import gc
import os
import pathlib
import shutil
from types import SimpleNamespace
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.run.checkpoints import Checkpoints
from nfnets_jax.errors import UsageError
from nfnets_jax.weights import checkpoints as reading
from nfnets_jax.weights.checkpoints import CheckpointReader, DamagedCheckpointError
from tests.test_files import files_no_larger_than


@pytest.fixture(autouse=True, scope='module')
def _imports_are_no_garbage():
    """Each failed read collects garbage, which takes 0.3 s where all modules are looked at."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def impatient(monkeypatch):
    """A failed read waits a moment for what it has abandoned, so that nothing is printed."""
    monkeypatch.setattr(reading, 'time', SimpleNamespace(sleep=lambda seconds: None))


class State(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    ema: Any


def make_state(step=0):
    # Big enough for its values to lie in files of their own, beside the index.
    weights = jnp.float32(np.random.default_rng(step).normal(size=(64, 64)))
    params = {'net/~/conv': {'w': weights, 'bias': jnp.zeros(3)}, 'net': {'gain': jnp.ones(())}}
    optimizer = optax.chain(
        optax.masked(optax.add_decayed_weights(0.1), jax.tree.map(lambda x: x.ndim > 1, params)),
        optax.sgd(lambda count: 0.1 / (1 + count), momentum=0.9),
    )
    return State(jnp.int32(step), params, optimizer.init(params), ())


@pytest.fixture
def directory(tmp_path):
    return tmp_path / 'checkpoints'


def save_all(directory, scores, **options):
    checkpoints = Checkpoints(directory, **options)
    for step, score in scores.items():
        checkpoints.save(step, make_state(step), score=score)
    checkpoints.wait()
    checkpoints.close()


def fail(message):
    raise AssertionError(message)


def test_a_state_comes_back_bit_for_bit_in_its_own_structure(directory):
    save_all(directory, {7: None})
    checkpoints = Checkpoints(directory)
    step, state = checkpoints.latest(jax.eval_shape(make_state), on_damage=fail)
    assert step == 7
    chex.assert_trees_all_equal(state, make_state(7))
    chex.assert_trees_all_equal_dtypes(state, make_state(7))
    assert isinstance(state, State)


def test_a_state_can_be_read_without_knowing_its_structure(directory):
    save_all(directory, {7: None})
    state = CheckpointReader(directory).restore(7)
    assert sorted(state) == ['ema', 'opt_state', 'params', 'step']
    chex.assert_trees_all_equal(state['params'], make_state(7).params)


class _Clipping(NamedTuple):
    clipped_fraction: Any
    clipped_fraction_by_group: Any
    step: Any


@pytest.mark.usefixtures('impatient')
def test_a_state_of_an_earlier_version_is_read(directory):
    """The fractions by group were a dict of scalars; they are now one array."""

    def state(by_group):
        params = {'Net/~/stem': {'w': np.arange(6.0)}}
        clipping = _Clipping(np.float32(0.5), by_group, None)
        return {'params': params, 'opt_state': (clipping, (params, np.int32(7)))}

    checkpoints = Checkpoints(directory)
    checkpoints.save(3, state({'head': np.float32(0.25), 'stem': np.float32(0.75)}))
    checkpoints.wait()
    template = state(np.zeros(2, np.float32))
    chex.assert_trees_all_equal(checkpoints.restore(3, template), template)
    # Only that: anything else that differs is an error as before.
    for other in (
        {'params': template['params']},
        template | {'opt_state': template['opt_state'][:1]},
    ):
        with pytest.raises(DamagedCheckpointError):
            checkpoints.restore(3, other)
    wider = template | {'params': {'Net/~/stem': {'w': np.arange(7.0)}}}
    with pytest.raises(DamagedCheckpointError):
        checkpoints.restore(3, wider)


def test_no_checkpoint_is_none(directory):
    assert Checkpoints(directory).latest(make_state(), on_damage=fail) is None


def test_the_newest_and_the_best_are_kept_and_known_after_reopening(directory):
    save_all(directory, {1: 0.5, 2: 0.9, 3: 0.7, 4: 0.8, 5: None}, keep=2)
    checkpoints = Checkpoints(directory, keep=2)
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best() == 2
    checkpoints.save(6, make_state(6), score=0.9)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 5, 6]
    assert checkpoints.best() == 2, 'of equal scores the first'


def test_a_saved_state_is_a_copy(directory):
    checkpoints = Checkpoints(directory)
    state = {'w': np.zeros((64, 64))}
    checkpoints.save(1, state)
    state['w'] += 1  # as a donated buffer would be overwritten
    checkpoints.wait()
    chex.assert_trees_all_equal(checkpoints.restore(1, state), {'w': np.zeros((64, 64))})


def test_a_step_that_is_there_is_left_as_it_is(directory):
    save_all(directory, {1: None})
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, make_state(2))
    checkpoints.wait()
    chex.assert_trees_all_equal(checkpoints.restore(1, make_state()), make_state(1))


def test_a_write_cut_short_is_not_a_checkpoint(directory):
    save_all(directory, {1: None, 2: None})
    (directory / '2').rename(directory / '2.orbax-checkpoint-tmp')  # as a killed process leaves it
    checkpoints = Checkpoints(directory)
    assert checkpoints.steps() == [1]
    checkpoints.save(2, make_state(2))
    checkpoints.wait()
    assert checkpoints.latest(make_state(), on_damage=fail)[0] == 2


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def slow(damage):
    return pytest.param(damage, marks=pytest.mark.slow)


@pytest.mark.parametrize('damage', [flip, slow(truncate), slow(pathlib.Path.unlink)])
def test_any_damaged_file_is_noticed_or_harmless(directory, damage, capfd):
    save_all(directory, {1: None, 2: None})
    newest = directory / '2'
    whole = directory.with_name('whole')
    shutil.copytree(newest, whole)
    fell_back = 0
    for file in sorted(path for path in whole.rglob('*') if path.is_file()):
        shutil.rmtree(newest, ignore_errors=True)  # It was renamed if it was damaged.
        shutil.copytree(whole, newest)
        if not file.stat().st_size:
            continue
        damage(newest / file.relative_to(whole))
        said = []
        checkpoints = Checkpoints(directory)
        step, state = checkpoints.latest(make_state(), on_damage=said.append)
        checkpoints.close()
        chex.assert_trees_all_equal(state, make_state(step))
        assert len(said) == (step == 1)
        fell_back += step == 1
    assert fell_back >= 4
    assert capfd.readouterr().err == '', 'one line by us, no stack traces by others'


@pytest.mark.usefixtures('impatient')
def test_values_that_were_not_written_are_noticed(directory):
    save_all(directory, {1: None})
    values = max((directory / '1' / 'state').rglob('*'), key=lambda path: path.stat().st_size)
    flip(values)
    with pytest.raises(DamagedCheckpointError):
        CheckpointReader(directory).restore(1, make_state())


@pytest.mark.usefixtures('impatient')
def test_a_damaged_checkpoint_is_set_aside_and_its_step_written_anew(directory):
    save_all(directory, {1: 0.1, 2: 0.2})
    (directory / '2' / 'state' / '_METADATA').unlink()
    said = []
    checkpoints = Checkpoints(directory)
    step, _ = checkpoints.latest(make_state(), on_damage=said.append)
    assert step == 1
    assert 'damaged-2 is damaged' in said[0]
    assert '\n' not in said[0]
    assert (directory / 'damaged-2').is_dir()
    assert checkpoints.best() == 1
    checkpoints.save(2, make_state(2))
    checkpoints.wait()
    chex.assert_trees_all_equal(checkpoints.restore(2, make_state()), make_state(2))


@pytest.mark.usefixtures('impatient')
def test_where_none_can_be_read_nothing_is_touched(directory):
    save_all(directory, {1: 0.1, 2: 0.2})
    for step in '12':
        (directory / step / 'state' / '_METADATA').unlink()
    checkpoints = Checkpoints(directory)
    with pytest.raises(DamagedCheckpointError, match='none of the checkpoints'):
        checkpoints.latest(make_state(), on_damage=fail)
    assert checkpoints.steps() == [1, 2]


@pytest.mark.usefixtures('impatient')
def test_a_state_of_another_model_is_an_error(directory):
    save_all(directory, {1: None})
    with pytest.raises(DamagedCheckpointError):
        Checkpoints(directory).restore(1, {'other': np.zeros(3)})


def test_reading_beside_a_running_job_changes_nothing(directory):
    save_all(directory, {1: None})
    before = sorted(directory.rglob('*'))
    reader = CheckpointReader(directory)
    assert reader.steps() == [1]
    save_all(directory, {2: None})
    assert reader.steps() == [1, 2]
    shutil.rmtree(directory / '2')
    assert sorted(directory.rglob('*')) == before


@pytest.mark.parametrize('end', [Checkpoints.wait, Checkpoints.close])
def test_a_disk_that_fills_up_leaves_the_last_good_one(directory, capfd, end):
    save_all(directory, {1: None})
    checkpoints = Checkpoints(directory)
    with files_no_larger_than(1000):
        checkpoints.save(2, make_state(2))
        with pytest.raises(UsageError, match='a checkpoint cannot be written: .*') as error:
            end(checkpoints)
    assert str(error.value).endswith('; the last whole one is step 1')
    checkpoints.close()
    assert capfd.readouterr().err == '', 'no stack traces by others'
    again = Checkpoints(directory)
    assert again.latest(make_state(), on_damage=fail)[0] == 1
    again.save(2, make_state(2))
    again.wait()
    assert again.steps() == [1, 2]


def test_a_directory_that_vanishes_is_not_made_anew(directory):
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, make_state())
    checkpoints.wait()
    shutil.rmtree(directory)
    with pytest.raises(UsageError, match='has vanished'):
        checkpoints.save(2, make_state())
    assert not directory.exists()


def test_a_note_is_kept(directory):
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, make_state(), note='8 devices')
    checkpoints.save(2, make_state())
    checkpoints.wait()
    assert checkpoints.note(1) == '8 devices'
    assert checkpoints.note(2) is None


def test_a_name_is_chosen(directory):
    with pytest.raises(UsageError, match='holds no checkpoint yet'):
        Checkpoints(directory).choose('latest')
    save_all(directory, {1: 0.5, 2: 0.4})
    checkpoints = CheckpointReader(directory)
    assert [checkpoints.choose(name) for name in ('latest', 'best', '2')] == [2, 1, 2]
    with pytest.raises(UsageError, match=r"checkpoint '3': .* has latest, best, 1, 2"):
        checkpoints.choose('3')


def test_every_method_is_a_no_op_in_a_process_that_does_not_write(directory):
    checkpoints = Checkpoints(directory, enabled=False)
    checkpoints.save(1, make_state())
    checkpoints.wait()
    checkpoints.close()
    assert checkpoints.latest(make_state(), on_damage=fail) is None
    assert not directory.exists()
