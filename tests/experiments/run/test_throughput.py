import time
import types

import pytest

from experiments.run.throughput import Clock

BATCHES = types.SimpleNamespace(wait_seconds=0.0)


class Working:
    """A state that the devices are still at work on."""

    def block_until_ready(self):
        time.sleep(0.1)
        return self


def test_steps_under_way_when_it_is_paused_count_and_what_is_done_inside_does_not():
    clock = Clock(8, BATCHES, flops_per_image=1e9)
    clock.tick(None)  # compiles
    clock.tick(None)
    with clock.paused(Working()):
        time.sleep(0.4)
    figures = clock.read()
    assert 0.1 <= clock.seconds < 0.3
    assert figures['images_per_second'] == pytest.approx(8 / clock.seconds)
