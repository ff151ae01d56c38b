"""The examples in the docstrings of what other code imports are run."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize('module', ['agc', 'sam', 'unit_axes'])
def test_doctests(module):
    results = doctest.testmod(importlib.import_module(f'nfnets_jax.{module}'))
    assert results.attempted > 0
    assert results.failed == 0
