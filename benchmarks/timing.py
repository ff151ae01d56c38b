"""What the benchmarks share: measurements in turns, a table, and the same as JSON beside it."""

import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from nfnets_jax import files


class Times(NamedTuple):
    """Seconds for one call.

    Attributes:
      best, median: by the clock on the wall.
      processor: of all the host's processors together, a mean. Where other programs run beside,
        it is the figure of a CPU to compare: they change it little.
    """

    best: float
    median: float
    processor: float


def in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int, seconds: float = 0) -> dict:
    """Times functions in turns, so that a machine that slows down slows them all: name -> Times.

    Args:
      runs: each starts its work; what it returns is waited for with jax.block_until_ready, which
        takes what is no JAX array as done.
      rounds: counted; one more comes first, and is not.
      seconds: about how long to spend on each, at least one call a round. The calls of a round are
        started in a row before they are waited for, so that a GPU does not wait for the host.
    """
    calls = dict.fromkeys(runs, 1)
    wall: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start, processor_start = time.perf_counter(), time.process_time()
            out = None
            for _ in range(calls[name]):
                out = run()
            jax.block_until_ready(out)
            each = (time.perf_counter() - start) / calls[name]
            if turn == 0:
                calls[name] = max(1, min(100, int(seconds / rounds / each)))
                continue
            wall[name].append(each)
            processor[name].append((time.process_time() - processor_start) / calls[name])
    return {
        name: Times(min(wall[name]), statistics.median(wall[name]), statistics.mean(times))
        for name, times in processor.items()
    }


def about(**settings: Any) -> dict[str, Any]:
    """Returns the settings, and what a figure means nothing without: hardware and versions."""
    versions = {}
    for name in ('jax', 'jaxlib', 'dm-haiku', 'optax', 'libtpu', 'torch', 'timm'):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return settings | {
        'device': device.device_kind,
        'platform': device.platform,
        'cores': os.cpu_count(),
        'load': os.getloadavg()[0],
        'versions': versions,
    }


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows that have the same keys as a table; None is a dash."""
    cells = [list(rows[0])]
    cells += [
        [
            '-'
            if x is None
            else f'{x:.3g}'
            if isinstance(x, float) and x < 100
            else f'{x:.0f}'
            if isinstance(x, float)
            else str(x)
            for x in row.values()
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        first, *rest = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print('  '.join([line[0].ljust(len(first)), *rest]).rstrip(), flush=True)


def write(path: str | None, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes settings and rows as JSON, if there is a path."""
    if path:
        text = json.dumps({**settings, 'rows': list(rows)}, indent=2)
        files.atomic_write(path, text + '\n')
