"""Constructor options: the values of a variant, overridden and validated."""

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
# - 'timm_gains': the same, with gains where timm has them. Every convolution has the gain of the
#   activation, even without an activation before it (the stem, the final convolution), so the last
#   activation has none. The last convolution of a branch has the gain of the branch, so there is no
#   skip gain. Networks with timm's names use these, and their parameters match timm's one to one.
Conventions = Literal['published', 'timm', 'timm_gains']


class Form(NamedTuple):
    """Properties of a network that follow from its conventions.

    Attributes:
      is_timm: whether shortcuts are pooled and widths are multiples of 8, as in timm.
      padding: padding of the convolutions.
      skip_gain: whether a branch has a separate gain.
      gain: gain of a convolution without an activation before it.
      final_activation: activation of the features.
    """

    is_timm: bool
    padding: Padding
    skip_gain: bool
    gain: float
    final_activation: layers.Activation

    def scale(self, x: jax.Array) -> jax.Array:
        """Returns x times the gain, the input of a convolution without activation."""
        return x if self.gain == 1 else x * jnp.asarray(self.gain, x.dtype)


def form(conventions: Conventions, activation: str, *, scaled: bool = True) -> Form:
    """Returns the properties of a network with these conventions.

    Args:
      conventions: conventions of the network.
      activation: name of the activation.
      scaled: whether the gain of the activation is applied, to activations or convolutions.
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
    """Returns a function from the number of channels to the attention module of a branch."""
    if use_eca:
        return layers.EfficientChannelAttention
    divisor = 1 if form.skip_gain else 8  # timm's
    return lambda channels: layers.SqueezeExcite(channels, se_ratio, divisor)


class Overrides(TypedDict, total=False):
    """Options of every residual family; None or a missing option keeps the value of the variant.

    `variants.Variant` defines them.
    """

    width: float | None
    widths: tuple[int, ...] | None
    depths: tuple[int, ...] | None
    stem: Literal['imagenet', 'small'] | None
    drop_rate: float | None
    stochdepth_rate: float | None


class ResNetOverrides(Overrides, total=False):
    """Options of every family of ResNets."""

    block: Literal['bottleneck', 'basic'] | None


def overrides_of(family: str) -> list[str]:
    """Returns the names of a residual family's overrides."""
    kind = ResNetOverrides if family.endswith('ResNet') else Overrides
    return list(kind.__annotations__)


def resolve(family: str, variant: str, overrides: Overrides) -> Variant:
    """Returns the variant with every override that is not None applied.

    Raises:
      UsageError: the family has no such variant or option, or a value is invalid.
    """
    known_variants = {v.variant: v for v in VARIANTS.values() if v.family == family and not v.base}
    if variant not in known_variants:
        raise UsageError(f'{family} variant: unknown {variant!r}{nearest(variant, known_variants)}')
    for name in overrides:
        if name not in (known := overrides_of(family)):
            raise UsageError(f'{family}: unknown option {name!r}{nearest(name, known)}')
    given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    check(family, **given)
    resolved = dataclasses.replace(known_variants[variant], **given)
    if len(resolved.widths) != len(resolved.depths):
        raise UsageError(
            f'{family} depths: must have one entry a stage, {len(resolved.widths)} as widths has, '
            f'not {len(resolved.depths)}'
        )
    return resolved


def check(family: str, **values: Any) -> None:
    """Raises UsageError, in one line, for the first value that breaks the rule of its option."""
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
