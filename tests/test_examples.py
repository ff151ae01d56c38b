"""Every example runs, does what it shows, and is short."""

import importlib
import pathlib

import chex
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / 'examples'
LOOPS = ['agc_optax', 'agc_flax_nnx', 'agc_equinox', 'sam_loop']


@pytest.mark.parametrize('name', LOOPS)
def test_loop_learns(name, capsys):
    losses = importlib.import_module(f'examples.{name}').main()
    assert losses[-1] < 0.6 * losses[0]
    assert capsys.readouterr().out


def test_sharded_clips_whole_units():
    expected, by_jit, by_hand = importlib.import_module('examples.agc_sharded').main()
    chex.assert_trees_all_close(by_jit, expected, rtol=1e-5)
    chex.assert_trees_all_close(by_hand, expected, rtol=1e-5)


def test_each_is_under_60_lines_and_tested():
    files = sorted(FOLDER.glob('*.py'))
    assert [file.stem for file in files] == sorted([*LOOPS, 'agc_sharded'])
    for file in files:
        assert len(file.read_text().splitlines()) < 60, file.name
