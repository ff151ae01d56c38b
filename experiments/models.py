"""Prints every model: its cost, its training and test size, its accuracy.

    python -m experiments.models
    python -m experiments.models --models=NFNet --num_classes=10

GMACs are billions of multiply-accumulates for one image of the test size. Top-1 and top-5 are the
published ImageNet accuracies in percent at the test size, with their paper, or timm's table of
results for timm's own networks. A dash means that this table has none. On a terminal that is too
narrow a row has several lines.
"""

from collections.abc import Iterator

from absl import flags

from experiments.launch import cli, output
from nfnets_jax import models
from nfnets_jax.errors import UsageError

HEADER = (
    *(f'{"model":<20}', f'{"parameters":>11}', f'{"GMACs":>7}', f'{"train":>5}', f'{"test":>4}'),
    *(f'{"top-1":>5}', f'{"top-5":>5}', ' source'),
)


def row(name: str, num_classes: int) -> tuple[str, ...]:
    """Returns the cells of a model."""
    info = models.variant_info(name)
    cost = models.model_cost(name, num_classes)
    top1, top5 = ('-' if top is None else f'{top:.1f}' for top in (info.top1, info.top5))
    return (
        f'{name:<20}',
        f'{cost.parameters:11,}',
        f'{cost.macs(info.test_size) / 1e9:7.2f}',
        f'{info.train_size:5}',
        f'{info.test_size:4}',
        f'{top1:>5}',
        f'{top5:>5}',
        f' {info.source or "-"}',
    )


def table(contains: str, num_classes: int, columns: int | None = None) -> Iterator[str]:
    """Yields the rows of the table for the models whose name contains a text."""
    names = [name for name in models.list_models() if contains in name]
    if not names:
        raise UsageError(f'--models={contains}: no model has this in its name')
    yield output.fold(HEADER, columns)
    for name in names:
        yield output.fold(row(name, num_classes), columns)


def main() -> None:
    for line in table(flags.FLAGS.models, flags.FLAGS.num_classes, output.terminal_columns()):
        print(line, flush=True)


if __name__ == '__main__':
    flags.DEFINE_string('models', '', 'Only models whose name contains this.')
    flags.DEFINE_integer('num_classes', 1000, 'Classes of the classifier.', lower_bound=1)
    cli.run(main)
