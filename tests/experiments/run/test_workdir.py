import dataclasses
import json
import pathlib

import pytest
from ml_collections import ConfigDict

from experiments.run import workdir
from nfnets_jax.errors import UsageError
from nfnets_jax.weights import pretrained
from tests import processes
from tests.experiments.conftest import tiny_config

ROOT = pathlib.Path(__file__).parents[3]
CONFIG = {'seed': 0, 'groups': ({'match': 'a'}, {'match': 'b'}), 'eval': {'every': '1 epochs'}}


def config(**changes):
    return ConfigDict({**CONFIG, **changes})


def claim(path, **changes):
    with workdir.claimed(path, config(**changes)) as claimed:
        return claimed


def test_the_config_is_kept_and_the_directory_can_be_claimed_again(tmp_path):
    path = tmp_path / 'a' / 'b'
    assert claim(path) == path
    assert json.loads((path / 'config.json').read_text()) == json.loads(json.dumps(CONFIG))
    assert claim(path) == path


def test_another_experiment_is_refused_by_the_key_that_differs(tmp_path):
    claim(tmp_path)
    with pytest.raises(UsageError, match=r'config.seed is 0 there and 1 here; choose another'):
        claim(tmp_path, seed=1)
    with pytest.raises(UsageError, match=r'config.extra is None there and 2 here \(and 1 more\)'):
        claim(tmp_path, seed=1, extra=2)
    assert workdir.load_config(tmp_path).seed == 0


def test_what_the_result_does_not_depend_on_may_change(tmp_path):
    claim(tmp_path)
    claim(tmp_path, eval={'every': '2 epochs'})
    assert workdir.load_config(tmp_path).eval.every == '2 epochs'


ADDED = (
    *('augment.mix_pairs', 'eval.precision'),
    *(f'optimizer.schedule.{name}' for name in ('end_value', 'every', 'patience')),
)


def forget(path, *keys):
    """Makes the config.json of a run one of an earlier version, without `keys`."""
    file = path / 'config.json'
    fields = json.loads(file.read_text())
    for key in keys:
        *nodes, name = key.split('.')
        node = fields
        for part in nodes:
            node = node[part]
        node.pop(name)
    file.write_text(json.dumps(fields))


def test_a_run_of_an_earlier_version_is_the_same_experiment(tmp_path):
    with workdir.claimed(tmp_path, tiny_config()):
        pass
    forget(tmp_path, *ADDED)
    assert workdir.load_config(tmp_path).to_dict() == workdir.as_json(tiny_config())
    assert not workdir.free_changes(tmp_path, tiny_config())
    with workdir.claimed(tmp_path, tiny_config()):
        pass
    forget(tmp_path, *ADDED)
    changed = tiny_config(augment__mix_pairs='distinct')
    with (
        pytest.raises(UsageError, match="mix_pairs is 'batch' there and 'distinct' here"),
        workdir.claimed(tmp_path, changed),
    ):
        pass


def test_a_run_is_evaluated_as_it_was_when_the_default_was_another(tmp_path):
    earlier = tiny_config(model={'name': 'NFNet-F0'}, data={'name': 'folder', 'path': 'x'})
    with workdir.claimed(tmp_path, earlier):
        pass
    metadata = pretrained.Metadata(model='NFNet-F0', num_classes=2)
    model_json = tmp_path / 'model.json'
    model_json.write_text(pretrained.encode_metadata(metadata))
    assert 'test_mode' not in workdir.load_config(tmp_path).data
    metadata = dataclasses.replace(metadata, eval_mode='crop_resize')
    model_json.write_text(pretrained.encode_metadata(metadata))
    assert workdir.load_config(tmp_path).data.test_mode == 'crop_resize'
    changes = workdir.free_changes(tmp_path, earlier)
    assert changes == ["config.data.test_mode is 'crop_resize' before and None now"]
    with workdir.claimed(tmp_path, earlier):
        pass


def test_what_makes_a_step_fit_or_survive_may_change_too(tmp_path):
    claim(tmp_path, model={'name': 'a', 'remat': False})
    claim(tmp_path, model={'name': 'a', 'remat': True}, accumulate=2, skip_nonfinite=3)
    with pytest.raises(UsageError, match="config.model.name is 'a' there and 'b' here; choose"):
        claim(tmp_path, model={'name': 'b', 'remat': True}, accumulate=2, skip_nonfinite=3)


def test_a_second_process_is_refused(tmp_path):
    program = (
        'import sys; from ml_collections import ConfigDict; from experiments.run import workdir\n'
        'with workdir.claimed(sys.argv[1], ConfigDict({})): print("mine")'
    )
    with workdir.claimed(tmp_path, ConfigDict({})):
        other = processes.run(['-c', program, tmp_path], cwd=ROOT)
        assert 'in use by another process' in other.stderr
    with workdir.claimed(tmp_path, ConfigDict({})):
        pass


@pytest.mark.parametrize('place', ['file', 'file/below', '/proc/nowhere'])
def test_a_place_that_cannot_be_written(tmp_path, place):
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(UsageError, match='is a file|cannot be written'):
        claim(tmp_path / place)
    assert (tmp_path / 'file').read_text() == 'mine'


def test_checkpoints_of_an_unknown_config_are_not_taken_over(tmp_path):
    (tmp_path / 'checkpoints').mkdir()
    with pytest.raises(UsageError, match='without a config.json'):
        claim(tmp_path)


def test_an_empty_name_is_not_this_directory():
    with pytest.raises(UsageError, match='--workdir= is empty'):
        claim('')


def test_no_run_and_a_damaged_config(tmp_path):
    with pytest.raises(UsageError, match='holds no run'):
        workdir.load_config(tmp_path / 'nothing')
    (tmp_path / 'config.json').write_text('[]')
    with pytest.raises(UsageError, match='must hold one JSON object'):
        workdir.load_config(tmp_path)
    (tmp_path / 'config.json').write_text('{"seed": 0')
    with pytest.raises(UsageError, match=r'config.json cannot be read'):
        workdir.load_config(tmp_path)
    with pytest.raises(UsageError, match=r'config.json cannot be read'):
        claim(tmp_path)
