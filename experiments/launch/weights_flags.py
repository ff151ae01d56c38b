"""The flags of commands that use trained weights: --weights or --workdir, and which of a run."""

import os

from absl import flags

from experiments.launch import cli
from nfnets_jax.errors import UsageError
from nfnets_jax.weights import pretrained

GROUP = {'weights': ('weights', 'workdir', 'checkpoint', 'ema', 'model')}  # for --help
flags.disclaim_key_flags()  # In --help they are flags of the command.


def define() -> None:
    """Defines the flags that `load` reads."""
    cli.define_path('weights', None, 'A file, a published name, or the directory of a run.')
    cli.define_workdir('Or the directory of a run.')
    flags.DEFINE_string('checkpoint', 'latest', "Of a run: 'latest', 'best', or a step.")
    flags.DEFINE_bool('ema', True, 'Use the moving average of a run, if there is one.')
    flags.DEFINE_string('model', None, 'Fail unless the weights are of this model.')


def load() -> tuple[str, pretrained.Weights]:
    """Returns the path or name of the weights that the flags name, and the weights.

    Raises:
      UsageError: none or both of the flags are given, the weights cannot be read, they are not
        those of a known model, or what chooses among the weights of a run is given of others.
    """
    args = flags.FLAGS
    if (args.workdir is None) == (args.weights is None):
        raise UsageError('give one of --workdir and --weights')
    if args.workdir is not None:
        check_workdir(args.workdir)
    source = args.workdir or args.weights
    for flag, is_given in (('checkpoint', args.checkpoint != 'latest'), ('noema', not args.ema)):
        if is_given and not os.path.isdir(source):
            raise UsageError(f'--{flag} is of a run: {source} is a file of weights, or a name')
    weights = pretrained.load_pretrained(
        source, args.model, checkpoint=args.checkpoint, ema=args.ema
    )
    if weights.metadata.model is None:
        raise UsageError(f'{source}: the parameters are not those of a known model: see --model')
    return source, weights


def check_workdir(workdir: str) -> None:
    """Raises a UsageError if --workdir is not a directory: names and files are for --weights."""
    if not os.path.isdir(workdir):
        raise UsageError(f'--workdir={workdir} holds no run: there is no such directory')
