import time
import types

import pytest

from experiments.run.throughput import Throughput

BATCHES = types.SimpleNamespace(wait_seconds=0.0)


class Working:
    """A state that the devices are still at work on."""

    def block_until_ready(self):
        time.sleep(0.1)
        return self


def test_steps_under_way_when_it_is_paused_count_and_what_is_done_inside_does_not():
    throughput = Throughput(8, BATCHES, flops_per_image=1e9)
    throughput.tick(None)  # compiles
    throughput.tick(None)
    with throughput.paused(Working()):
        time.sleep(0.4)
    figures = throughput.read()
    assert 0.1 <= throughput.seconds < 0.3
    assert figures['images_per_second'] == pytest.approx(8 / throughput.seconds)
