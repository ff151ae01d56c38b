"""Constructor options: a variant's own values, overridden and checked."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

from nfnets_jax.errors import UsageError, nearest
from nfnets_jax.models.variants import VARIANTS, Variant

# Whose network it is where the two differ: the papers', or the one of the PyTorch library timm,
# whose weights of NF-ResNet-50 and NF-RegNet-B1 are public.
Conventions = Literal['published', 'timm']


class Overrides(TypedDict, total=False):
    """Options every residual family takes; None, like leaving it out, is the variant's own value.

    See `variants.Variant` for what they mean.
    """

    width: float | None
    widths: tuple[int, ...] | None
    depths: tuple[int, ...] | None
    stem: Literal['imagenet', 'small'] | None
    drop_rate: float | None
    stochdepth_rate: float | None


class ResNetOverrides(Overrides, total=False):
    """Options every family of ResNets takes."""

    block: Literal['bottleneck', 'basic'] | None


def overrides_of(family: str) -> list[str]:
    """Returns the names of a residual family's overrides."""
    kind = ResNetOverrides if family.endswith('ResNet') else Overrides
    return list(kind.__annotations__)


def resolve(family: str, variant: str, overrides: Overrides) -> Variant:
    """Returns the variant's row with every override that is not None put in its place.

    Raises:
      UsageError: the family has no such variant or option, or no network has such a value.
    """
    rows = {row.variant: row for row in VARIANTS.values() if row.family == family}
    if variant not in rows:
        raise UsageError(f'{family} variant: unknown {variant!r}{nearest(variant, rows)}')
    for name in overrides:
        if name not in (known := overrides_of(family)):
            raise UsageError(f'{family}: unknown option {name!r}{nearest(name, known)}')
    given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    check(family, **given)
    row = dataclasses.replace(rows[variant], **given)
    if len(row.widths) != len(row.depths):
        raise UsageError(
            f'{family} depths: must have one entry a stage, {len(row.widths)} as widths has, '
            f'not {len(row.depths)}'
        )
    return row


def check(family: str, **values: Any) -> None:
    """Raises UsageError, in one line, for the first value that breaks its option's rule."""
    for name, value in values.items():
        rule = _RULES[name]
        if not rule.holds(value):
            raise UsageError(f'{family} {name}: must be {rule.wants}, not {value!r}')


class _Rule(NamedTuple):
    wants: str
    holds: Callable[[Any], bool]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _one_of(*choices: str) -> _Rule:
    return _Rule(' or '.join(map(repr, choices)), lambda v: v in choices)


_POSITIVE_INT = _Rule('a positive integer', lambda v: _is_int(v) and v > 0)
_POSITIVE = _Rule('a positive number', lambda v: _is_number(v) and v > 0)
_RATE = _Rule('a number in [0, 1)', lambda v: _is_number(v) and 0 <= v < 1)
_BOOL = _Rule('True or False', lambda v: isinstance(v, bool))
_NAME = _Rule('a name', lambda v: isinstance(v, str))
_START = _Rule('a number or an initialiser', lambda v: callable(v) or _is_number(v))
_STAGES = _Rule(
    'positive integers, one a stage',
    lambda v: isinstance(v, Sequence) and len(v) > 0 and all(_is_int(n) and n > 0 for n in v),
)

_RULES = {
    'num_classes': _POSITIVE_INT,
    'group_size': _POSITIVE_INT,
    'width': _POSITIVE,
    'expansion': _POSITIVE,
    'se_ratio': _POSITIVE,
    'alpha': _POSITIVE,
    'final_conv_mult': _POSITIVE,
    'final_conv_ch': _POSITIVE_INT,
    'drop_rate': _RATE,
    'stochdepth_rate': _RATE,
    'bn_decay_rate': _RATE,
    'widths': _STAGES,
    'depths': _STAGES,
    'block': _one_of('bottleneck', 'basic'),
    'stem': _one_of('imagenet', 'small'),
    'norm': _one_of('batch', 'none'),
    'conventions': _one_of('published', 'timm'),
    'activation': _NAME,
    'cross_replica_axis': _NAME,
    'skipinit_gain': _START,
    'fc_init': _START,
    'remat': _BOOL,
    'scan': _BOOL,
    'use_se': _BOOL,
    'stem_bn': _BOOL,
    'downscale': _BOOL,
    'standardize': _BOOL,
    'activation_gain': _BOOL,
    'preactivation': _BOOL,
    'big_width': _BOOL,
    'use_two_convs': _BOOL,
}
