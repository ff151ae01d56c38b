"""Constructor options: a variant's own values, overridden and checked."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import jax
import jax.numpy as jnp

from nfnets_jax import layers
from nfnets_jax.convolution.conv import Padding
from nfnets_jax.errors import UsageError, nearest
from nfnets_jax.models.variants import VARIANTS, Variant

# Which reference to follow where they differ: the papers, or the PyTorch library timm.
# - 'timm': symmetric padding, pooled shortcuts, widths in multiples of 8; gains as published.
# - 'timm_gains': these, and gains where timm has them. The gain of the activation is that of every
#   convolution, also where no activation stands before it (the stem, the final convolution), so the
#   last activation is without; the gain of a branch is that of its last convolution, so there is no
#   skip gain. Networks by timm's names are of this kind, and parameters are one for one timm's.
Conventions = Literal['published', 'timm', 'timm_gains']


class Form(NamedTuple):
    """What conventions make of a network.

    Attributes:
      is_timm: shortcuts are pooled, and widths multiples of 8, as timm has it.
      padding: of the convolutions.
      skip_gain: whether a branch has a gain of its own.
      gain: of a convolution before which no activation stands.
      final_activation: of the features.
    """

    is_timm: bool
    padding: Padding
    skip_gain: bool
    gain: float
    final_activation: layers.Activation

    def scale(self, x: jax.Array) -> jax.Array:
        """Returns what stands for x before a convolution without activation."""
        return x if self.gain == 1 else x * jnp.asarray(self.gain, x.dtype)


def form(conventions: Conventions, activation: str, *, scaled: bool = True) -> Form:
    """Returns what `conventions` mean for a network.

    Args:
      conventions: of the network.
      activation: its name.
      scaled: whether activations have their gain, or where they would have it convolutions.
    """
    has_timms_gains = conventions == 'timm_gains'
    return Form(
        is_timm=conventions != 'published',
        padding='SAME' if conventions == 'published' else 'SYMMETRIC',
        skip_gain=not has_timms_gains,
        gain=layers.get_gain(activation) if has_timms_gains and scaled else 1.0,
        final_activation=layers.get_activation(activation, scaled=scaled and not has_timms_gains),
    )


def attention(use_eca: bool, se_ratio: float, form: Form) -> Callable[[int], Any]:
    """Returns what makes the gates at the end of a branch, for its number of channels."""
    if use_eca:
        return layers.EfficientChannelAttention
    divisor = 1 if form.skip_gain else 8  # timm's
    return lambda channels: layers.SqueezeExcite(channels, se_ratio, divisor)


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
    rows = {row.variant: row for row in VARIANTS.values() if row.family == family and not row.base}
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


_COUNT = _Rule('a whole number, 0 or more', lambda v: _is_int(v) and v >= 0)
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
    'num_classes': _COUNT,
    'channels': _Rule(_POSITIVE_INT.wants, lambda v: v is None or _POSITIVE_INT.holds(v)),
    'stem_width': _Rule('a positive multiple of 8', lambda v: _is_int(v) and v > 0 and v % 8 == 0),
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
    'conventions': _one_of('published', 'timm', 'timm_gains'),
    'activation': _NAME,
    'cross_replica_axis': _NAME,
    'skipinit_gain': _START,
    'fc_init': _START,
    'remat': _BOOL,
    'scan': _BOOL,
    'use_se': _BOOL,
    'use_eca': _BOOL,
    'stem_bn': _BOOL,
    'downscale': _BOOL,
    'standardize': _BOOL,
    'activation_gain': _BOOL,
    'preactivation': _BOOL,
    'big_width': _BOOL,
    'use_two_convs': _BOOL,
}
