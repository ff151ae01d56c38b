"""Writes the results of studies as one HTML page that needs no network.

    python -m experiments.report --workdir=S [--workdir=S2 ...] [--out=PAGE] [--static=DIR]

Each --workdir is the directory of an `experiments.study`, finished or not. The page, by default
report.html in the first of them, holds the question, the claims and their outcomes, interactive
figures, tables, and the commands and versions. --static=DIR also writes PNG images and a README.md.
"""

import datetime
import importlib.metadata
import pathlib
import platform
import shlex
import sys

from absl import flags

from experiments.launch import cli
from experiments.report import page, reading, static
from nfnets_jax import files
from nfnets_jax.errors import UsageError


def main() -> None:
    args = flags.FLAGS
    found = [reading.load(directory) for directory in args.workdir]
    out = pathlib.Path(args.out or pathlib.Path(args.workdir[0]) / 'report.html')
    if out.is_dir() or not out.parent.is_dir():
        raise UsageError(f'--out={out}: give a file, in a directory that exists')
    if args.static and pathlib.Path(args.static).is_file():
        raise UsageError(f'--static={args.static} is a file: give a directory')
    now = datetime.datetime.now(datetime.UTC)
    made = (
        f'{now:%Y-%m-%d %H:%M} UTC, Python {platform.python_version()}, '
        f'Plotly {importlib.metadata.version("plotly")}'
    )
    command = shlex.join(['python', '-m', 'experiments.report', *sys.argv[1:]])
    text = page.render(found, command=command, made=made)
    if args.static:  # First, because it can fail.
        written = static.write(found, args.static, made=made)
        print(f'wrote {len(written)} files into {args.static}')
    files.atomic_write(out, text)
    print(f'wrote {out} ({len(text) / 1e6:.1f} MB)')


if __name__ == '__main__':
    cli.define_paths(
        'workdir', None, 'The directory of a study; may be given more than once.', required=True
    )
    cli.define_path('out', None, 'The page to write, else report.html in the first --workdir.')
    cli.define_path('static', None, 'A directory for PNG images and a README.md.')
    cli.run(main)
