"""The fields of a study, in its config and in study.json, and what they may be.

`experiments.study.config` checks a config with it, `experiments.report` a file.
"""

import dataclasses
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any, Literal

from nfnets_jax.errors import UsageError, nearest
from nfnets_jax.fields import Field

SUMMARY_FILE = 'study.json'

# Ended with a result; a trial that diverged is one.
DONE = ('complete', 'diverged')
State = Literal['complete', 'diverged', 'failed', 'running', 'pending']
STATES = typing.get_args(State)
Kind = Literal['curves', 'line', 'heatmap', 'bars', 'parallel', 'table']
KINDS = typing.get_args(Kind)

# Metrics that depend on what else the machine does. Trials share it with one another and with other
# programs, so a study neither draws nor judges them; benchmarks/ measures time.
TIMES = (
    'images_per_second',
    'training_seconds',
    'compile_seconds',
    'train/images_per_second',
    'train/data_wait',
    'train/tflops',
    'train/mfu',
    'train/compile_seconds',
)

Value = str | float | int | bool | None
Point = Mapping[str, Value]  # axis -> value, for some of a study's axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """What is compared with the other arms."""

    name: Annotated[str, Field('Part of the names of directories.')]
    label: Annotated[str, Field('In words; by default the name.')] = ''
    config: Annotated[Mapping, Field('What differs from the base.')] = field(default_factory=dict)
    grid: Annotated[Mapping, Field("Axis -> its values in this arm, instead of the study's.")] = (
        field(default_factory=dict)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The two sides of a claim: points, {axis: value} for some of a study's axes."""

    better: Annotated[Mapping, Field('Where the metric is claimed to be better.')]
    worse: Annotated[Mapping, Field('Where it is claimed to be worse.')]
    margin: Annotated[float, Field('By more than this; the same: to within this.')] = 0.0
    direction: Annotated[
        Literal['greater', 'less', 'same'],
        Field('How the better side compares: a claim of sameness is tested for equivalence.'),
    ] = 'greater'
    metric: Annotated[str | None, Field("What is compared; None: the study's.")] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClaimConfig:
    """What the report or a paper says."""

    text: Annotated[str, Field('The claim.')]
    source: Annotated[str, Field('Who made it.')]
    scope: Annotated[
        str, Field("The network, data and budget that it is about; '': those of the study.")
    ] = ''
    compare: Annotated[Comparison | None, Field('How the study judges it; None: it cannot.')] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChartSpec:
    """A chart that a study asks for."""

    kind: Annotated[Kind, Field('Kind of the chart.')]
    x: Annotated[str, Field("An axis, or 'step' for curves.")]
    y: Annotated[str, Field('A metric.')]
    series: Annotated[str, Field('An axis.')]
    title: Annotated[str, Field('Title of the chart.')]
    where: Annotated[Mapping, Field('Only trials with {axis: value}.')] = field(
        default_factory=dict
    )
    log_x: Annotated[bool, Field('Logarithmic x axis.')] = False
    log_y: Annotated[bool, Field('Logarithmic y axis.')] = False
    x_label: Annotated[str | None, Field('Instead of the name of x.')] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Every field of a study."""

    name: Annotated[str, Field("Name of the study's file.")] = ''
    title: Annotated[str, Field('Title of the report.')] = ''
    question: Annotated[str, Field('What the study asks.')] = ''
    setting: Annotated[str, Field('Data and network, in words; the recipe is added.')] = ''
    size: Annotated[str, Field('digits, cifar10, imagenet, ...')] = ''
    cost: Annotated[str, Field('What it took on which machine, as measured.')] = ''
    base: Annotated[Mapping, Field('The config that all trials start from.')]
    pretrain: Annotated[
        Mapping,
        Field(
            'A config to train once before the trials, if it is not empty; they find its weights '
            "with config.init.weights='{study}/pretrained'."
        ),
    ] = field(default_factory=dict)
    axes: Annotated[Mapping, Field('Axis -> the key of the config that it sets.')] = field(
        default_factory=lambda: {'learning_rate': 'optimizer.learning_rate', 'seed': 'seed'}
    )
    grid: Annotated[Mapping, Field('Axis -> its values, in every arm.')] = field(
        default_factory=lambda: {'seed': (0, 1, 2)}
    )
    arms: Annotated[Sequence[Arm], Field('What is compared.')] = ()
    measure: Annotated[
        Sequence[str], Field('What a trial does, in order; see experiments/study/measurements.py.')
    ] = ('train',)
    metric: Annotated[str, Field('What arms are judged by.')] = 'test/top1'
    higher_is_better: Annotated[bool, Field('Which way the metric is better.')] = True
    chance: Annotated[float | None, Field('The metric of an untrained or diverged network.')] = 0.1
    tuned: Annotated[
        Sequence[str],
        Field('Axes whose best value is chosen for each arm, on validation images if there are.'),
    ] = ('learning_rate',)
    search: Annotated[
        Literal['full', 'coarse'],
        Field(
            'full: every value of the tuned axes with every seed. coarse: with the first seed; the '
            'best, and the values beside it, with every seed.'
        ),
    ] = 'full'
    extensions: Annotated[
        int, Field('With --extend: values to add to a tuned axis of an arm at most.', low=0)
    ] = 4
    claims: Annotated[Sequence[ClaimConfig], Field('What was claimed before.')] = ()
    charts: Annotated[Sequence[ChartSpec], Field('Charts of the report.')] = ()


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim, with two sides to compare where the study can judge it."""

    text: str
    source: str
    metric: str
    better: Point | None = None
    worse: Point | None = None
    margin: float = 0.0
    direction: str = 'greater'
    scope: str = ''


def has_learned(mean: float, chance: float | None) -> bool:
    """Returns whether an accuracy is above chance by a tenth of what there is above it.

    Below that a learning rate is not the best of a grid: the others are as far from learning, and
    the best may lie beyond. True where chance is not known.
    """
    return chance is None or not mean < chance + 0.1 * (1 - chance)


def parse_claim(
    claim: Mapping, axes: Mapping[str, Sequence[Value]], metric: str, name: str
) -> Claim:
    """Returns a claim.

    Args:
      claim: as in `ClaimConfig`, checked.
      axes: of the study, with their values; 'arm' is one.
      metric: of the study, which a claim is about unless it says otherwise.
      name: where the claim stands, 'config.claims[0]'.

    Raises:
      UsageError: a side is no point of the study.
    """
    compare = claim.get('compare') or {}
    for side in ('better', 'worse'):
        check_point(compare.get(side, {}), axes, f'{name}.compare.{side}')
    given = {key: value for key, value in compare.items() if value is not None}
    if given.get('direction') == 'same' and not given.get('margin', 0.0) > 0:
        raise UsageError(
            f'{name}.compare.margin: the same to within which margin? give one above 0'
        )
    scope = claim.get('scope') or ''
    return Claim(claim['text'], claim['source'], scope=scope, **{'metric': metric} | given)


def parse_chart(chart: Mapping, axes: Mapping[str, Sequence[Value]], name: str) -> ChartSpec:
    """Returns a chart, as in `ChartSpec`; for the other arguments and errors see `parse_claim`."""
    spec = ChartSpec(**chart)
    check_axis(spec.x, {'step': (), **axes} if spec.kind == 'curves' else axes, f'{name}.x')
    check_axis(spec.series, axes, f'{name}.series')
    check_point(spec.where, axes, f'{name}.where')
    return spec


def selection_metric(metric: str, known: Collection[str]) -> str:
    """Returns the metric that chooses tuned values: on validation images, if they are evaluated.

    Args:
      metric: what arms are compared by, 'test/top1'.
      known: the metrics that the trials have.
    """
    validated = metric.replace('test', 'validation', 1)
    return validated if metric.startswith('test') and validated in known else metric


def check_axis(axis: str, axes: Mapping[str, Any], name: str) -> None:
    """Raises a UsageError unless there is such an axis."""
    if axis not in axes:
        raise UsageError(f'{name}={axis!r}: no such axis{nearest(axis, axes)}')


def check_point(point: Point, axes: Mapping[str, Sequence[Value]], name: str) -> None:
    """Raises a UsageError unless the axes are the study's, and the arm is one of its arms.

    Other values may lie outside the grid, which a user can narrow: nothing is known of such a point
    then.
    """
    for axis, value in point.items():
        if axis not in axes:
            raise UsageError(f'{name} has no axis {axis!r}{nearest(axis, axes)}')
        if axis == 'arm' and value not in axes[axis]:
            raise UsageError(f'{name}.arm={value!r}{nearest(value, axes[axis])}')
