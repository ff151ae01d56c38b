import io
import json
import math
import sys
import types

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator

from experiments.run import metric_writers, parallel
from nfnets_jax.errors import UsageError
from tests.test_files import files_no_larger_than


def _config(**wandb):
    fields = {'project': '', 'entity': '', 'name': '', 'mode': 'online'} | wandb
    return ml_collections.ConfigDict({'seed': 3, 'wandb': fields})


def _open(workdir, start_step=0, **wandb):
    return metric_writers.open_writer(workdir, config=_config(**wandb), start_step=start_step)


def _record(workdir, steps, start_step=0):
    writer = _open(workdir, start_step)
    for step in steps:
        writer.write(step, {'train/loss': 1 / step})
    return writer


def _tensorboard(workdir):
    """Returns {tag: [(step, value), ...]} as TensorBoard shows it."""
    events = event_accumulator.EventAccumulator(str(workdir))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()['scalars']
    }


def test_what_is_written_is_read_back(tmp_path):
    writer = _open(tmp_path)
    writer.write(1, {'train/loss': 2.5, 'train/top1': np.float32(0.25)})
    writer.write(np.int64(2), {'test/loss': jnp.float32(0.5), 'test/hits': np.array([7])})
    writer.write(2, {'test_ema/loss': jnp.bfloat16(1.5)})
    # Everything is on its way to disk before `close`, for a run may be killed.
    assert metric_writers.read_metrics(tmp_path) == [
        {'step': 1, 'train/loss': 2.5, 'train/top1': 0.25},
        {'step': 2, 'test/loss': 0.5, 'test/hits': 7},
        {'step': 2, 'test_ema/loss': 1.5},
    ]
    assert _tensorboard(tmp_path) == {
        'train/loss': [(1, 2.5)],
        'train/top1': [(1, 0.25)],
        'test/loss': [(2, 0.5)],
        'test/hits': [(2, 7.0)],
        'test_ema/loss': [(2, 1.5)],
    }
    writer.close()


def test_numbers_that_are_not_finite_are_null_in_valid_json(tmp_path):
    writer = _open(tmp_path)
    writer.write(1, {'a': math.nan, 'b': np.float32('inf'), 'c': -math.inf, 'd': 1.0})
    writer.close()

    def refuse(constant):
        raise AssertionError(f'{constant} is not JSON')

    line = (tmp_path / 'metrics.jsonl').read_text()
    assert json.loads(line, parse_constant=refuse) == {
        'step': 1, 'a': None, 'b': None, 'c': None, 'd': 1.0,
    }  # fmt: skip
    record = metric_writers.read_metrics(tmp_path)[0]
    assert math.isnan(record['a'])
    assert record['d'] == 1.0


@pytest.mark.parametrize('value', [np.zeros(2), 'low', None, np.zeros((0,)), 1j])
def test_only_scalars(tmp_path, value):
    writer = _open(tmp_path)
    with pytest.raises(TypeError, match="'train/loss' is not one number"):
        writer.write(1, {'train/loss': value})
    writer.close()


def test_a_resumed_run_leaves_the_record_of_one_that_never_stopped(tmp_path):
    straight, stopped = tmp_path / 'straight', tmp_path / 'stopped'
    straight.mkdir()
    stopped.mkdir()
    _record(straight, range(1, 9)).close()
    killed = _record(stopped, range(1, 7))  # never closed
    resumed = _record(stopped, range(5, 9), start_step=4)  # the last checkpoint was at 4
    assert (stopped / 'metrics.jsonl').read_bytes() == (straight / 'metrics.jsonl').read_bytes()
    assert _tensorboard(stopped) == _tensorboard(straight)
    assert len(_tensorboard(stopped)['train/loss']) == 8
    for writer in (killed, resumed):
        writer.close()


def test_tensorboard_forgets_steps_that_are_not_reached_again(tmp_path):
    _record(tmp_path, range(1, 7)).close()
    _record(tmp_path, [5], start_step=4).close()
    assert [step for step, _ in _tensorboard(tmp_path)['train/loss']] == [1, 2, 3, 4, 5]


def test_a_run_that_never_saved_starts_its_record_anew(tmp_path):
    writer = _open(tmp_path)
    writer.write(0, {'test/loss': 2.3})
    writer.close()
    again = _open(tmp_path)
    assert metric_writers.read_metrics(tmp_path) == []
    again.write(0, {'test/loss': 2.0})
    again.close()
    assert metric_writers.read_metrics(tmp_path) == [{'step': 0, 'test/loss': 2.0}]
    assert _tensorboard(tmp_path) == {'test/loss': [(0, 2.0)]}


@pytest.mark.parametrize('tail', [b'{"step": 4, "train/lo', b'{"step": 4}', b'\x00\x00'])
def test_an_unfinished_last_line_is_repaired(tmp_path, tail):
    _record(tmp_path, range(1, 4)).close()
    path = tmp_path / 'metrics.jsonl'
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert len(metric_writers.read_metrics(tmp_path)) == 3
    _open(tmp_path, start_step=100).close()
    assert path.read_bytes() == whole


@pytest.mark.parametrize('damage', [b'{"step": 2, "trai\n', b'[2]\n', b'{"loss": 2}\n', b'\n'])
def test_other_damage_is_said_and_nothing_is_touched(tmp_path, damage):
    path = tmp_path / 'metrics.jsonl'
    before = b'{"step": 1}\n' + damage + b'{"step": 3}\n'
    path.write_bytes(before)
    for attempt in (lambda: metric_writers.read_metrics(tmp_path), lambda: _open(tmp_path, 3)):
        with pytest.raises(UsageError, match=r'metrics\.jsonl, line 2, is not'):
            attempt()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_reading_where_nothing_was_written(tmp_path):
    with pytest.raises(UsageError, match=r'metrics\.jsonl does not exist'):
        metric_writers.read_metrics(tmp_path)


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, 'is_primary', lambda: False)
    writer = metric_writers.open_writer(tmp_path, config=_config(project='p'))
    writer.write(1, {'train/loss': 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


class FakeWandb(types.ModuleType):
    """Remembers what is asked of wandb."""

    class Error(Exception):
        pass

    def __init__(self, error=None):
        super().__init__('wandb')
        self.inits, self.logs, self.finished, self._error = [], [], 0, error

    def init(self, **arguments):
        if self._error:
            raise self.Error(self._error)
        self.inits.append(arguments)
        return self

    def log(self, scalars, step):
        self.logs.append((step, scalars))

    def finish(self):
        self.finished += 1


def test_wandb_continues_under_the_same_id(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    for start_step in (0, 1):
        writer = _open(tmp_path, start_step, project='digits', name='first', mode='offline')
        writer.write(start_step + 1, {'train/loss': np.float32(0.5)})
        writer.close()
    first, second = fake.inits
    assert first == second
    assert first['id']
    assert first['resume'] == 'allow'
    assert first['dir'] == str(tmp_path)
    assert (first['project'], first['name'], first['entity']) == ('digits', 'first', None)
    assert first['mode'] == 'offline'
    assert first['config']['seed'] == 3
    assert fake.logs == [(1, {'train/loss': 0.5}), (2, {'train/loss': 0.5})]
    assert fake.finished == 2


def test_wandb_is_left_alone_without_a_project(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    _record(tmp_path, [1]).close()
    assert not (tmp_path / 'wandb_id').exists()


def test_missing_wandb_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)  # makes the import fail
    with pytest.raises(UsageError, match=r"wandb\.project='p' needs .*nfnets_jax\[tracking\]"):
        _open(tmp_path, project='p')
    assert list(tmp_path.iterdir()) == []


def test_wandb_mistakes_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', FakeWandb('No API key configured.\nMore.'))
    with pytest.raises(UsageError, match=r"wandb\.project='p': No API key.*offline") as error:
        _open(tmp_path, project='p')
    assert '\n' not in str(error.value)


def test_a_file_that_has_vanished_is_told(tmp_path):
    writer = metric_writers.open_writer(tmp_path, config=_config())
    (tmp_path / 'metrics.jsonl').unlink()
    with pytest.raises(UsageError, match=r'metrics of step 1 cannot be written: .* has vanished'):
        writer.write(1, {'x': 1.0})


def test_on_a_full_disk_the_closing_says_no_more_than_the_writing(tmp_path):
    writer = metric_writers.open_writer(tmp_path, config=_config())
    with files_no_larger_than(10):
        with pytest.raises(UsageError, match='the metrics of step 1 cannot be written'):
            writer.write(1, {'x': 1.0})
        writer.close()


def test_a_clock_that_is_set_back_does_not_reorder_the_record(tmp_path, monkeypatch):
    for now in (2e9, 1e9, 1.5e9):
        monkeypatch.setattr(metric_writers.time, 'time', lambda now=now: now)
        before = set(tmp_path.glob('events.out.*'))
        metric_writers.open_writer(tmp_path, config=_config()).close()
        after = set(tmp_path.glob('events.out.*'))
        assert max(after) in after - before, 'the newest comes last by its name'


@pytest.mark.parametrize(('count', 'channels'), [(3, 3), (11, 1)])
def test_tensorboard_has_the_config_and_images(tmp_path, count, channels):
    images = np.random.default_rng(0).integers(0, 255, (count, 5, 6, channels), np.uint8)
    writer = _open(tmp_path)
    writer.write_images('first', images)
    writer.write_images('five channels', np.zeros((2, 4, 4, 5), np.uint8))  # None can be shown.
    writer.close()
    _open(tmp_path, start_step=4).close()  # A resumed run does not repeat the config.
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()['images'] == ['first']
    (config,) = events.Tensors('config')
    (text,) = config.tensor_proto.string_val
    assert json.loads(text.decode().strip('`')) == _config().to_dict()
    (shown,) = events.Images('first')
    pixels = np.asarray(Image.open(io.BytesIO(shown.encoded_image_string)))
    pixels = pixels.reshape(shown.height, shown.width, channels)
    for i, image in enumerate(images):
        row, column = 7 * (i // 8), 8 * (i % 8)
        np.testing.assert_array_equal(pixels[row + 1 : row + 6, column + 1 : column + 7], image)


def test_images_on_a_full_disk_are_one_line(tmp_path):
    writer = _open(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (32, 64, 64, 3), np.uint8)
    with files_no_larger_than(4096), pytest.raises(UsageError, match='cannot be written'):
        writer.write_images('first', noise)
    writer.close()
