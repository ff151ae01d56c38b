"""Optax's own tests of its adaptive gradient clipping, unchanged, run on ours."""

import unittest

import pytest

from nfnets_jax import adaptive_grad_clip

_clipping_test = pytest.importorskip(
    'optax.transforms._clipping_test', reason='this optax is installed without its tests'
)
NAMES = [n for n in dir(_clipping_test.ClippingTest) if n.startswith('test_adaptive_grad_clip')]


@pytest.mark.parametrize('name', NAMES)
def test_passes_on_ours(name, monkeypatch):
    monkeypatch.setattr(_clipping_test._clipping, 'adaptive_grad_clip', adaptive_grad_clip)
    result = unittest.TestResult()
    _clipping_test.ClippingTest(name).run(result)
    assert result.testsRun == 1
    assert result.wasSuccessful(), result.failures + result.errors
