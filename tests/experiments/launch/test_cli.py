import ast
import errno
import os
import pathlib
import runpy
import sys
import warnings

import pytest
from absl import flags

from experiments.config import default_config, unknown_key
from experiments.launch import cli
from nfnets_jax.errors import UsageError
from tests import processes

ROOT = pathlib.Path(__file__).parents[3]

PROGRAM = """
from absl import flags
from ml_collections import config_flags
from experiments.launch import cli
from nfnets_jax.errors import UsageError
config = config_flags.DEFINE_config_file('config', None, 'The config.', lock_config=True)
flags.mark_flag_as_required('config')
def main():
    if config.value.n < 0:
        raise UsageError('config.n=-1: must not be negative')
    print(config.value.n, config.value.inner.x)
cli.run(main)
"""

OPTIONS = """
from ml_collections import ConfigDict
def get_config():
    base = {'model': {'name': 'NF-ResNet-8', 'width': 0.5}, 'data': {'name': 'digits'}}
    return ConfigDict({'n': 0, 'inner': {'x': 0}} | base)
"""

CONFIG = """
import ml_collections
def get_config(arg=''):
    config = ml_collections.ConfigDict({'n': 3, 'inner': {'x': 0.5, 'flag': True}})
    if arg == 'locked':
        config.lock().m = 1
    if arg == 'raises':
        1 / 0
    return config
"""

WHOLE = """
from experiments.config import default_config
def get_config():
    return default_config()
"""


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp('cli')
    (path / 'program.py').write_text(PROGRAM)
    (path / 'good.py').write_text(CONFIG)
    (path / 'options.py').write_text(OPTIONS)
    (path / 'options_program.py').write_text(
        PROGRAM.replace(
            'print(config.value.n, config.value.inner.x)',
            'print([config.value.model.to_dict(), config.value.data.to_dict()])',
        )
    )
    (path / 'whole.py').write_text(WHOLE)
    (path / 'syntax.py').write_text('def get_config(:\n')
    (path / 'empty.py').write_text('x = 1\n')
    (path / 'plain.py').write_text(CONFIG.replace("arg=''", '').replace('arg', "''"))
    return path


def run(directory, *arguments, program='program.py', **environment):
    return processes.run(
        [program, *arguments],
        cwd=directory,
        env={**os.environ, 'PYTHONPATH': str(ROOT), **environment},
    )


def test_overrides_reach_the_config(directory):
    done = run(directory, '--config=good.py', '--config.n=5', '--config.inner.x=1')
    assert (done.returncode, done.stdout, done.stderr) == (0, '5 1.0\n', '')


def test_options_that_the_file_does_not_name_can_be_set_one_by_one(directory):
    flags = ('--config.model.use_se=false', '--config.model.remat=true')
    options = ('--config.model.alpha=0.3', '--config.data.classes=(1,2)', *flags)
    arguments = ('--config=options.py', *options, '--config.model.width=2')
    done = run(directory, *arguments, program='options_program.py')
    assert done.stderr == ''
    assert ast.literal_eval(done.stdout) == [
        {'name': 'NF-ResNet-8', 'width': 2.0, 'alpha': 0.3, 'use_se': False, 'remat': True},
        {'name': 'digits', 'classes': (1, 2)},
    ]

    renamed = ('--config.model.name=NFNet-F0', '--config.model.expansion=0.25')
    done = run(directory, '--config=options.py', *renamed, program='options_program.py')
    assert "'expansion': 0.25" in done.stdout
    assert "'NFNet-F0'" in done.stdout

    done = run(directory, '--config=options.py', '--config.model.alhpa=1')
    assert "unknown key config.model.alhpa (did you mean 'model.alpha'?)" in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            ['--config=good.py', '--config.innr.x=1'],
            "unknown key config.innr.x (did you mean 'inner.x'?)",
        ),
        (['--config=good.py', '--config.inner.y=1'], 'unknown key config.inner.y'),
        (['--config=good.py', '--config.n=many'], 'flag --config.n=many: invalid literal'),
        (['--config=good.py', '--config.n=1.5'], 'flag --config.n=1.5: invalid literal'),
        (['--config=good.py', '--config.inner.flag=maybe'], 'flag --config.inner.flag=maybe'),
        (['--config=good.py', '--config.inner=1'], 'flag --config.inner=1'),
        (['--config=good.py', '--config.n=-1'], 'config.n=-1: must not be negative'),
        (['--config=good.py', 'surplus'], "unexpected argument 'surplus'"),
        (['--config=good.py', '--confg=x'], "Unknown command line flag 'confg'"),
        (['--config', 'absent.py'], 'there is no file absent.py'),
        (['--config=good.py', '-config.m=1'], 'unknown key config.m'),
        (['--config=good.py', '--noconfig.inner.flags'], 'unknown key config.inner.flags'),
        ([], '--config is missing'),
        (['--config=absent.py'], 'there is no file absent.py'),
        (['--config=syntax.py'], 'syntax.py:1: SyntaxError'),
        (['--config=empty.py'], 'defines no function get_config()'),
        (['--config=plain.py:x'], 'get_config() of plain.py takes no argument'),
        (['--config=good.py:locked'], 'good.py:6: AttributeError'),
        (['--config=good.py:raises'], 'good.py:8: ZeroDivisionError: division by zero'),
        (
            ['--config=whole.py', '--config.batch_size=2.5'],
            'config.batch_size=2.5: must be an integer of at least 1\n',
        ),
        (
            ['--config=whole.py', '--config.optimizer.clip.clipping=a: b'],
            'config.optimizer.clip.clipping=a: b: must be a number above 0\n',
        ),
        (['--config=whole.py', '--noconfig.augment.flip=1'], '=1 does not take an argument'),
        (['--config=whole.py', '--config.augment.flip=maybe'], 'must be True or False\n'),
        (['--config=whole.py', '--config.sam=8'], 'config.sam=8: must be a mapping of fields: '),
    ],
)
def test_a_mistake_is_one_line_and_status_2(directory, arguments, message):
    done = run(directory, *arguments)
    assert message in done.stderr
    assert done.stderr.startswith('error: ')
    assert done.stderr.count('\n') == 1
    assert done.returncode == 2
    assert done.stdout == ''


@pytest.mark.parametrize('flag', ['--config=configs/digits.py', '--config.batch_size=2'])
@pytest.mark.parametrize('command', ['augment_gallery', 'classify', 'evaluate', 'report'])
def test_a_config_is_an_unknown_flag_where_a_command_takes_none(command, flag):
    done = processes.run(['-m', f'experiments.{command}', flag], cwd=ROOT)
    unknown = flag.removeprefix('--').partition('=')[0]
    assert done.stderr.startswith(f"error: Unknown command line flag '{unknown}'")
    assert (done.returncode, done.stderr.count('\n'), done.stdout) == (2, 1, '')


def test_a_config_file_is_run_once(directory, tmp_path):
    (tmp_path / 'counting.py').write_text(
        f'open({str(tmp_path / "runs")!r}, "a").write("x")\n{CONFIG}'
    )
    done = run(directory, f'--config={tmp_path}/counting.py:x', '--config.n=5')
    assert (done.returncode, done.stdout, done.stderr) == (0, '5 0.5\n', '')
    assert (tmp_path / 'runs').read_text() == 'x'


@pytest.mark.parametrize(
    ('key', 'message'),
    [
        ('lr', " (did you mean 'optimizer.learning_rate'?)"),
        ('optimizer.lr', " (did you mean 'optimizer.learning_rate'?)"),
        ('epochs', " (did you mean 'duration'?)"),
        ('data.resolution', " (did you mean 'data.image_size'?)"),
        ('num_workers', ': images are read by one thread for each core'),
        ('data.workers', ': images are read by one thread for each core'),
        ('output_dir', ': give --workdir=DIRECTORY'),
        ('gpus', ': all devices of the machine are used'),
    ],
)
def test_what_other_trainers_call_a_key_is_answered(key, message):
    config = default_config()
    known = cli._keys(config) + cli._options_of(config)
    assert str(unknown_key(key, known)) == f'unknown key config.{key}{message}'


# JAX reads the variable of one of them as it starts, which takes a second; the others set the same.
@pytest.mark.parametrize('platform', ['cuda', 'tpu', 'rocm', 'nonsense'])
def test_a_device_that_is_not_there_is_one_line(platform, tmp_path, monkeypatch):
    program = tmp_path / 'program.py'
    platforms = None if platform == 'cuda' else f'jax.config.update("jax_platforms", {platform!r})'
    program.write_text(
        f'import jax\n{platforms}\n'
        'from experiments.launch import cli\ncli.run(lambda: jax.devices())'
    )
    if platform == 'cuda':
        monkeypatch.setenv('JAX_PLATFORMS', platform)
    done = run(tmp_path, program=program)
    assert done.stderr.startswith(f'error: JAX_PLATFORMS={platform}: JAX finds cpu here')
    assert done.stderr.endswith(
        f'; set JAX_PLATFORMS=cpu, or install the driver and the JAX for {platform}\n'
    )
    assert (done.returncode, done.stderr.count('\n'), done.stdout) == (2, 1, '')


FOR_CUDA = """
import runpy, sys
import jax
jax.config.update('jax_platforms', 'cuda')
command = f'experiments.{sys.argv.pop(1)}'
sys.modules.pop(command, None)
runpy.run_module(command, run_name='__main__', alter_sys=True)
"""


def test_a_device_that_is_not_there_is_told_before_anything_is_written(tmp_path):
    for command, config in [('train', 'digits.py'), ('study', 'studies/sam.py:digits')]:
        done = processes.run(
            ['-c', FOR_CUDA, command, f'--config=configs/{config}']
            + [f'--workdir={tmp_path / command}'],
            cwd=ROOT,
        )
        assert done.stderr.startswith('error: JAX_PLATFORMS=cuda: JAX finds cpu here')
        assert (done.returncode, done.stderr.count('\n')) == (2, 1)
    assert list(tmp_path.iterdir()) == []


def flags_of(module, monkeypatch):
    """Returns {name: flag}, what a command defines when it is run."""
    before = set(flags.FLAGS)
    monkeypatch.setattr(cli, 'run', lambda *args, **kwargs: None)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)  # It has been imported before.
        runpy.run_module(module, run_name='__main__')
    new = {name: flags.FLAGS[name] for name in flags.FLAGS if name not in before}
    own = {flag.name for flag in flags.FLAGS.flags_by_module_dict()[sys.argv[0]]}
    for name in new:
        delattr(flags.FLAGS, name)
    return {name: flag for name, flag in new.items() if name in own}


COMMANDS = [
    '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__main__')
    for path in sorted([*ROOT.glob('experiments/**/*.py'), *ROOT.glob('benchmarks/*.py')])
    if 'cli.run(' in path.read_text() and path.name != 'cli.py'
]
# Flags with text as their value that is no path.
NO_PATHS = {
    'checkpoint',
    'checkpoints',
    'model',
    'eval_mode',
    'dataset',
    'label_column',
    'models',
    'devices',
    'against',
}


@pytest.mark.parametrize('command', COMMANDS)
def test_every_flag_for_a_path_takes_one_as_a_shell_would(command, monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    for name, flag in flags_of(command, monkeypatch).items():
        if isinstance(flag.parser, cli.PathParser):
            assert flag.parser.parse('~/a b/c/') == f'{tmp_path}/a b/c/'
            assert flag.parser.parse('a/~/../c') == 'a/~/../c'
            for wrong in ('', 'gs://bucket/run', '~nobody-of-this-name/run'):
                with pytest.raises(ValueError, match=r'must|no user'):
                    flag.parser.parse(wrong)
        elif type(flag.parser) is flags.ArgumentParser:
            assert name in NO_PATHS, f'is --{name} a path? then cli.define_path'


def test_paths_of_benchmarks_are_taken_so_too():
    for path in ROOT.glob('benchmarks/*.py'):
        for line in path.read_text().splitlines():
            if any(f"'--{name}'" in line for name in ('json', 'tensorflow', 'images', 'out')):
                assert 'type=' in line or 'define_path' in line, f'{path.name}: {line}'


def test_home_directories_in_the_config(directory, tmp_path):
    environment = {'HOME': str(directory)}
    for arguments in (['--config=~/good.py', '--config.n=5'], ['--config', '~/good.py']):
        done = run(tmp_path, *arguments, program=directory / 'program.py', **environment)
        assert (done.returncode, done.stderr) == (0, '')
    done = run(directory, '--config=~nobody-of-this-name/good.py')
    assert "there is no user 'nobody-of-this-name'" in done.stderr
    assert (done.returncode, done.stderr.count('\n')) == (2, 1)


@pytest.mark.slow  # The path alone is above, in every command.
def test_a_run_in_the_home_directory(command, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    process = command('train', '--workdir=~/run')
    err = process.communicate()[1]
    assert 'step 6' in err, err
    assert process.returncode == 0
    assert (tmp_path / 'run' / 'summary.json').exists()
    assert not (ROOT / '~').exists()


def test_a_workdir_that_orbax_cannot_write_is_refused(tmp_path):
    name = os.fsdecode(b'run\xff')
    done = processes.run(
        ['-m', 'experiments.train', '--config=configs/digits.py', f'--workdir={tmp_path / name}'],
        cwd=ROOT,
        text=False,
    )
    assert done.returncode == 2
    assert b'must be valid UTF-8' in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('error', 'line'),
    [
        (PermissionError(errno.EACCES, 'Permission denied', 'a b'), 'a b: Permission denied'),
        (OSError(errno.ENAMETOOLONG, 'File name too long', 'a'), 'a: File name too long'),
        (OSError(errno.ENOSPC, 'No space left on device'), 'the file system: No space left on'),
        (FileNotFoundError(errno.ENOENT, 'No such file or directory', 'a'), None),
    ],
)
def test_what_a_file_system_refuses_is_one_line(error, line, capfd):
    # A file that is not there may be a mistake of ours, whose place a stack trace shows.
    with pytest.raises(SystemExit if line else FileNotFoundError), cli.guarded():
        raise error
    err = capfd.readouterr().err
    assert err.startswith(f'error: {line}' if line else '')
    assert err.count('\n') == bool(line)


@pytest.mark.parametrize(
    ('name', 'problem'),
    [
        ('out.pgn', r"unknown suffix \(did you mean '\.png'\?\)"),
        ('absent/out.png', 'there is no directory'),
        ('directory.png', 'cannot be written'),
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_the_work(name, problem, tmp_path):
    (tmp_path / 'directory.png').mkdir()
    with pytest.raises(UsageError, match=f'^--out=.*{name}: {problem}'):
        cli.check_out(tmp_path / name, ('.png', '.pdf'))
    cli.check_out(tmp_path / 'out.png', ('.png', '.pdf'))
    cli.check_out(tmp_path / 'out.any')
    with pytest.raises(UsageError, match='^--json=.*: there is no directory'):
        cli.check_out(tmp_path / 'absent' / 'out', flag='json')
