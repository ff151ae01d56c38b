"""Exactly one of --weights and --workdir names the weights, for each command that uses some."""

import types

import pytest
from absl import flags

from experiments.launch import weights_flags
from nfnets_jax.errors import UsageError
from nfnets_jax.weights import pretrained


@pytest.fixture
def given(monkeypatch):
    """Returns a function that sets the flags."""

    def set_flags(**values):
        known = {'weights': None, 'workdir': None, 'checkpoint': 'latest', 'ema': True}
        known |= {'model': None} | values
        monkeypatch.setattr(flags, 'FLAGS', types.SimpleNamespace(**known))

    return set_flags


@pytest.mark.parametrize('name', ['weights', 'workdir'])
def test_either_names_the_directory_of_a_run(name, given, monkeypatch, tmp_path):
    loaded = []

    def load(*arguments, **options):
        loaded.append((arguments, options))
        return pretrained.Weights({}, {}, pretrained.Metadata(model='NF-ResNet-8'))

    monkeypatch.setattr(pretrained, 'load_pretrained', load)
    given(**{name: str(tmp_path)}, checkpoint='best', ema=False, model='NF-ResNet-8')
    source, _ = weights_flags.load()
    assert source == str(tmp_path)
    assert loaded == [((source, 'NF-ResNet-8'), {'checkpoint': 'best', 'ema': False})]


@pytest.mark.parametrize(
    ('values', 'problem'),
    [
        ({}, '^give one of --workdir and --weights$'),
        ({'weights': 'a', 'workdir': 'b'}, '^give one of --workdir and --weights$'),
        ({'workdir': 'eca_nfnet_l0'}, '^--workdir=eca_nfnet_l0 holds no run: there is no such'),
        ({'weights': 'eca_nfnet_k0'}, "did you mean 'eca_nfnet_l0'"),
        ({'weights': 'w.npz', 'checkpoint': 'best'}, '^--checkpoint is of a run: w.npz is a file'),
        ({'weights': 'eca_nfnet_l0', 'ema': False}, '^--noema is of a run: eca_nfnet_l0 is'),
    ],
)
def test_mistakes_are_one_line(values, problem, given):
    given(**values)
    with pytest.raises(UsageError, match=problem):
        weights_flags.load()


def test_weights_of_no_known_model_are_refused(given, monkeypatch):
    unknown = pretrained.Weights({}, {}, pretrained.Metadata())
    monkeypatch.setattr(pretrained, 'load_pretrained', lambda *_, **__: unknown)
    given(weights='w.npz')
    with pytest.raises(UsageError, match=r'^w\.npz: the parameters are not those of a known model'):
        weights_flags.load()
