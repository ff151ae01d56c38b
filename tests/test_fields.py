"""The check of declared fields, message by message, and the lists that are made of them."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, TypedDict, Unpack

import pytest

from nfnets_jax import fields
from nfnets_jax.errors import UsageError
from nfnets_jax.fields import REQUIRED, Field


@dataclasses.dataclass(frozen=True)
class Rule:
    match: Annotated[str, Field('Which.')]
    scale: Annotated[float, Field('How much.', low=0)] = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    flip: Annotated[bool, Field('Mirror.')] = False
    shift: Annotated[int, Field('Pixels.', low=0)] = 0
    decay: Annotated[float, Field('Decay.', low=0, below=1)] = 0.9
    eps: Annotated[float, Field('Floor.', above=0)] = 1e-3
    share: Annotated[float, Field('Share.', above=0, high=1)] = 1.0
    fill: Annotated[Literal['constant', 'edge'] | None, Field('Outside.')] = 'constant'
    sizes: Annotated[Sequence[int] | None, Field('Sizes.', low=1, rule=len)] = None
    rules: Annotated[Sequence[Rule], Field('Rules.')] = ({'match': '.*'},)  # type: ignore[assignment]
    where: Annotated[Mapping | None, Field('Anything.')] = None
    start: Annotated[float | Callable, Field('A start.')] = 0.0
    path: Annotated[str | os.PathLike, Field('A place.')] = ''
    width: Annotated[
        int, Field('Width.', low=8, rule=lambda n: n % 8 == 0, wants='a multiple of 8')
    ] = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    name: Annotated[str, Field('Name.')]
    recipe: Annotated[Recipe, Field('Recipe.')]
    open: Annotated[Recipe, Field('Another.', partial=True)]


RECIPE, WHOLE = fields.options(Recipe), fields.options(Whole)
DEFAULTS = {'name': 'a', **fields.defaults(WHOLE)}


@pytest.mark.parametrize(
    ('recipe', 'message'),
    [
        ({'flp': True}, "unknown key config.flp (did you mean 'flip'?)"),
        ({'flip': 1}, 'config.flip=1: must be True or False'),
        ({'shift': True}, 'shift=True: must be an integer of at least 0'),
        ({'shift': 1.0}, 'shift=1.0: must be an integer of at least 0'),
        ({'shift': -1}, 'shift=-1: must be an integer of at least 0'),
        ({'decay': 1}, 'decay=1: must be a number of at least 0 and below 1'),
        ({'decay': float('nan')}, 'decay=nan: must be a number'),
        ({'eps': float('inf')}, 'eps=inf: must be a number above 0'),
        ({'eps': 0}, 'eps=0: must be a number above 0'),
        ({'share': 1.5}, 'share=1.5: must be a number above 0 and at most 1'),
        ({'share': 10**400}, 'share=1000'),
        ({'fill': 'egde'}, "fill='egde' is unknown (did you mean 'edge'?)"),
        ({'fill': 3}, 'fill=3 is unknown (known: constant, edge)'),
        ({'sizes': ()}, 'sizes=(): must be None or a list, each entry an integer of at least 1'),
        ({'sizes': 'ab'}, "sizes='ab': must be None or a list"),
        ({'sizes': (3, 0)}, 'config.sizes[1]=0: must be an integer of at least 1'),
        ({'rules': ({},)}, 'config.rules[0].match is missing: it must be a string'),
        ({'rules': 'x'}, "rules='x': must be a list, each entry a mapping of fields: match, scale"),
        ({'rules': ['x']}, "rules[0]='x': must be a mapping of fields: match, scale"),
        ({'rules': [{'match': 'a', 'scale': -1}]}, 'rules[0].scale=-1: must be a number of at'),
        ({'rules': [{'match': 'a', 'scal': 1}]}, 'unknown key config.rules[0].scal (did you mean'),
        ({'where': 3}, 'where=3: must be None or a mapping'),
        ({'start': '1'}, "start='1': must be a number or a function"),
        ({'start': True}, 'start=True: must be a number or a function'),
        ({'path': 3}, 'path=3: must be a string or a path'),
        ({'width': 12}, 'width=12: must be a multiple of 8'),
        ({'width': 0}, 'width=0: must be a multiple of 8'),
    ],
)
def test_a_value_that_breaks_its_declaration_is_named_with_what_would_be_right(recipe, message):
    with pytest.raises(UsageError) as error:
        fields.check(RECIPE, recipe, 'config')
    assert message in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'name': 3}, 'config.name=3: must be a string'),
        ({'recipe': 3}, 'config.recipe=3: must be a mapping of fields: flip, shift'),
        ({'recipe': {}}, 'config.recipe.flip is missing (default: False)'),
        ({'open': {'flip': 3}}, 'config.open.flip=3: must be True or False'),
    ],
)
def test_a_whole_mapping_names_the_inner_field(change, message):
    with pytest.raises(UsageError) as error:
        fields.check(WHOLE, DEFAULTS | change, 'config', whole=True)
    assert message in str(error.value)


def test_what_must_be_there():
    with pytest.raises(UsageError, match='^name is missing: it must be a string$'):
        fields.check(WHOLE, {})
    fields.check(WHOLE, {'name': 'a'})
    with pytest.raises(UsageError, match='^recipe is missing$'):
        fields.check(WHOLE, {'name': 'a'}, whole=True)
    fields.check(WHOLE, DEFAULTS | {'open': {}}, whole=True)


@pytest.mark.parametrize(
    'recipe',
    [
        {},
        {'shift': 3, 'decay': 0, 'share': 1},
        {'sizes': None, 'fill': None},
        {'sizes': [1, 2], 'path': os.fspath('x'), 'start': abs, 'width': 16},
        {'rules': [{'match': 'a', 'scale': 2}], 'where': {'a': object()}},
    ],
)
def test_what_is_declared_passes(recipe):
    fields.check(RECIPE, recipe)


def test_the_end_of_a_message_about_an_unknown_key_is_the_callers():
    with pytest.raises(UsageError, match='^unknown key open.x: ask$'):
        fields.check(WHOLE, {'name': '', 'open': {'x': 1}}, hint=lambda key, known: ': ask')


class More(TypedDict, total=False):
    depth: Annotated[int | None, Field('Blocks.', low=1)]


class Net:
    @fields.checked('net')
    def __init__(
        self,
        split: str,
        size: Annotated[int, Field('Pixels.', low=8)],
        fill: Annotated[bool, Field('Fill.')] = False,
        **more: Unpack[More],
    ):
        self.given = split, size, fill, more


def test_a_constructor_checks_its_declared_parameters():
    assert Net(3, 8, depth=None).given == (3, 8, False, {'depth': None})
    found = fields.options(Net)
    assert {name: option.default for name, option in found.items()} == {
        'size': REQUIRED,
        'fill': False,
        'depth': None,
    }
    for arguments, options, message in (
        (('train', 7), {}, 'net.size=7: must be an integer of at least 8'),
        (('train',), {}, 'net.size is missing: it must be an integer of at least 8'),
        (('train', 8, 1), {}, 'net.fill=1: must be True or False'),
        (('train', 8), {'depth': 0}, 'net.depth=0: must be None or an integer of at least 1'),
        (('train', 8), {'dept': 1}, "unknown key net.dept .did you mean 'depth'"),
    ):
        with pytest.raises(UsageError, match=message):
            Net(*arguments, **options)


def test_defaults_are_nested_and_pass_the_check():
    assert DEFAULTS['recipe']['rules'] == ({'match': '.*'},)
    assert list(fields.defaults(WHOLE)) == ['recipe', 'open'], 'name has none'
    fields.check(WHOLE, DEFAULTS, whole=True)


def test_sections_are_the_nodes_and_the_entries_of_lists():
    found = list(fields.sections(WHOLE, 'config'))
    assert [(name, doc) for name, doc, _ in found] == [
        ('config', ''),
        ('config.recipe', 'Recipe.'),
        ('config.recipe.rules[i]', 'Rules.'),
        ('config.open', 'Another.'),
        ('config.open.rules[i]', 'Rules.'),
    ]
    assert [list(options) for _, _, options in found[:2]] == [['name'], list(RECIPE)]
