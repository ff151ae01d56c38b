"""Declared fields: the type, limits, default and doc of an option, each written once.

An option is a field of a dataclass, or a parameter of a function that is annotated with a `Field`:

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Recipe:
        flip: Annotated[bool, Field('Mirror every second image left-right.')] = False
        shift: Annotated[int, Field('Crop up to this many pixels off.', low=0)] = 0

The check of a value, the message about it, and every list of options come from that declaration:
`check(options(Recipe), {'shift': -1}, 'augment')` raises
`UsageError: augment.shift=-1: must be an integer of at least 0`.

Types are bool, int, float (an int is one; NaN and infinity are not), str, os.PathLike, Callable, a
`Literal` of strings, Mapping, a dataclass (whose values are a mapping, too), `Sequence` of one of
these, and unions of these and None.
"""

import collections.abc
import dataclasses
import functools
import inspect
import math
import operator
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from nfnets_jax.errors import UsageError, nearest

REQUIRED: Any = inspect.Parameter.empty  # the default of an option that has none


@dataclasses.dataclass(frozen=True)
class Field:
    """What an annotation says besides the type.

    Attributes:
      doc: what the option does, in a sentence or two.
      low, above, high, below: a number, or each of a sequence, must be >=, >, <= and < these.
      rule: a function that is false for values which type and limits let through by mistake.
      wants: what a value must be, in words, where type and limits do not say it.
      partial: whether values of a dataclass may lack fields, which then have their defaults.
    """

    doc: str
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    rule: Callable[[Any], object] | None = None
    wants: str = ''
    partial: bool = False

    def __repr__(self) -> str:  # as signatures in the API pages show it
        return f'Field({self.doc!r})'


class Option(NamedTuple):
    """One declared option; `inner` are the options of a dataclass, None where there is none."""

    type: Any
    field: Field
    default: Any = REQUIRED
    inner: Mapping[str, 'Option'] | None = None

    @property
    def wants(self) -> str:
        """What a value must be, in words: 'an integer of at least 1'."""
        return self.field.wants or _in_words(self.type, self.field)

    @property
    def entries(self) -> Mapping[str, 'Option'] | None:
        """The options of each entry of a list of dataclasses."""
        return next((_inner(entry) for entry in _entries(self.type)), None)


Hint = Callable[[str, Iterable[str]], str]
_Init = TypeVar('_Init', bound=Callable[..., Any])


def options(declaration: Callable[..., Any]) -> dict[str, Option]:
    """Returns the declared options of a dataclass, function or constructor, by name, in order.

    Parameters of a function without a `Field` are no options: the caller provides them. Those of
    `**more: Unpack[T]` are the fields of the TypedDict T, None by default.
    """
    owner: Any = declaration
    is_dataclass = dataclasses.is_dataclass(owner)
    of = owner.__init__ if inspect.isclass(owner) else owner
    hints = typing.get_type_hints(of, include_extras=True)
    found: dict[str, Option] = {}
    for name, parameter in inspect.signature(owner).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            for each in typing.get_args(hints.get(name)):
                more = typing.get_type_hints(each, include_extras=True)
                found |= {key: _option(hint, None) for key, hint in more.items()}
        elif is_dataclass and callable(make := owner.__dataclass_fields__[name].default_factory):
            found[name] = _option(hints[name], make())
        else:
            found[name] = _option(hints.get(name), parameter.default)
    return {name: option for name, option in found.items() if option.field.doc or is_dataclass}


def check(
    known: Mapping[str, Option],
    values: Mapping[str, Any],
    name: str = '',
    *,
    whole: bool = False,
    hint: Hint = nearest,
) -> None:
    """Raises a UsageError about the first value that breaks its declaration.

    Args:
      known: the declared options.
      values: option -> value; where a dataclass is declared, the value is a mapping in turn.
      name: where the values stand, the beginning of each key in a message: 'config.augment'.
      whole: whether options that have a default must be there, too.
      hint: (unknown key, known keys) -> the end of the message.
    """
    prefix = f'{name}.' if name else ''
    for key in values:
        if key not in known:
            raise UsageError(f'unknown key {prefix}{key}{hint(key, known)}', prefix + key)
    for key, option in known.items():
        if key in values:
            check_value(option, values[key], prefix + key, whole=whole, hint=hint)
        elif option.default is REQUIRED and not option.inner:
            raise UsageError(f'{prefix}{key} is missing: it must be {option.wants}', prefix + key)
        elif whole:
            default = '' if option.inner else f' (default: {option.default!r})'
            raise UsageError(f'{prefix}{key} is missing{default}', prefix + key)


def check_value(
    option: Option, value: Any, name: str, *, whole: bool = False, hint: Hint = nearest
) -> None:
    """Raises a UsageError, which begins with `name`, unless an option may have this value."""
    kinds, field = _kinds(option.type), option.field
    if option.inner and hasattr(value, 'keys'):
        check(option.inner, value, name, whole=whole and not field.partial, hint=hint)
    elif (entries := _entries(option.type)) and isinstance(value, list | tuple):
        plain = dataclasses.replace(field, rule=None, wants='', partial=True)
        entry = Option(entries[0], plain, inner=option.entries)
        for i, each in enumerate(value):
            check_value(entry, each, f'{name}[{i}]', whole=whole, hint=hint)
    elif not any(_is_of(kind, value, field) for kind in kinds):
        choices = [choice for kind in kinds for choice in _choices(kind)]
        wrong = f' is unknown{nearest(value, choices)}' if choices else f': must be {option.wants}'
        raise UsageError(f'{name}={value!r:.60}{wrong}', name)
    if field.rule and value is not None and not field.rule(value):
        raise UsageError(f'{name}={value!r:.60}: must be {option.wants}', name)


def checked(name: str = '') -> Callable[[_Init], _Init]:
    """Decorates a constructor to check its declared options first; `name` as in `check`."""

    def decorate(init: _Init) -> _Init:
        parameters = list(inspect.signature(init).parameters)

        @functools.wraps(init)
        def checking(*args, **kwargs):
            known = options(init)
            given = dict(zip(parameters, args, strict=False)) | kwargs
            declared = {k: v for k, v in given.items() if k in known or k not in parameters}
            check(known, declared, name)
            return init(*args, **kwargs)

        return typing.cast(_Init, checking)

    return decorate


def defaults(known: Mapping[str, Option]) -> dict[str, Any]:
    """Returns {option: default} of the options that have one, nested for dataclasses."""
    return {
        key: defaults(option.inner or {}) if option.default is REQUIRED else option.default
        for key, option in known.items()
        if option.inner or option.default is not REQUIRED
    }


def sections(
    known: Mapping[str, Option], name: str, doc: str = ''
) -> Iterator[tuple[str, str, dict[str, Option]]]:
    """Yields (name, doc, options that are no dataclass) of a node, then of the nodes below it.

    The options that each entry of a list has count as a node, called 'groups[i]'.
    """
    yield name, doc, {key: option for key, option in known.items() if not option.inner}
    for key, option in known.items():
        if inner := option.inner or option.entries:
            node = f'{name}.{key}' if option.inner else f'{name}.{key}[i]'
            yield from sections(inner, node, option.field.doc)


def _option(hint: Any, default: Any = REQUIRED) -> Option:
    field, kind = Field(''), hint
    if typing.get_origin(hint) is Annotated:
        kind, field = hint.__origin__, hint.__metadata__[0]
    return Option(kind, field, default, _inner(kind))


def _inner(kind: Any) -> dict[str, Option] | None:
    """Returns the options of a dataclass, or of the one in a union."""
    declared: list[Any] = [each for each in _kinds(kind) if dataclasses.is_dataclass(each)]
    return options(declared[0]) if declared else None


def _is_of(kind: Any, value: Any, field: Field) -> bool:
    """Whether a value is of a type other than a sequence or dataclass, and in its limits."""
    if choices := _choices(kind):
        return isinstance(value, str) and value in choices
    kind = typing.get_origin(kind) or kind
    if kind is Mapping:
        return hasattr(value, 'keys')
    if isinstance(value, bool) or kind in (bool, Sequence):
        return isinstance(value, bool) and kind is bool
    if kind in (int, float):
        is_number = isinstance(value, int if kind is int else int | float) and abs(value) < math.inf
        return is_number and all(holds(value, limit) for holds, limit, _ in _limits(field))
    return isinstance(value, kind)


def _kinds(kind: Any) -> Sequence[Any]:
    """Returns the members of a union, or the type alone."""
    is_union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if is_union else (kind,)


def _entries(kind: Any) -> list[Any]:
    """Returns the type of the entries of a sequence, [] for any other type."""
    kinds = _kinds(kind)
    return [typing.get_args(each)[0] for each in kinds if typing.get_origin(each) is Sequence]


def _choices(kind: Any) -> tuple[str, ...]:
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _limits(field: Field) -> list[tuple[Callable[[float, float], bool], float, str]]:
    limits = (
        (operator.ge, field.low, 'of at least'),
        (operator.gt, field.above, 'above'),
        (operator.le, field.high, 'at most'),
        (operator.lt, field.below, 'below'),
    )
    return [(holds, limit, words) for holds, limit, words in limits if limit is not None]


_WORDS = {
    bool: 'True or False',
    int: 'an integer',
    float: 'a number',
    str: 'a string',
    os.PathLike: 'a path',
    collections.abc.Callable: 'a function',
    Mapping: 'a mapping',
    types.NoneType: 'None',
}


def _in_words(kind: Any, field: Field) -> str:
    if len(kinds := _kinds(kind)) > 1:  # None first, or it seems to belong to the words before.
        kinds = sorted(kinds, key=lambda each: each is not types.NoneType)
        return ' or '.join(_in_words(each, field) for each in kinds)
    if choices := _choices(kind):
        return ' or '.join(map(repr, choices))
    if inner := _inner(kind):
        return f'a mapping of fields: {", ".join(inner)}'
    if typing.get_origin(kind) is Sequence:
        return f'a list, each entry {_in_words(typing.get_args(kind)[0], field)}'
    limits = _limits(field) if kind in (int, float) else ()
    words = ' and '.join(f'{relation} {limit}' for _, limit, relation in limits)
    return f'{_WORDS[typing.get_origin(kind) or kind]} {words}'.rstrip()
