"""Every command that is printed in README.md, docs/, a docstring or a notebook works.

Each is run as a shell does, at a size that `SHRINK` makes tiny, in a directory that has the files
which the documents speak of; or it stands in `NOT_RUN`, with the reason. The fast ones belong to
`make test`, the others are marked slow.
"""

import ast
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from benchmarks import all_on_gpu
from tests import processes

ROOT = pathlib.Path(__file__).parents[1]

_PROGRAMS = (
    r'python3?|pip|make|tensorboard|optuna-dashboard|tfds|jupyter|wandb|gcloud|gsutil|kubectl|'
    r'docker|sbatch|scancel|srun|mpirun|torchrun|curl|wget|git|mount|nohup'
)
# What a command line begins with: a prompt, settings of the environment, a program.
_START = re.compile(rf'(?:\$ )?(?:cd \S+ && )?(?:\w+=\S+ )*(?:\S*/)?(?:{_PROGRAMS})\s+\S')


def commands_in_text(text: str) -> Iterator[str]:
    """Yields the command lines of Markdown or a docstring: in blocks of code and in backticks."""
    for fence, block in re.findall(r'^ *```(\w*)\n(.*?)^ *```', text, re.M | re.S):
        if fence not in ('python', 'py'):
            yield from commands_in_lines(block)
    prose = re.sub(r'^ *```.*?^ *```', '', text, flags=re.M | re.S)
    for code in re.findall(r'`([^`]+)`', prose):
        code = ' '.join(code.split())
        if _START.match(code):
            yield code
    yield from commands_in_lines(re.sub(r'`[^`]+`', '', prose))


def commands_in_lines(block: str) -> Iterator[str]:
    """Yields the command lines of a block.

    One goes on after a backslash, in quotes that are open, and with `[--option]`.
    """
    block = re.sub(r'\\\n\s*', '', block)
    block = re.sub(r'\n\s+(?=\[--)', ' ', block)
    block = re.sub(r"--command='[^']*'", lambda quoted: ' '.join(quoted[0].split()), block)
    for line in block.splitlines():
        line = line.strip().removeprefix('Run: ').removeprefix('$ ')
        if _START.match(line):
            yield line.partition(' # ')[0].strip()


def collect() -> dict[str, list[str]]:
    """Returns {command: the files that print it}."""
    found: dict[str, list[str]] = {}

    def add(path: pathlib.Path, text: str) -> None:
        for command in commands_in_text(text):
            places = found.setdefault(command, [])
            if (place := str(path.relative_to(ROOT))) not in places:
                places.append(place)

    for path in [ROOT / 'README.md', *sorted(ROOT.glob('docs/**/*.md'))]:
        add(path, path.read_text(encoding='utf-8'))
    for folder in ('configs', 'experiments', 'examples', 'benchmarks', 'nfnets_jax', 'docs'):
        for path in sorted(ROOT.glob(f'{folder}/**/*.py')):
            add(path, ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or '')
    for path in sorted(ROOT.glob('docs/**/*.ipynb')):
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            source = ''.join(cell['source'])
            if cell['cell_type'] == 'markdown':
                add(path, source)
            else:
                shell = re.findall(r'^[!%]\s*(.*)', source, re.M)
                add(path, '\n'.join(['```', *shell, '```']))
    return found


COMMANDS = collect()

# Regular expressions of commands that are not run, and why.
NOT_RUN = {
    r'docker build .*': 'needs a Docker daemon and the network',
    r'make (train|test|setup|docs)': 'sets up an environment from the network first',
    r'(\S*python -m )?pip install .*': 'needs the network',
    r'wandb (sweep|agent) .*': 'needs an account; test_sweeps.py runs the command of a run',
    r'gcloud .*|git clone .* /tmp/nfnets_jax': 'needs an account of Google Cloud',
    r'(srun|scancel) .*': 'needs SLURM',
    r'python -m experiments.train .*nfnet-0\.nfnet.*': 'needs Kubernetes',
    r'python -m experiments.report --tables=docs/results .*': 'test_published.py runs it',
    r'python docs/build_results.py': 'test_published.py has it',
    r'mount .*': 'needs the rights to mount',
    r'python -m experiments.(evaluate|train) .*--workdir=runs/imagenet .*': 'needs ImageNet',
    r'python -m experiments.evaluate .*--data=imagenet/val': 'needs ImageNet',
    r'python -m experiments.export .*\.onnx': 'needs jax2onnx; test_guide.py has it',
    r'python -m experiments.soup .*--workdir=.*': 'needs several checkpoints; test_soup.py has it',
    r'python -m experiments.train .*--workdir=/mnt/small/run': 'is for the full disk mounted there',
    r'\S+python -m pytest -m slow( tests/\S+)?': 'is this suite',
    r'python -m pytest tests/\S+|\S+python -m pytest tests/\S+': 'is part of this suite',
    r'python -m experiments.prepare_data .*': 'downloads; test_prepare_data.py has it',
    r'python -m benchmarks.input_pipeline .*=PATH/TO/PYTHON': 'needs TensorFlow',
    r'python -m benchmarks.convolution --write.*': 'is for a GPU, and changes the project',
    r'CUDA_VISIBLE_DEVICES=0 python -m experiments.study \.\.\.': 'is no whole command',
    r'python (-m experiments.train|experiments/train.py)': 'is no whole command',
    r'python -m (experiments.preflight|benchmarks.(augmentation_tpu|programs)).*': (
        'needs the compilers for TPUs and GPUs'
    ),
    r'optuna-dashboard .*': 'is a server, of a package that is not required',
    r'\S+tensorboard --logdir=runs': 'is a server',
}

_SHORT = (
    "--config.duration='3 steps' --config.log_every='1 steps' --config.eval.every='3 steps' "
    "--config.checkpoint.every='3 steps'"
)
_TINY_DIGITS = (
    f"{_SHORT} --config.batch_size=8 --config.model.widths='(8,)' --config.model.depths='(1,)' "
)
_TINY_IMAGES = (
    f'{_SHORT} --config.batch_size=4 --config.eval.batch_size=4 --config.data.image_size=16 '
    '--config.data.test_image_size=16'
)
_TINY_STUDY = (
    "--max_trials=1 --jobs=1 --config.base.duration='2 steps' --config.base.log_every='1 steps' "
    "--config.base.eval.every='2 steps' --config.base.checkpoint.every='2 steps'"
)
_TINY_MODEL = '--model=NF-ResNet-8 --image-size=16 --batch=2 --rounds=1'
# Regular expressions of commands that are run -> what makes them tiny, the last that is given of a
# flag counts; the first expression that matches decides.
SHRINK = {
    r'python -m experiments': '',
    r'python -m experiments.train --help': '',
    r'.*experiments.train .*configs/imagenet/.*': '--config.smoke=true',
    r'.*experiments.train .*name=plateau.*': (
        f"{_TINY_DIGITS} --config.optimizer.schedule.every='1 steps'"
    ),
    r'.*experiments.study .*name=plateau.*': (
        f"{_TINY_STUDY} --config.base.optimizer.schedule.every='1 steps'"
    ),
    r'.*experiments.train .*(configs/(digits|sweeps)|small.py).*': _TINY_DIGITS,
    r'.*experiments.train .*(finetune.py|pretrain.py).*': _TINY_IMAGES,
    r'.*experiments.study .*finetune.py:caltech101_small.*': (
        f"{_TINY_STUDY} --config.pretrain.duration='2 steps' "
        "--config.base.model.widths='(16,)' --config.pretrain.model.widths='(16,)' "
        "--config.base.model.depths='(1,)' --config.pretrain.model.depths='(1,)'"
    ),
    r'.*experiments.study .*finetune.py:caltech101 .*': (
        f'{_TINY_STUDY} --config.base.batch_size=4 --config.base.data.image_size=16 '
        "--config.base.model.widths='(16, 32)' --config.base.model.depths='(1, 1)' "
        '--config.base.model.group_size=8'
    ),
    r'.*experiments.study .*configs/studies/.*': _TINY_STUDY,
    r'.*experiments.signal_propagation .*': '--model=NF-ResNet-8 --against=ResNet-8 --size=16',
    r'.*experiments.lr_find .*configs/digits.py.*': (
        "--steps=10 --config.batch_size=8 --config.model.widths='(8,)' --config.model.depths='(1,)'"
    ),
    r'.*experiments.lr_find .*finetune.py.*': '--steps=10 --config.batch_size=4',
    r'.*experiments.(classify|embed|soup|evaluate|export)\b.*': '',
    r'.*experiments.(report|models|scaling|augment_gallery)\b.*': '',
    r'.*benchmarks.optimizer.*': '--model=NF-ResNet-8 --rounds=1',
    r'.*benchmarks.(train_step|inference).*': _TINY_MODEL,
    r'.*benchmarks.(sam|frozen).*': _TINY_MODEL,
    r'.*benchmarks.convolution.*': (
        '--networks=NF-ResNet-8:16 --batch=2 --rounds=1 --seconds=0.01 --dtype=float32'
    ),
    r'.*benchmarks.all_on_gpu.*': '--quick',
    r'.*benchmarks.runner_step.*': all_on_gpu.QUICK_RUNNER_STEP.removeprefix('runner_step '),
    r'.*benchmarks.dispatch.*': '--leaves=5 --rounds=1',
    r'.*benchmarks.compile_time.*': '--models=NF-ResNet-8 --image-size=16',
    r'.*benchmarks.input_pipeline.*': '--rounds=1 --batches=1',
    r'.*benchmarks.long_run.*': '--steps=500',
    r'.*python (-m examples\.\w+|examples/\w+\.py)': '',
    r'python docs/build_config.py': '',
}
# What the suite runs by default: one of each kind that takes seconds.
FAST = {
    r'\S+python -m experiments.train .*--config.seed=1 .*',
    r'\S+python -m experiments.evaluate --workdir=runs/d1',
    r'python -m experiments.export --workdir=runs/digits .*',
    r'python -m experiments.classify .*README.md',
    r'python -m experiments.train --config=configs/finetune.py:weights=runs/pretrained.*',
    r'python -m benchmarks.dispatch',
}
# The exit status of those that show what a mistake looks like.
STATUS = {r'.*experiments.classify .* README.md': 2}

_FILES = (
    'F0_haiku.npz',
    'test_nfnet',
    *(f'{x}.safetensors' for x in ('W', 'A', 'B', 'mine', 'caltech', 'cifar')),
)
_FOLDERS = ('PATH_TO_FOLDERS', 'caltech101', 'caltech25', 'cifar10', 'mine', 'IMAGE_OR_DIRECTORY')
_IMAGES = (
    *('test/Faces/image_0007.jpg', 'test/Motorbikes/image_0050.jpg', 'IMAGE'),
    *('pair0.png', 'pair1.png', 'photo.jpg'),
)


def matching(patterns, command: str) -> list[str]:
    return [pattern for pattern in patterns if re.fullmatch(pattern, command)]


def runnable(command: str) -> str:
    """Returns a printed command with the options in brackets given, and made tiny."""
    (rule, *_) = matching(SHRINK, command)
    tiny = SHRINK[rule]
    command = re.sub(r'\[--(tensorflow|write)[^]]*\]|\[[^]]*\.\.\.\]', '', command)
    command = re.sub(r'\[(--[^]]*)\]', r'\1', command).replace('...', '')
    if command.endswith('$k &'):  # One of two processes, in a loop over $k.
        command = command.removesuffix(' &').replace(':1234', ':$port')
        loop = f'for k in 0 1; do {command} {tiny} & both="$both $!"; done'
        return f'{loop}; for k in $both; do wait $k || exit; done'
    return f'{command} {tiny}'


def save_network(path: pathlib.Path, name: str, **options) -> None:
    import jax

    from nfnets_jax.weights import pretrained

    metadata = pretrained.Metadata(
        model=name,
        num_classes=3,
        options=options,
        train_size=16,
        test_size=16,
        class_names=('cat', 'dog', 'fox'),
    )
    params, state = pretrained.variable_shapes(metadata)
    rng = np.random.RandomState(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), params)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    pretrained.save_weights(path, pretrained.Weights(params, state, metadata))


def save_image(path: pathlib.Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, 'JPEG')


def as_words(command: str) -> list[str] | None:
    """Returns the words of a command of experiments if a shell would only start Python."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    if not re.match(r'(\.venv/bin/)?python (-m experiments|\w+\.py)', command):
        return None  # Commands of benchmarks, too, are started by a shell.
    if re.search(r'[~$*?]', command):
        return None
    return None if any(set(word) <= set('();<>|&') for word in words) else words


def shell(command: str, directory: pathlib.Path) -> subprocess.CompletedProcess:
    """Runs a command as a shell does; a simple one is a process that has done its imports."""
    environment = {
        **os.environ,
        'HOME': str(directory),
        'PATH': f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}',
        'PYTHONPATH': str(ROOT),
        # As the tests compile, but for one device, as most users have.
        'XLA_FLAGS': re.sub(r'(device_count)=\d+', r'\1=1', os.environ['XLA_FLAGS']),
    }
    if words := as_words(command):
        return processes.run(words[1:], cwd=directory, env=environment)
    with_port = "port=$(python -c \"import socket; s = socket.create_server(('', 0)); "
    with_port += 'print(s.getsockname()[1])")'
    return subprocess.run(
        ['bash', '-c', f'{with_port if "$port" in command else ":"}; {command}'],
        cwd=directory,
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.fixture(scope='session')
def materials(tmp_path_factory):
    """A directory with what the documents speak of, by its names there."""
    path = tmp_path_factory.mktemp('materials')
    for folder in ('configs', 'tests', 'examples', 'experiments', 'benchmarks'):
        (path / folder).symlink_to(ROOT / folder)
    (path / '.venv').symlink_to(sys.prefix)
    shutil.copy(ROOT / 'README.md', path)
    (path / 'docs').mkdir()
    shutil.copy(ROOT / 'docs' / 'build_config.py', path / 'docs')
    for name in _FILES:
        widths = {'widths': (16, 32), 'depths': (1, 1), 'group_size': 8}
        if name == 'F0_haiku.npz':
            save_network(path / 'F0', 'NFNet-F0', **widths)
        else:
            save_network(path / 'other', 'NF-ResNet-50', widths=(16, 32), depths=(1, 1))
        (path / ('F0' if name == 'F0_haiku.npz' else 'other')).rename(path / name)
    splits = [f'three_splits/{split}' for split in ('train', 'val', 'test')]
    for folder in (*_FOLDERS, *splits):
        for index, label in enumerate(('cat', 'dog', 'fox') * 8):
            save_image(path / folder / label / f'{index}.jpg', index)
    tagged = [f'mine/{label}/{i}.jpg,{label}|{"odd" if i % 2 else "even"}'
              for i, label in enumerate(('cat', 'dog', 'fox') * 8)]  # fmt: skip
    (path / 'tags.csv').write_text('\n'.join(['image,label', *tagged]))
    for index, name in enumerate(_IMAGES):
        save_image(path / name, index)
    for index in range(10):  # classes of configs/digits.py
        save_image(path / 'other' / str(index) / f'{index}.jpg', index)
    for index in range(4):
        save_image(path / 'DIR' / f'{index}.jpg', index)
    rng = np.random.RandomState(0)
    arrays = {
        f'{split}_{what}': rng.randint(0, high, (count, *shape)).astype(np.uint8)
        for split, count in (('train', 2048), ('test', 32))  # a batch of each size in the studies
        for what, high, shape in (('images', 256, (32, 32, 3)), ('labels', 10, ()))
    }
    for name in ('cifar10.npz', 'cifar10_fifth.npz', 'caltech101_32.npz'):
        np.savez(path / name, **arrays)
    text = (ROOT / 'docs' / 'fine_tuning.md').read_text(encoding='utf-8')
    blocks = re.findall(r'```python\n(.*?)```', text, re.S)
    for file, words in {
        'pretrain.py': ('def get_config(data', 'NF-ResNet-50'),
        'small.py': ('def get_config(data', 'digits'),
        'make_pairs.py': ("'pairs.npz'",),
        'make_bands.py': ("'bands.npz'",),
    }.items():
        (block,) = (block for block in blocks if all(word in block for word in words))
        (path / file).write_text(block)
    for script in ('make_pairs.py', 'make_bands.py'):
        done = shell(f'python {script}', path)
        assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope='session')
def a_run(materials):
    """The directory of a complete run."""
    train = f'python -m experiments.train --config=configs/digits.py --workdir=run {_TINY_DIGITS}'
    done = shell(train, materials)
    assert done.returncode == 0, done.stderr
    return materials / 'run'


@pytest.fixture(scope='session')
def a_validated_run(materials):
    done = shell(
        'python -m experiments.train --workdir=validated '
        f'--config=configs/finetune.py:weights=W.safetensors,data=three_splits {_TINY_IMAGES}',
        materials,
    )
    assert done.returncode == 0, done.stderr
    return materials / 'validated'


@pytest.fixture(scope='session')
def a_study(materials):
    done = shell(
        f'python -m experiments.study --config=configs/studies/sam.py:digits --workdir=study '
        f'{_TINY_STUDY}',
        materials,
    )
    assert done.returncode == 0, done.stderr
    return materials / 'study'


@pytest.fixture
def workplace(request, materials, tmp_path):
    """A function (command) -> a directory of its own that has what the command reads."""

    def prepare(command: str) -> pathlib.Path:
        reads_run = re.search(r'experiments.(evaluate|export|embed)', command)
        for file in materials.iterdir():
            if file.name not in ('run', 'validated', 'study', 'docs', 'DIR'):
                (tmp_path / file.name).symlink_to(file)
        if not reads_run:  # Which calls a run's directory so.
            folder = 'caltech101' if 'experiments.study' in command else 'DIR'
            (tmp_path / 'DIR').symlink_to(materials / folder)
        shutil.copytree(materials / 'docs', tmp_path / 'docs')
        (tmp_path / 'runs').mkdir()
        (tmp_path / 'runs' / 'cifar10.npz').symlink_to(materials / 'cifar10.npz')
        directories = re.findall(r'--workdir=(\S+)|--weights=(runs/\S+)', command)
        directories = [workdir or weights for workdir, weights in directories]
        if reads_run:
            of_files = re.search(r'validation|image_size', command)
            copied = 'a_validated_run' if of_files else 'a_run'
        elif 'experiments.report' in command:
            copied = 'a_study'
        else:
            copied, directories = 'a_run', re.findall(r'weights=(runs/[^\s,]+)', command)
        for directory in directories:
            shutil.copytree(request.getfixturevalue(copied), tmp_path / directory)
        return tmp_path

    return prepare


def test_the_collector_reads_what_is_there():
    text = r"""
Text with `python -m a --b=1` and `python
-m c`, `not python`, and `x = python`.

    python -m d [--x] \
        --y='1 2'
        [--z]

```
$ python -m e  # why
output of python -m f
X=1 .venv/bin/python -m g | head
gcloud ssh --command='
   cd h && python -m h'
```

```python
python -m no
```
"""
    assert list(commands_in_text(text)) == [
        'python -m e',
        'X=1 .venv/bin/python -m g | head',
        "gcloud ssh --command=' cd h && python -m h'",
        'python -m a --b=1',
        'python -m c',
        "python -m d [--x] --y='1 2' [--z]",
    ]
    assert len(COMMANDS) > 100
    places = {place for places in COMMANDS.values() for place in places}
    assert {'README.md', 'docs/studies.md', 'configs/finetune.py', 'benchmarks/sam.py'} < places
    assert any(place.endswith('.ipynb') for place in places)


def test_every_command_is_run_or_listed_and_every_rule_is_of_use():
    for command, places in COMMANDS.items():
        listed, run = matching(NOT_RUN, command), matching(SHRINK, command)
        assert listed or run, f'{command} ({places}): neither run nor listed'
        assert len(listed) <= 1, f'{command}: listed twice'
    used = {pattern for command in COMMANDS for pattern in matching(NOT_RUN, command)}
    assert used == set(NOT_RUN), 'matches no printed command'
    to_run = [command for command in COMMANDS if not matching(NOT_RUN, command)]
    for rules in (SHRINK, FAST, STATUS):
        used = {pattern for command in to_run for pattern in matching(rules, command)}
        assert used == set(rules), 'matches no printed command'


# Parses the command lines on the standard input, a JSON list of lists; prints what each gets wrong.
PARSER = """
import argparse, contextlib, io, json, runpy, sys, warnings
from absl import flags
from experiments.launch import cli

class Parsed(BaseException):
    pass

def run(main, *, positional=False, distributed=False, **_):
    if distributed:
        cli._define_distributed_flags()
    flags.FLAGS(cli._parse(sys.argv))
    raise Parsed

def parse_args(parser, *arguments):
    original(parser, *arguments)
    raise Parsed

original, argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_args, parse_args
cli.run, cli.guarded = run, contextlib.nullcontext
warnings.simplefilter('ignore')
wrong = []
for module, *arguments in json.load(sys.stdin):
    before = set(flags.FLAGS)
    flags.FLAGS.unparse_flags()
    sys.argv = [module, *arguments]
    if module in sys.modules and not hasattr(sys.modules[module], '__path__'):
        del sys.modules[module]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            runpy.run_module(module, run_name='__main__')
        said.write('it parses nothing')
    except Parsed:
        said = io.StringIO()
    except SystemExit:
        pass
    wrong.append(said.getvalue())
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)
print(json.dumps(wrong))
"""


def test_the_flags_of_every_command_are_known(workplace):
    """In one process: it takes seconds, where running all takes minutes."""
    commands = {}
    for command in COMMANDS:
        if not matching(NOT_RUN, command) and re.search(
            r'-m (experiments|benchmarks)\.(?!.*--help)', command
        ):
            words = shlex.split(runnable(command).replace('$k', '0').replace('$port', '1'))
            words = words[words.index('-m') + 1 :]
            commands[command] = words[: words.index('&')] if '&' in words else words
    process = processes.start(
        ['-c', PARSER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=workplace('weights=runs/pretrained weights=runs/head weights=runs/cifar'),
    )
    out, err = process.communicate(json.dumps(list(commands.values())))
    assert process.returncode == 0, err
    wrong = dict(zip(commands, json.loads(out.splitlines()[-1]), strict=True))
    assert {command: said for command, said in wrong.items() if said} == {}


@pytest.mark.parametrize(
    'command',
    [
        pytest.param(command, id=command, marks=() if matching(FAST, command) else pytest.mark.slow)
        for command in COMMANDS
        if not matching(NOT_RUN, command) and matching(SHRINK, command)
    ],
)
def test_it_works(command, workplace):
    directory = workplace(command)
    done = shell(runnable(command), directory)
    said = f'{COMMANDS[command]}: {runnable(command)}\n{done.stdout}\n{done.stderr}'
    expected = next(iter(STATUS[pattern] for pattern in matching(STATUS, command)), 0)
    assert done.returncode == expected, said
    assert 'Traceback' not in done.stderr, said
