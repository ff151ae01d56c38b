"""Trains for 20,000 steps, to see whether memory grows or steps become slower.

    python -m benchmarks.long_run --workdir=runs/long --out=docs/long_run.png
    python -m benchmarks.long_run --workdir=runs/short --out=runs/short.png --steps=2000

The steps of a narrow NF-ResNet-8 on 8x8 digits take milliseconds, so that the runner's own work on
steps, log lines, evaluations and checkpoints dominates. The figure shows images per second at each
line of the log, and the memory of the process (Linux).
"""

import pathlib
import threading
import time

import numpy as np
from absl import flags
from matplotlib.figure import Figure

from benchmarks import timing
from configs.digits import get_config
from experiments.launch import cli
from experiments.run import curves, metric_writers
from experiments.train import train
from nfnets_jax import files

_PAGE = 4096  # bytes, of /proc/self/statm


def run(directory: str, steps: int) -> tuple[list[dict], np.ndarray]:
    """Returns the lines of the log, and [n, 2]: seconds since the start, memory in MiB."""
    config = get_config()
    config.model = {'name': 'NF-ResNet-8', 'width': 0.5}
    config.data.image_size = 8
    config.augment.shift = 1
    config.duration, config.log_every = f'{steps} steps', '1%'
    config.eval.every = config.checkpoint.every = '5%'
    memory, ended, start = [], threading.Event(), time.monotonic()

    def watch():
        while not ended.wait(0.5):
            pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
            memory.append((time.monotonic() - start, pages * _PAGE / 2**20))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        train(config, directory)
    finally:
        ended.set()
        watcher.join()
    lines = [
        line for line in metric_writers.read_metrics(directory) if 'train/images_per_second' in line
    ]
    return lines, np.array(memory)


def draw(lines: list[dict], memory: np.ndarray) -> Figure:
    """Returns a figure of speed above memory."""
    figure = Figure(figsize=(8, 5), dpi=110, layout='constrained')
    speed, used = figure.subplots(2)
    speed.plot(
        [line['step'] for line in lines],
        [line['train/images_per_second'] for line in lines],
        '.-',
        color='#0072B2',
    )
    speed.set(xlabel='step', ylabel='images per second')
    used.plot(memory[:, 0], memory[:, 1], color='#D55E00')
    used.set(xlabel='seconds since the start', ylabel='memory, MiB')
    for axes in (speed, used):
        axes.set_ylim(bottom=0)
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    args = flags.FLAGS
    out = pathlib.Path(args.out)
    files.make_directory(out.parent)
    cli.check_out(out, curves.FIGURE_SUFFIXES)
    lines, memory = run(args.workdir, args.steps)
    curves.write_figure(out, draw(lines, memory))
    speed = np.array([line['train/images_per_second'] for line in lines])
    fifth = len(speed) // 5
    parts = {'first': (speed[:fifth], len(memory) // 5), 'last': (speed[-fifth:], -1)}
    timing.show(
        [
            {
                'fifth': name,
                'median images/s': float(np.median(part)),
                'MiB at its end': memory[i, 1],
            }
            for name, (part, i) in parts.items()
        ]
    )
    print(f'wrote {out}')


if __name__ == '__main__':
    cli.define_workdir('A new directory for the run.', required=True)
    cli.define_path('out', 'long_run.png', 'The figure to write.')
    flags.DEFINE_integer('steps', 20_000, 'Training steps.', lower_bound=500)
    cli.run(main)
