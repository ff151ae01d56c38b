"""Declared fields: the type, limits, default and doc of an option, written once.

An option is a parameter of a function or a field of a dataclass, annotated with what it may be:

    @dataclasses.dataclass(frozen=True)
    class Recipe:
        flip: Annotated[bool, Field('Mirror every second image left-right.')] = False
        shift: Annotated[int, Field('Crop up to this many pixels off.', low=0)] = 0

From that one declaration come the check of a value, the message about it, and listings for people:
`check(Recipe, {'shift': -1}, 'augment')` raises
`UsageError: augment.shift=-1: must be an integer of at least 0`.

Types are bool, int, float (an int is one, a bool is not; NaN and infinity are none), str, a
`Literal` of strings, a dataclass of fields (given as a mapping), `Sequence` of one of these, a
union of these with None, and `Any`.
"""

import dataclasses
import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from nfnets_jax.errors import UsageError, nearest

REQUIRED = inspect.Parameter.empty  # The default of an option that has none.


@dataclasses.dataclass(frozen=True)
class Field:
    """What an annotation says besides the type: one line of doc, and the limits of numbers.

    Attributes:
      doc: what the option does, one sentence.
      low, above, high, below: a number must be >=, >, <= and < these.
      length: the fewest entries of a sequence.
      parse: raises ValueError, with what the value must be, unless the value can be used.
    """

    doc: str = ''
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    length: int = 0
    parse: Callable[[Any], object] | None = None


class Option(NamedTuple):
    """One declared option."""

    name: str
    type: Any  # without its Field
    field: Field
    default: Any  # REQUIRED where there is none

    @property
    def section(self) -> type | None:
        """The dataclass whose fields the option holds, None for a plain value."""
        return self.type if dataclasses.is_dataclass(self.type) else None

    @property
    def wants(self) -> str:
        """What a value must be, in words: 'an integer of at least 1'."""
        return _words(self.type, self.field)


@functools.cache
def options(declaration: Callable[..., Any]) -> Mapping[str, Option]:
    """Returns the declared options of a dataclass or function, by name, in order.

    Parameters without a `Field` are no options: the caller provides them.
    """
    init = declaration.__init__ if inspect.isclass(declaration) else declaration
    owner = declaration if dataclasses.is_dataclass(declaration) else init
    hints = typing.get_type_hints(owner, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(declaration).parameters.items():
        extras = getattr(hints.get(name), '__metadata__', ())
        field = next((extra for extra in extras if isinstance(extra, Field)), None)
        if field is not None:
            default = parameter.default
            if type(default).__name__ == '_HAS_DEFAULT_FACTORY_CLASS':
                default = hints[name].__origin__()
            found[name] = Option(name, hints[name].__origin__, field, default)
    return found


def check(
    declaration: Callable[..., Any],
    values: Mapping[str, Any],
    name: str = '',
    *,
    whole: bool = True,
) -> None:
    """Raises a UsageError about the first value that breaks its declaration.

    Args:
      declaration: a dataclass or function with declared options.
      values: option -> value; a dataclass's fields as a mapping.
      name: where the values stand, the beginning of each key in a message: 'config.augment'.
      whole: whether an option without default must be there.
    """
    known = options(declaration)
    prefix = f'{name}.' if name else ''
    for key in values:
        if key not in known:
            raise UsageError(f'unknown key {prefix}{key}{nearest(key, known)}')
    for key, option in known.items():
        if key in values:
            check_value(option, values[key], f'{prefix}{key}')
        elif whole and option.default is REQUIRED:
            raise UsageError(f'{prefix}{key} is missing: it must be {option.wants}')


def check_value(option: Option, value: Any, name: str) -> None:
    """Raises a UsageError that begins with `name` unless the value is what an option may be."""
    if option.section and isinstance(value, Mapping):
        check(option.section, value, name)
    elif (inner := _entry(option.type)) and _is_list(value) and len(value) >= option.field.length:
        for i, entry in enumerate(value):
            check_value(option._replace(type=inner), entry, f'{name}[{i}]')
    elif choices := _choices(option.type):
        if value not in choices:
            raise UsageError(f'{name}={value!r} is unknown{nearest(value, choices)}')
    elif not _is_of(option.type, value) or not _within(option.field, value):
        raise UsageError(f'{name}={value!r}: must be {option.wants}')
    if option.field.parse:
        try:
            option.field.parse(value)
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(f'{name}={value!r}: {error}') from None


def defaults(declaration: Callable[..., Any]) -> dict[str, Any]:
    """Returns every option that has a default with it, nested for dataclasses."""
    found = {}
    for key, option in options(declaration).items():
        if option.section:
            found[key] = defaults(option.section)
        elif option.default is not REQUIRED:
            found[key] = option.default
    return found


def walk(declaration: Callable[..., Any], name: str = '') -> Iterator[tuple[str, Option]]:
    """Yields the dotted key and the declaration of every option, those of sections included."""
    for key, option in options(declaration).items():
        path = f'{name}.{key}' if name else key
        if option.section:
            yield from walk(option.section, path)
        else:
            yield path, option


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _entry(kind: Any) -> Any:
    """Returns the type of a sequence's entries, None for what is no sequence."""
    for member in _members(kind):
        if typing.get_origin(member) is Sequence:
            return typing.get_args(member)[0]
    return None


def _members(kind: Any) -> tuple[Any, ...]:
    union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if union else (kind,)


def _choices(kind: Any) -> tuple[Any, ...]:
    members = _members(kind)
    if not any(typing.get_origin(member) is Literal for member in members):
        return ()
    named = [c for m in members if typing.get_origin(m) is Literal for c in typing.get_args(m)]
    return (*named, None) if types.NoneType in members else tuple(named)


def _is_of(kind: Any, value: Any) -> bool:
    return any(_is_one(member, value) for member in _members(kind))


def _is_one(kind: Any, value: Any) -> bool:
    if kind is Any:
        return True
    if isinstance(value, bool):
        return kind is bool
    if kind is int:
        return isinstance(value, numbers.Integral)
    if kind is float:
        return isinstance(value, numbers.Real) and math.isfinite(value)
    return inspect.isclass(kind) and isinstance(value, kind)


def _within(field: Field, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return True
    value = float(value)
    return (
        (field.low is None or value >= field.low)
        and (field.above is None or value > field.above)
        and (field.high is None or value <= field.high)
        and (field.below is None or value < field.below)
    )


_WORDS = {
    bool: 'True or False',
    int: 'an integer',
    float: 'a number',
    str: 'a string',
    types.NoneType: 'None',
    Any: 'any value',
}


def _words(kind: Any, field: Field) -> str:
    if choices := _choices(kind):
        return ' | '.join('None' if choice is None else str(choice) for choice in choices)
    words = [_one_in_words(member, field) for member in _members(kind)]
    return ' or '.join(words)


def _one_in_words(kind: Any, field: Field) -> str:
    if inspect.isclass(kind) and dataclasses.is_dataclass(kind):
        return f'fields like {", ".join(options(kind))}'
    if typing.get_origin(kind) is Sequence:
        (inner,) = typing.get_args(kind)
        fewest = f' of at least {field.length}' if field.length else ''
        return f'a list{fewest}, each entry {_words(inner, field)}'
    words = _WORDS.get(kind, getattr(kind, '__name__', str(kind)))
    if kind not in (int, float):
        return words
    limits = [
        f'{relation} {limit}'
        for relation, limit in (
            ('of at least', field.low),
            ('above', field.above),
            ('of at most', field.high),
            ('below', field.below),
        )
        if limit is not None
    ]
    return ' '.join(filter(None, (words, ' and '.join(limits))))
