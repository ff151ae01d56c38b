"""Measures on a GPU everything that docs/performance.md has no figures of, within 20 minutes.

    pip install 'nfnets_jax[cuda]' torch timm
    python -m benchmarks.all_on_gpu --out=runs/gpu
    python -m benchmarks.all_on_gpu --out=runs/gpu --write

In this order, as far as the time goes: the training step of NFNet-F0, NFNet-F1 and NF-ResNet-50
beside timm under torch.compile, at batch 32 and at doubled batches as long as they are faster; the
runner's step, its augmentation and its evaluation at 256 px beside what preflight says; the
optimizers; the implementations of convolutions. --write puts the fastest of these into the table of
nfnets_jax/convolution.

DIR gets each benchmark's output, its table as JSON, and README.md with all tables and commands. A
benchmark that fails or takes too long says so there, and the next one starts. --quick runs every
command with tiny networks, on any device, to try it.
"""

import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import benchmarks
from benchmarks import timing
from experiments.launch import cli, command_help
from nfnets_jax import files

NETWORKS = {'NFNet-F0': 192, 'NFNet-F1': 224, 'NF-ResNet-50': 224}
ROWS = "--rows=ours,timm,'timm autocast','timm compiled'"
LARGEST_BATCH = 512
QUICK_NETWORKS = {'NF-ResNet-8': 32}
QUICK_RUNNER_STEP = (
    'runner_step --rows=2 --rounds=1 --set=model.width=0.25 --set=model.group_size=8 '
    "--set='model.depths=(1,1,1,1)' --set=data.image_size=32 --set=data.test_image_size=32"
)


@dataclasses.dataclass
class Result:
    """What became of one benchmark."""

    command: Sequence[str]
    seconds: float
    output: str
    error: str | None = None

    def text(self) -> str:
        """Returns its part of README.md."""
        end = f'{self.seconds:.0f} s' if self.error is None else self.error
        return f'```\n$ {shlex.join(self.command)}\n{self.output.strip()}\n```\n\n{end}\n'


def main(argv=None):
    parser = command_help.parser(__doc__)
    parser.add_argument(
        '--target', default='H100:1', help='as experiments.preflight takes it; default: H100:1'
    )
    parser.add_argument('--minutes', type=float, default=20.0, help='default: 20')
    path = timing.option_type(files.expand)
    parser.add_argument('--out', required=True, type=path, help='directory of the results')
    parser.add_argument('--quick', action='store_true', help='tiny networks, to try the commands')
    parser.add_argument('--write', action='store_true', help="write the convolutions' table")
    args = parser.parse_args(argv)
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    results: list[Result] = []

    def run(name: str, *arguments: str) -> Result:
        command = ['python', '-m', f'benchmarks.{arguments[0]}', *arguments[1:]]
        command += [f'--json={out / name}.json']
        print(shlex.join(command), flush=True)
        result = timed(command, end - time.monotonic())
        files.atomic_write(out / f'{name}.txt', result.output)
        results.append(result)
        print(result.text(), flush=True)
        about = shlex.join(sys.argv[1:] if argv is None else argv)
        title = f'# python -m benchmarks.all_on_gpu {about}\n\n'
        files.atomic_write(out / 'README.md', title + '\n'.join(x.text() for x in results))
        return result

    for name, arguments in train_steps(args.quick):
        run(name, *arguments)
        for batch in [] if args.quick else larger_batches(out, name):
            run(f'{name}-{batch}', *arguments, f'--batch={batch}')  # The last --batch counts.
    for name, arguments in others(args.quick, args.target, args.write):
        run(name, *arguments)
    if failed := [result for result in results if result.error]:
        sys.exit(f'{len(failed)} of {len(results)} benchmarks failed: see {out / "README.md"}')


def train_steps(quick: bool) -> Iterator[tuple[str, list[str]]]:
    """Yields (name, arguments) of the training steps beside timm."""
    options = '--batch=2 --rows=bare --rounds=1' if quick else f'--batch=32 --dtype=bfloat16 {ROWS}'
    for model, size in (QUICK_NETWORKS if quick else NETWORKS).items():
        command = f'train_step --model={model} --image-size={size} {options}'
        yield f'train_step-{model}', shlex.split(command)


def larger_batches(out: pathlib.Path, name: str) -> Iterator[int]:
    """Yields doubled batches to run next, as long as images a second grow by 2 %."""

    def measured(name: str) -> tuple[int, float]:  # batch and images a second, 0 if it failed
        file = out / f'{name}.json'
        table = json.loads(file.read_text()) if file.exists() else {'batch': 0, 'rows': []}
        return table['batch'], table['rows'][0]['images/s'] if table['rows'] else 0.0

    batch, speed = measured(name)
    while speed and (batch := 2 * batch) <= LARGEST_BATCH:
        yield batch
        before, (_, speed) = speed, measured(f'{name}-{batch}')
        if speed < 1.02 * before:
            return


def others(quick: bool, target: str, write: bool) -> Iterator[tuple[str, list[str]]]:
    """Yields (name, arguments) of the other benchmarks, in the order of their worth."""
    if quick:
        yield 'runner_step', shlex.split(QUICK_RUNNER_STEP)
        yield 'optimizer', ['optimizer', '--model=NF-ResNet-8', '--rounds=1']
        convolution = 'convolution --networks=NF-ResNet-8:16 --batch=2 --rounds=1 --seconds=0'
        yield 'convolution', shlex.split(convolution)
        return
    for model in ('NFNet-F0', 'NF-ResNet-50'):
        yield f'runner_step-{model}', ['runner_step', f'--model={model}', f'--target={target}']
    yield 'optimizer', ['optimizer']
    yield 'convolution', ['convolution', *(['--write'] if write else [])]


def timed(command: Sequence[str], seconds: float) -> Result:
    """Runs a command for so many seconds at most, with its output."""
    if seconds <= 0:
        return Result(command, 0.0, '', 'not run: the time was over')
    start = time.monotonic()
    # python -m benchmarks.NAME runs from any directory.
    path = [os.path.dirname(benchmarks.__path__[0]), os.environ.get('PYTHONPATH', '')]
    environment = os.environ | {
        # JAX and PyTorch share a device in one process.
        'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
        'PYTHONPATH': os.pathsep.join(filter(None, path)),
    }
    error = None
    try:
        done = subprocess.run(
            [sys.executable, *command[1:]],
            env=environment,
            timeout=seconds,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        output = done.stdout
        if done.returncode:
            error = f'failed with status {done.returncode}'
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout.decode(errors='replace') if expired.stdout else ''
        error = f'stopped after {seconds:.0f} s'
    return Result(command, time.monotonic() - start, output, error)


if __name__ == '__main__':
    with cli.guarded():
        main()
