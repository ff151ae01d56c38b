import resource
import time
import types

import jax
import pytest

from experiments.run.throughput import FAULTS_COUNTED_IN, Throughput

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


@pytest.mark.parametrize(
    ('megabytes', 'system', 'platform', 'said'),
    [
        (
            320,
            2.0,
            'cpu',
            'each step allocates 320 MB anew, and the system takes 20% of the processor time: '
            '--keep_memory makes steps faster',
        ),
        (320, 0.5, 'cpu', None),  # of 8.5 seconds
        (30, 2.0, 'cpu', None),
        (320, 2.0, 'gpu', None),
    ],
)
def test_page_faults_are_told_where_they_cost_something(
    monkeypatch, megabytes, system, platform, said
):
    faults = megabytes * 1e6 * FAULTS_COUNTED_IN / resource.getpagesize()
    usages = iter(
        types.SimpleNamespace(ru_stime=1.0 + part * system, ru_utime=5.0 + part * 8.0, ru_minflt=n)
        for part, n in ((0, 7), (1, 7 + faults))
    )
    throughput = Throughput(8, BATCHES, flops_per_image=1e9)
    monkeypatch.setattr(resource, 'getrusage', lambda _: next(usages))
    throughput.tick(None)
    device = types.SimpleNamespace(platform=platform)
    monkeypatch.setattr(jax, 'devices', lambda: [device])
    assert throughput.describe_faults(None) == said
