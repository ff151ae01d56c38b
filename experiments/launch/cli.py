"""Shared by all commands: flags, text output, and a user's mistake as one line.

Exit status: 0 done (or stopped on request, to be continued), 1 the training diverged,
2 something in the command line, the config or a file is not right, 3 another process has died,
130 interrupted (Ctrl-C), where that is not how training is asked to stop, 141 nobody reads the
output any more.
"""

import ast
import contextlib
import errno
import functools
import inspect
import math
import os
import pathlib
import re
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from experiments.launch import command_help, config_help, output
from experiments.launch.distributed import INTERRUPTED, Options, session
from nfnets_jax import extras, files
from nfnets_jax.errors import UsageError, first_line, nearest
from nfnets_jax.fields import Option
from nfnets_jax.image_size import ImageSize, parse

# What a file system says of a path or a disk; other errors of files may be ours.
_REFUSALS = frozenset(
    (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EROFS)
    + (errno.ENOSPC, errno.EDQUOT, errno.EIO)
)

flags.disclaim_key_flags()  # What is defined here are the flags, in --help, of who calls.


def run(
    main: Callable[..., None],
    *,
    positional: bool = False,
    distributed: bool = False,
    declared: Callable[[ConfigDict], Mapping[str, Option]] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Parses the command line and calls `main`, which reads `flags.FLAGS`.

    Args:
      main: the command.
      positional: whether it takes what is on the command line besides flags, a list of strings.
      distributed: whether several processes may run it together.
      declared: returns the options that a config of --config may have, for --help; None: those of
        `experiments.config`.
      groups: title -> names of flags, for --help.
    """
    groups = dict(groups or {})
    if distributed:
        _define_distributed_flags()
        groups['processes, unless the cluster says it'] = Options._fields
    module = sys.modules[main.__module__]

    def describe() -> str:
        doc = sys.modules['__main__'].__doc__ or ''
        return command_help.describe(doc, flags.FLAGS.get_key_flags_for_module(module), groups)

    def call_main(argv: Sequence[str]) -> None:
        if len(argv) > 1 and not positional:
            _fail(f'unexpected argument {argv[1]!r}: flags are written --name=value')
        logging.set_verbosity(logging.ERROR)  # Libraries narrate their work; we say what matters.
        warnings.filterwarnings('ignore', module='PIL')
        with session(_distributed_options()) if distributed else contextlib.nullcontext():
            main(argv[1:]) if positional else main()

    with guarded():
        parse = functools.partial(_parse, declared=declared, describe=describe)
        app.run(call_main, flags_parser=parse)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Ends a command as users expect it: any text can be printed, and a mistake is one line.

    For `run`, and for programs that parse their command line in another way.
    """
    with output.session():
        try:
            yield
        except UsageError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            print('interrupted', file=sys.stderr)
            sys.exit(INTERRUPTED)
        except Exception as error:
            if isinstance(error, ImportError) and (line := extras.how_to_install(error.name)):
                _fail(line)
            if isinstance(error, OSError) and error.errno in _REFUSALS:
                _fail(f'{error.filename or "the file system"}: {error.strerror}')
            if problem := _missing_devices():
                _fail(problem)
            raise


def _missing_devices() -> str | None:
    """Says why JAX cannot use the devices that the environment asks for; None if it can."""
    asked = jax.config.jax_platforms  # type: ignore[attr-defined]  # JAX adds it
    try:
        jax.devices()
        return None
    except Exception as error:  # A RuntimeError, or an AssertionError where no GPU is visible.
        reason = re.sub(
            r"^Unable to initialize backend '\w+': | \(set JAX_.*", '', first_line(error)
        )
    jax.config.update('jax_platforms', '')
    try:
        here = ','.join(sorted({device.platform for device in jax.devices()}))
    except Exception:
        here = ''
    found = f'JAX finds {here} here' if here else 'JAX finds no device here'
    reason = '' if reason == 'AssertionError' else f' ({reason})'
    todo = (
        f'set JAX_PLATFORMS={here}, or install the driver and the JAX for {asked}'
        if asked
        else 'set JAX_PLATFORMS=cpu to compute on the CPU'
    )
    return f'JAX_PLATFORMS={asked or ""}: {found}{reason}; {todo}'


class PathParser(flags.ArgumentParser):
    """Parses a path of the local file system, which may begin with ~."""

    syntactic_help = 'a path'
    metavar = 'PATH'

    def parse(self, argument: str) -> str:
        if not argument:
            raise ValueError('a path must not be empty')
        if '://' in argument:
            raise ValueError('must be a path of the file system; mount the bucket')
        return files.expand(argument)


class WorkdirParser(PathParser):
    """Parses the path of a directory that will hold checkpoints."""

    def parse(self, argument: str) -> str:
        path = super().parse(argument)
        try:
            path.encode()
        except UnicodeEncodeError:
            raise ValueError('must be valid UTF-8, as Orbax needs it') from None
        return path


class ImageSizeParser(flags.ArgumentParser):
    """Parses the size of images: '224', or '128x300', height and width."""

    syntactic_help = 'pixels of a side, or of height and width: 224, 128x300'
    metavar = 'N|HxW'

    def parse(self, argument: str) -> ImageSize:
        return parse(argument)


def define_workdir(help: str, **options: Any) -> flags.FlagHolder:
    """Defines --workdir; options as `flags.DEFINE` takes them."""
    return flags.DEFINE(WorkdirParser(), 'workdir', None, help, **options)


def define_path(name: str, default: str | None, help: str, **options: Any) -> flags.FlagHolder:
    """Defines a flag for a file or a directory; options as `flags.DEFINE` takes them."""
    return flags.DEFINE(PathParser(), name, default, help, **options)


def define_paths(name: str, default: str | None, help: str, **options: Any) -> flags.FlagHolder:
    """Defines a flag for a file or a directory that may be given several times."""
    return flags.DEFINE_multi(
        PathParser(), flags.ArgumentSerializer(), name, default, help, **options
    )


def define_image_size(name: str, help: str) -> flags.FlagHolder:
    """Defines a flag for the size of images, None by default."""
    return flags.DEFINE(ImageSizeParser(), name, None, help)


def check_out(out: pathlib.Path, suffixes: Collection[str] = (), flag: str = 'out') -> None:
    """Raises a UsageError if a file cannot be written.

    Args:
      out: the file.
      suffixes: the allowed ones; () allows any.
      flag: that names the file.
    """
    if suffixes and out.suffix not in suffixes:
        raise UsageError(f'--{flag}={out}: unknown suffix{nearest(out.suffix, suffixes)}')
    if not os.path.isdir(out.parent):
        raise UsageError(f'--{flag}={out}: there is no directory {out.parent}')
    if os.path.isdir(out) or not os.access(out.parent, os.W_OK):
        raise UsageError(f'--{flag}={out}: cannot be written')


def _define_distributed_flags() -> None:
    flags.DEFINE_string('coordinator', None, 'host:port of process 0.')
    flags.DEFINE_integer('num_processes', None, 'How many processes there are.')
    flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.')
    flags.DEFINE_float('start_timeout', 300.0, 'Seconds in which all must meet.', lower_bound=1.0)
    flags.DEFINE_float(
        'peer_timeout', 60.0, 'Seconds until a silent one counts as dead.', lower_bound=1.0
    )


def _distributed_options() -> Options:
    values: dict[str, Any] = {name: flags.FLAGS[name].value for name in Options._fields}
    return Options(**values)


def _parse(
    argv: Sequence[str],
    *,
    declared: Callable[[ConfigDict], Mapping[str, Option]] | None = None,
    describe: Callable[[], str] = str,
) -> list[str]:
    loaded: _Loaded | None = None
    try:
        argv = _expand_config(argv)
        for argument, following in zip(argv[1:], [*argv[2:], ''], strict=False):
            name, equals, value = argument.partition('=')
            if name in ('-config', '--config') and 'config' in flags.FLAGS:
                given = value if equals else following
                flags.FLAGS['config'].parser = loaded = _Loaded(given)
                argv = _set_options(loaded.config, argv)
                _check_overrides(loaded.config, argv)
        if command_help.asked_for(argv):
            print(describe(), end='')
            if loaded:
                _describe_config(loaded, declared)
            sys.exit()
        sys.argv[:] = argv  # where the flags of a config look for each other
        positional = flags.FLAGS(argv)
        for name, value in flags.FLAGS.flag_values_dict().items():
            # The schema checks the fields of a config, whose flags have dots.
            if isinstance(value, float) and not math.isfinite(value) and '.' not in name:
                raise UsageError(f'--{name}={value}: must be a finite number')
        return positional
    except UsageError as error:
        _fail(str(error))
    except (flags.Error, TypeError, ValueError) as error:  # The value of some flag.
        missing = re.search(r'Flag (--\w+) must have a value other than None', str(error))
        _fail(
            (missing and f'{missing[1]} is missing: see --help')
            or (loaded and _of_a_field(error, argv, _declared(loaded.config, declared)))
            or _one_line(error)
        )
    except SystemExit as ending:
        sys.exit(0 if ending.code == 1 else ending.code)  # absl ends --helpfull with 1.


def _expand_config(argv: Sequence[str]) -> list[str]:
    """Returns the arguments with ~ replaced in --config=~/x.py and --config ~/x.py."""
    expanded = list(argv)
    for i, argument in enumerate(expanded):
        name, equals, path = argument.partition('=')
        if name in ('-config', '--config') and path:
            expanded[i] = f'{name}={files.expand(path)}'
        elif i and not equals and expanded[i - 1] in ('-config', '--config'):
            expanded[i] = files.expand(argument)
    return expanded


class _Loaded(flags.ArgumentParser):
    """Runs a config file, and gives the flag its config, so that the file is run only once.

    Attributes:
      given: 'path' or 'path:variant'.
      config: what the file returns.
      variants: the `VARIANTS` that the file declares, if any.
    """

    def __init__(self, given: str):
        self.given = given
        self.config, self.variants = _load(given)

    def parse(self, argument: str) -> ConfigDict:
        return (self.config if argument == self.given else _load(argument)[0]).lock()


def _load(config: str) -> tuple[ConfigDict, Sequence[str]]:
    """Runs a config file, given as 'path' or 'path:variant'; returns its config and variants."""
    path, colon, argument = config.partition(':')
    if not os.path.isfile(path):
        raise UsageError(f'--config={config}: there is no file {path}')
    try:
        module = runpy.run_path(path)
        get_config = module.get('get_config')
        if get_config is None:
            raise UsageError(f'--config={path} defines no function get_config()')
        if colon and not inspect.signature(get_config).parameters:
            raise UsageError(f'--config={config}: get_config() of {path} takes no argument')
        loaded = get_config(argument) if colon else get_config()
        if not isinstance(loaded, ConfigDict):
            raise UsageError(
                f'--config={path}: get_config() must return a ConfigDict, not '
                f'{type(loaded).__name__}'
            )
        return loaded, module.get('VARIANTS', ())
    except UsageError as error:
        raise UsageError(
            f'--config={config}: {error}' if str(error)[:2] != '--' else str(error)
        ) from None
    except Exception as error:
        raise UsageError(
            f'{_place(path, error)}: {type(error).__name__}: {_one_line(error)}'
        ) from error


def _describe_config(
    loaded: _Loaded, declared: Callable[[ConfigDict], Mapping[str, Option]] | None
) -> None:
    known = _declared(loaded.config, declared)
    path = loaded.given.partition(':')[0]
    print(*config_help.describe(path, loaded.variants, known, loaded.config), sep='\n')


def _declared(
    config: ConfigDict, declared: Callable[[ConfigDict], Mapping[str, Option]] | None
) -> Mapping[str, Option]:
    from experiments.config import declared as declared_config  # here: a slow import

    return (declared or declared_config)(config)


def _of_a_field(error: Exception, argv: Sequence[str], known: Mapping[str, Option]) -> str:
    """Says what the field must be whose value absl cannot parse; '' if no field is the reason."""
    for argument in (argument.lstrip('-') for argument in argv):
        name, _, value = argument.partition('=')
        if str(error).startswith(f'flag --{argument}: '):
            option, inner = None, known
            for key in name.split('.')[1:]:
                option = inner.get(key)
                inner = (option.inner if option else None) or {}
            return f'{name}={value}: must be {option.wants}' if option else ''
    return ''


def _set_options(config: ConfigDict, argv: Sequence[str]) -> list[str]:
    """Sets the options of a model or data source that the config file does not name.

    Also those that it names as an integer, and the command line as a tuple, or the other way round:
    ml_collections keeps the type. Returns the other arguments, each a flag of its own.
    """
    rest: list[str] = []
    for argument in argv:
        pattern = r'--?config\.((?:\w+\.)*(model|data))\.(\w+)=(.*)'
        if match := re.fullmatch(pattern, argument, re.DOTALL):
            path, kind, option, text = match.groups()
            node = _node(config, path)
            name = _last_value(argv, f'config.{path}.name') or (node or {}).get('name')
            value = _literal(text)
            is_own = node is not None and (
                option not in node or {type(node[option]), type(value)} == {int, tuple}
            )
            if node is not None and is_own and option in _options(kind, name):
                with node.unlocked(), node.ignore_type():
                    node[option] = value
                continue
        rest.append(argument)
    return rest


def _node(config: ConfigDict, path: str) -> ConfigDict | None:
    for part in path.split('.'):
        config = config.get(part) if isinstance(config, ConfigDict) else None
    return config if isinstance(config, ConfigDict) else None


def _last_value(argv: Sequence[str], flag: str) -> str | None:
    values = [a.partition('=')[2] for a in argv if re.match(rf'--?{re.escape(flag)}=', a)]
    return values[-1] if values else None


def _options(node: str, name: Any) -> Collection[str]:
    """All options of a model or a source of data; none where there is no such thing."""
    from experiments.run import (
        data,  # here: these take seconds to import, and few commands need them
    )
    from nfnets_jax import models

    try:
        return models.model_options(name) if node == 'model' else data.options(name)
    except UsageError:
        return ()  # Its name is what is wrong, which is told where it is used.


def _literal(text: str) -> Any:
    if text in ('true', 'false'):  # As absl's flags know them.
        return text == 'true'
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _check_overrides(config: ConfigDict, argv: Sequence[str]) -> None:
    known = _keys(config)
    for argument in argv[1:]:
        override = re.match(r'--?(?:no)?config\.([^=]*)', argument)
        if override and (key := override[1]) not in known:
            from experiments.config import unknown_key  # here: a slow import

            raise unknown_key(key, known + _options_of(config))


def _options_of(config: ConfigDict) -> list[str]:
    """The dotted names of the options of a config's model and data."""
    return [
        f'{node}.{option}'
        for node in ('model', 'data')
        if (fields := _node(config, node)) is not None
        for option in _options(node, fields.get('name'))
    ]


def _keys(config: ConfigDict, prefix: str = '') -> list[str]:
    """All dotted keys of a config, those of the inner nodes included."""
    keys = []
    for key in config:
        keys.append(prefix + key)
        if isinstance(config[key], ConfigDict):
            keys += _keys(config[key], f'{prefix}{key}.')
    return keys


def _place(path: str, error: Exception) -> str:
    if isinstance(error, SyntaxError):
        return f'{path}:{error.lineno}'
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if os.path.realpath(f.filename) == os.path.realpath(path)]
    return f'{path}:{lines[-1]}' if lines else path


def _one_line(error: Exception) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    return ' '.join(str(text).split())[:300] or type(error).__name__


def _fail(message: str) -> NoReturn:
    print(f'error: {" ".join(message.split())}', file=sys.stderr)  # One line, whatever was given.
    sys.exit(2)
