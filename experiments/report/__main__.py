"""Writes the results of studies as one HTML page that needs no network.

    python -m experiments.report --workdir=S --static=DIR
    python -m experiments.report --tables=DIR --out=PAGE

Each --workdir is the directory of an `experiments.study`, finished or not. The page, by default
report.html in the first of them, holds the question, the claims and their outcomes, interactive
figures, tables, and the commands and versions. Beside it, STUDY-trials.csv has a row for each trial
and STUDY-correct.npz the images that it classifies correctly. --static=DIR also writes these, PNG
images, a page for each study, and a README.md of one screen. --tables=DIR reads the studies from
there instead of their directories, all but the learning curves, and writes no tables again.
"""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import shlex
import sys
import tempfile
from collections.abc import Sequence

from absl import flags

from experiments.launch import cli
from experiments.report import page, reading, static, tables
from nfnets_jax import files
from nfnets_jax.errors import UsageError


def main() -> None:
    args = flags.FLAGS
    if bool(args.workdir) == bool(args.tables) or (args.tables and not args.out):
        raise UsageError('give --workdir, or else --tables and --out')
    with tempfile.TemporaryDirectory() as restored:
        _write(args, args.workdir or tables.restore_all(args.tables, restored))


def _write(args: flags.FlagValues, directories: Sequence[str | os.PathLike]) -> None:
    found = [reading.load(directory) for directory in directories]
    static.check_slugs(found)
    out = pathlib.Path(args.out or pathlib.Path(directories[0]) / 'report.html')
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
    if not args.tables:
        for study in found:
            tables.write(study, out.parent, f'{static.slug(study)}-')
    files.atomic_write(out, text)
    print(f'wrote {out} ({len(text) / 1e6:.1f} MB)')


if __name__ == '__main__':
    cli.define_paths('workdir', None, 'The directory of a study; may be repeated.')
    cli.define_path('tables', None, 'A directory that --static has written, to read instead.')
    cli.define_path('out', None, 'The page to write, else report.html in the first --workdir.')
    cli.define_path('static', None, 'A directory for PNG images and a README.md.')
    cli.run(main)
