"""Evaluates a trained run exactly: every test picture once, raw and EMA parameters.

    python -m experiments.evaluate --workdir=runs/digits [--checkpoint=best]

It prints the figures that training printed for the same checkpoint, whatever the batch size and
the number of devices.
"""

import json

import jax
from absl import flags

from experiments import cli, task, workdir
from experiments.task import describe
from nfnets_jax import parallel
from nfnets_jax.checkpoints import Checkpoints, DamagedCheckpointError
from nfnets_jax.errors import UsageError


def evaluate(directory: str, checkpoint: str = 'latest', batch_size: int | None = None) -> dict:
    """Returns {'step', 'test/top1', 'test/top5', 'test/loss'} of a run, and 'test_ema/...'.

    Raises:
      UsageError: there is no run, or not that checkpoint, or it is damaged.
    """
    config = workdir.load_config(directory)
    if batch_size is not None:
        config.eval.batch_size = batch_size
    setting = task.prepare(config, training=False)
    like = jax.eval_shape(lambda: task.init_state(setting))
    step, state = _restore(directory, checkpoint, like)
    variables = parallel.replicate(task.TrainState(*state).variables())
    return {'step': step} | task.evaluate(setting, task.make_eval_step(setting), variables)


def _restore(directory: str, checkpoint: str, like: task.TrainState) -> tuple[int, task.TrainState]:
    checkpoints = Checkpoints(f'{directory}/checkpoints', read_only=True)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise UsageError(f'--workdir={directory} holds no checkpoint yet')
        known = {'latest': steps[-1], 'best': checkpoints.best(), **{str(s): s for s in steps}}
        step = known.get(checkpoint)
        if step is None:
            there = ', '.join(map(str, steps))
            raise UsageError(f'--checkpoint={checkpoint}: there are latest, best, {there}')
        return step, checkpoints.restore(step, like)
    except DamagedCheckpointError as error:
        raise UsageError(
            f'checkpoint {step} of {directory} is damaged ({error}); '
            'choose another with --checkpoint=STEP'
        ) from error
    finally:
        checkpoints.close()


def main() -> None:
    args = flags.FLAGS
    results = evaluate(args.workdir, args.checkpoint, args.batch_size)
    print(json.dumps(results) if args.json else f'step {results["step"]:,}: {describe(results)}')


if __name__ == '__main__':
    flags.DEFINE_string('workdir', None, 'The directory of the run.', required=True)
    flags.DEFINE_string(
        'checkpoint', 'latest', "Which one: 'latest', 'best', or the step of one that is kept."
    )
    flags.DEFINE_integer(
        'batch_size', None, 'Examples at a time; by default as in training.', lower_bound=1
    )
    flags.DEFINE_bool('json', False, 'Print one JSON object, all metrics in it.')
    cli.run(main)
