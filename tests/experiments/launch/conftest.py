"""Hosts, where the machine can make them."""

import pytest

from tests.experiments.launch import hosts


@pytest.fixture
def network(tmp_path):
    """A function (count, own_addresses=None) -> `hosts.Network`."""
    with hosts.networks(tmp_path) as make:
        yield make
