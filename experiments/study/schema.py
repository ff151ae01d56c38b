"""What the writer and the reader of study.json have to agree on: its name, its claims and charts.

`experiments.study.config` checks a config with it, `experiments.report` a file.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nfnets_jax.errors import UsageError, nearest

SUMMARY_FILE = 'study.json'

# Ended with a result; a trial that diverged is one.
DONE = ('complete', 'diverged')
STATES = (*DONE, 'failed', 'running', 'pending')
KINDS = ('curves', 'line', 'heatmap', 'bars', 'parallel', 'table')
DIRECTIONS = ('greater', 'less')

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

NUMBER = (float, int)
NONE = type(None)


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the report or a paper says; with two sides to compare where the study can judge it."""

    text: str
    source: str
    metric: str
    better: Point | None = None
    worse: Point | None = None
    margin: float = 0.0
    direction: str = 'greater'


@dataclasses.dataclass(frozen=True)
class ChartSpec:
    """A chart that a study asks for; `y` is a metric, `x` and `series` are axes."""

    kind: str
    x: str
    y: str
    series: str
    title: str
    where: Point
    log_x: bool = False
    log_y: bool = False
    x_label: str | None = None


class Fields:
    """A JSON object of which fields are taken with their type; the errors name the field.

    Args:
      value: the object.
      name: where it stands, 'config.charts[0]'; '' for a whole file.

    Raises:
      UsageError: it is no object.
    """

    def __init__(self, value: Any, name: str):
        if not isinstance(value, dict):
            raise UsageError(f'{name or "it"} must be an object, not {value!r:.60}')
        self._value, self._name = value, name

    def name(self, key: str) -> str:
        return f'{self._name}.{key}' if self._name else key

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        if key not in self._value and default is ...:
            raise UsageError(f'{self.name(key)} is missing')
        value = self._value.get(key, default)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        # A bool is an int to Python, but no number to whoever writes JSON.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = ' or '.join('null' if k is NONE else k.__name__ for k in kinds)
            raise UsageError(f'{self.name(key)}={value!r:.60} must be {wanted}')
        return value

    def one_of(self, key: str, choices: Sequence[str], default: Any = ...) -> str:
        value = self.take(key, str, default)
        if value not in choices:
            raise UsageError(f'{self.name(key)}={value!r} is unknown{nearest(value, choices)}')
        return value

    def objects(self, key: str, default: Any = ...) -> list['Fields']:
        values = self.take(key, list, default)
        return [Fields(value, f'{self.name(key)}[{i}]') for i, value in enumerate(values)]

    def only(self, *known: str) -> None:
        """Raises a UsageError if there is a field of another name."""
        for key in self._value:
            if key not in known:
                raise UsageError(f'{self.name(key)} is unknown{nearest(key, known)}')

    def axis(self, key: str, axes: Mapping[str, Any]) -> str:
        """Takes the name of an axis."""
        axis = self.take(key, str)
        if axis not in axes:
            raise UsageError(f'{self.name(key)}={axis!r}: no such axis{nearest(axis, axes)}')
        return axis

    def point(self, key: str, axes: Mapping[str, Sequence[Value]], default: Any = ...) -> Point:
        """Takes a point.

        Its arm has to be one of the study's. Other values may lie outside the grid, which a user
        can narrow: nothing is known of such a point then.
        """
        point = self.take(key, dict, default)
        for axis, value in point.items():
            if axis not in axes:
                raise UsageError(f'{self.name(key)} has no axis {axis!r}{nearest(axis, axes)}')
            if axis == 'arm' and value not in axes[axis]:
                raise UsageError(f'{self.name(key)}.arm={value!r}{nearest(value, axes[axis])}')
        return point


def parse_claim(fields: Fields, axes: Mapping[str, Sequence[Value]], metric: str) -> Claim:
    """Returns a claim.

    Args:
      fields: of the claim.
      axes: of the study, with their values; 'arm' is one.
      metric: of the study, which a claim is about unless it says otherwise.

    Raises:
      UsageError: naming the field that is wrong.
    """
    fields.only('text', 'source', 'compare')
    text, source = fields.take('text', str), fields.take('source', str)
    compare = fields.take('compare', (dict, NONE), None)
    if compare is None:
        return Claim(text, source, metric)
    compare = Fields(compare, fields.name('compare'))
    compare.only('better', 'worse', 'margin', 'direction', 'metric')
    return Claim(
        text,
        source,
        compare.take('metric', str, metric),
        better=compare.point('better', axes),
        worse=compare.point('worse', axes),
        margin=compare.take('margin', NUMBER, 0.0),
        direction=compare.one_of('direction', DIRECTIONS, 'greater'),
    )


def parse_chart(fields: Fields, axes: Mapping[str, Sequence[Value]]) -> ChartSpec:
    """Returns a chart; for `axes` and errors see `parse_claim`."""
    fields.only(*(field.name for field in dataclasses.fields(ChartSpec)))
    kind = fields.one_of('kind', KINDS)
    return ChartSpec(
        kind=kind,
        x=fields.axis('x', {'step': (), **axes} if kind == 'curves' else axes),
        y=fields.take('y', str),
        series=fields.axis('series', axes),
        title=fields.take('title', str),
        where=fields.point('where', axes, {}),
        log_x=fields.take('log_x', bool, False),
        log_y=fields.take('log_y', bool, False),
        x_label=fields.take('x_label', (str, NONE), None),
    )
