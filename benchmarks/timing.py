"""Shared by the benchmarks: options, interleaved timings, and results as a table and as JSON."""

import argparse
import importlib.metadata
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from experiments.launch import cli, command_help
from nfnets_jax import files
from nfnets_jax.errors import UsageError


def parser(doc: str, **defaults: Any) -> argparse.ArgumentParser:
    """Returns a parser with an option for each default, of its type, and --json."""
    parser = command_help.parser(doc)
    for name, default in defaults.items():
        option = f'--{name.replace("_", "-")}'
        parser.add_argument(option, type=type(default), default=default, help=f'default: {default}')
    parser.add_argument(
        '--json', type=option_type(_file_to_write), help='where to write the table as JSON'
    )
    return parser


def option_type(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Returns `convert` as a type of argparse's options, which tell a UsageError in one line."""

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return converted


def _file_to_write(text: str) -> str:
    """Returns the path of --json, checked before hours of measuring."""
    path = files.expand(text)
    cli.check_out(pathlib.Path(path), flag='json')
    return path


class Times(NamedTuple):
    """Seconds for one call.

    Attributes:
      best, median: wall-clock time.
      processor: mean CPU time, summed over the host's processors. Compare this one on a CPU that
        runs other programs, which change it little.
    """

    best: float
    median: float
    processor: float


def in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int, seconds: float = 0) -> dict:
    """Times functions in turns, so that a machine that slows down slows them all: name -> Times.

    Args:
      runs: functions that start their work and return its arrays, for jax.block_until_ready.
      rounds: number of timed rounds, after one that is not timed.
      seconds: about how long to spend on each function, with at least one call a round. The calls
        of a round are started before the first is waited for, so that a GPU never waits for the
        host.
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
    """Returns the settings with hardware and versions."""
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
    """Prints rows with the same keys as a table; None becomes a dash."""

    def cell(x: Any) -> str:
        if isinstance(x, float):
            return f'{x:.3g}' if x < 100 else f'{x:.0f}'
        return '-' if x is None else str(x)

    cells = [list(rows[0]), *([cell(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        first, *rest = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print('  '.join([line[0].ljust(len(first)), *rest]).rstrip(), flush=True)


def write(path: str | None, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes settings and rows as JSON, unless the path is None."""
    if path:
        text = json.dumps({**settings, 'rows': list(rows)}, indent=2)
        files.atomic_write(path, text + '\n')


def report(title: str, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints a table below its title and the device, and writes it to settings['json']."""
    settings = about(**settings)
    print(f'{title}, {settings["device"]}')
    show(rows)
    write(settings['json'], settings, rows)
