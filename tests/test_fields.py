import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from nfnets_jax import fields
from nfnets_jax.errors import UsageError
from nfnets_jax.fields import Field


@dataclasses.dataclass(frozen=True)
class Rule:
    match: Annotated[str, Field('Which.')]
    scale: Annotated[float, Field('How much.', low=0)] = 1.0


@dataclasses.dataclass(frozen=True)
class Recipe:
    flip: Annotated[bool, Field('Mirror.')] = False
    shift: Annotated[int, Field('Pixels.', low=0)] = 0
    decay: Annotated[float, Field('Decay.', low=0, below=1)] = 0.9
    eps: Annotated[float, Field('Floor.', above=0)] = 1e-3
    share: Annotated[float, Field('Share.', above=0, high=1)] = 1.0
    fill: Annotated[Literal['constant', 'edge'], Field('Outside.')] = 'constant'
    sizes: Annotated[Sequence[int] | None, Field('Sizes.', low=1, length=1)] = None
    rules: Annotated[Sequence[Rule], Field('Rules.')] = ({'match': '.*'},)  # type: ignore[assignment]
    extra: Annotated[Any, Field('Anything.')] = None


@dataclasses.dataclass(frozen=True)
class Whole:
    name: Annotated[str, Field('Name.')]
    recipe: Annotated[Recipe, Field('Recipe.')] = dataclasses.field(default_factory=Recipe)


def function(split: str, size: Annotated[int, Field('Pixels.', low=8)] = 16):
    return split, size


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        (
            {'name': 'a', 'recipe': {'flp': True}},
            "unknown key config.recipe.flp (did you mean 'flip'?)",
        ),
        ({'recipe': {}}, 'config.name is missing: it must be a string'),
        ({'name': 3}, 'config.name=3: must be a string'),
        ({'name': 'a', 'recipe': 3}, 'config.recipe=3: must be fields like flip, shift'),
        ({'name': 'a', 'recipe': {'flip': 1}}, 'config.recipe.flip=1: must be True or False'),
        ({'name': 'a', 'recipe': {'shift': True}}, 'shift=True: must be an integer of at least 0'),
        ({'name': 'a', 'recipe': {'shift': 1.0}}, 'shift=1.0: must be an integer of at least 0'),
        ({'name': 'a', 'recipe': {'shift': -1}}, 'shift=-1: must be an integer of at least 0'),
        (
            {'name': 'a', 'recipe': {'decay': 1}},
            'decay=1: must be a number of at least 0 and below 1',
        ),
        ({'name': 'a', 'recipe': {'decay': float('nan')}}, 'decay=nan: must be a number'),
        ({'name': 'a', 'recipe': {'eps': float('inf')}}, 'eps=inf: must be a number above 0'),
        ({'name': 'a', 'recipe': {'eps': 0}}, 'eps=0: must be a number above 0'),
        (
            {'name': 'a', 'recipe': {'share': 1.5}},
            'share=1.5: must be a number above 0 and of at most 1',
        ),
        (
            {'name': 'a', 'recipe': {'fill': 'egde'}},
            "fill='egde' is unknown (did you mean 'edge'?)",
        ),
        (
            {'name': 'a', 'recipe': {'sizes': ()}},
            'sizes=(): must be a list of at least 1, each entry',
        ),
        (
            {'name': 'a', 'recipe': {'sizes': (3, 0)}},
            'sizes[1]=0: must be an integer of at least 1',
        ),
        ({'name': 'a', 'recipe': {'rules': ({},)}}, 'config.recipe.rules[0].match is missing'),
        (
            {'name': 'a', 'recipe': {'rules': 'x'}},
            "rules='x': must be a list, each entry fields like",
        ),
        ({'name': 'a', 'recipe': {'rules': [{'match': 'a', 'scale': -1}]}}, 'rules[0].scale=-1'),
    ],
)
def test_a_value_that_breaks_its_declaration_is_named_with_what_would_be_right(values, message):
    with pytest.raises(UsageError) as error:
        fields.check(Whole, values, 'config')
    assert message in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'recipe',
    [
        {},
        {'shift': np.int64(3), 'decay': 0, 'share': 1, 'eps': np.float32(0.1)},
        {'sizes': None},
        {'sizes': [1, 2]},
        {'rules': [{'match': 'a', 'scale': 2}], 'extra': object()},
    ],
)
def test_what_is_declared_passes(recipe):
    fields.check(Whole, {'name': 'a', 'recipe': recipe}, 'config')


def test_defaults_are_nested_and_pass_the_check():
    found = fields.defaults(Whole)
    assert found['recipe']['rules'] == ({'match': '.*'},)
    assert 'name' not in found
    fields.check(Whole, {'name': 'a', **found})


def test_options_of_a_function_are_its_declared_parameters():
    assert list(fields.options(function)) == ['size']
    with pytest.raises(UsageError, match=r'data\.size=7: must be an integer of at least 8'):
        fields.check(function, {'size': 7}, 'data')


def test_walk_yields_every_leaf_with_its_doc():
    found = {key: option.field.doc for key, option in fields.walk(Whole, 'config')}
    assert found['config.recipe.shift'] == 'Pixels.'
    assert len(found) == 1 + len(dataclasses.fields(Recipe))


def test_a_parser_adds_to_the_check():
    def even(value):
        if value % 2:
            raise ValueError('must be even')

    def halves(n: Annotated[int, Field('Count.', low=0, parse=even)] = 0):
        return n

    with pytest.raises(UsageError, match='n=3: must be even'):
        fields.check(halves, {'n': 3})
    fields.check(halves, {'n': 4})
