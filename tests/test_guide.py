"""The first section of docs/fine_tuning.md, from the images to ONNX, in a shell."""

import importlib.util
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from tests.test_printed_commands import ROOT, commands_in_text, save_network, shell


def save_images(directory: pathlib.Path) -> None:
    """Saves 200 images in four classes that differ by their color, of many sizes."""
    rng = np.random.RandomState(0)
    for label, color in enumerate(np.eye(4)[:, :3] * 150):
        for i in range(50):
            pixels = rng.randint(0, 100, (40 + i, 90 - i, 3)) + color
            path = directory / f'class {label}' / f'{i}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.mark.slow
def test_the_short_way_ends_with_a_program(tmp_path):
    """Only the duration is shorter; a file test_nfnet of random weights replaces the download."""
    text = (ROOT / 'docs' / 'fine_tuning.md').read_text(encoding='utf-8')
    section = text.partition('## The short way')[2].partition('\n## ')[0]
    _, train, *others = commands_in_text(section)
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    save_images(tmp_path / 'mine')
    (tmp_path / 'photo.jpg').write_bytes((tmp_path / 'mine' / 'class 1' / '7.jpg').read_bytes())
    save_network(tmp_path / 'test_nfnet', 'test_nfnet')
    said = {}
    for command in (f'{train} --config.duration=20', *others[:-1]):
        done = shell(command, tmp_path)
        assert done.returncode == 0, f'{command}: {done.stderr}'
        said[command.split()[2]] = done
    assert 'config.batch_size=16 instead of 2048' in said['experiments.train'].stderr
    assert 'config.optimizer.learning_rate=0.05 instead' in said['experiments.train'].stderr
    assert re.search(r'test top-1 [\d.]+%', said['experiments.evaluate'].stdout)
    assert re.search(r'\d%  class [0-3]\n', said['experiments.classify'].stdout)
    assert (tmp_path / 'report').is_dir()
    done = shell(others[-1], tmp_path)
    if importlib.util.find_spec('jax2onnx') is None:
        assert (done.returncode, 'pip install "nfnets_jax[onnx]"' in done.stderr) == (2, True)
        return
    assert done.returncode == 0, done.stderr
    (script,) = re.findall(r'```python\n(.*?)```', section, re.S)
    (tmp_path / 'script.py').write_text(script)
    done = shell('python script.py', tmp_path)
    assert done.returncode == 0, done.stderr
    assert f'class {done.stdout.strip()}' in {f'class {i}' for i in range(4)}
