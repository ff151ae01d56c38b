"""Options of the families: their declarations, and the values of a variant."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import haiku as hk
import jax
import jax.numpy as jnp

from nfnets_jax import layers
from nfnets_jax.convolution.conv import Padding
from nfnets_jax.errors import UsageError, nearest
from nfnets_jax.fields import Field
from nfnets_jax.models.variants import VARIANTS, Variant

# Which reference to follow where they differ: the papers, or the PyTorch library timm.
# - 'timm': symmetric padding, pooled shortcuts, widths in multiples of 8; gains as published.
# - 'timm_gains': the same, with gains where timm has them. Every convolution has the gain of the
#   activation, even without an activation before it (the stem, the final convolution), so the last
#   activation has none. The last convolution of a branch has the gain of the branch, so there is no
#   skip gain. Networks with timm's names use these, and their parameters match timm's one to one.
Conventions = Annotated[
    Literal['published', 'timm', 'timm_gains'],
    Field('Follow the papers, or timm where it differs, in its gains, too: models/options.py.'),
]

# Options of several families.
Initializer = float | hk.initializers.Initializer
NumClasses = Annotated[int, Field('Size of the logits; 0: features only.', low=0)]
Activation = Annotated[str, Field('Name of the activation, in layers.activations.')]
Alpha = Annotated[float, Field('Weight of the residual branch.', above=0)]
SkipinitGain = Annotated[Initializer, Field('Initial gain of the branch, or an initializer.')]
FcInit = Annotated[Initializer, Field('Initial stddev of the classifier, or an initializer.')]
GroupSize = Annotated[int, Field('Channels in each group of the grouped convolutions.', low=1)]
UseSe = Annotated[bool, Field('Squeeze-and-excitation at the end of the branch.')]
SeRatio = Annotated[float, Field('Hidden over input width of squeeze-and-excitation.', above=0)]
Norm = Annotated[Literal['batch', 'none'], Field('Batch norm, or the same without it.')]
BnDecayRate = Annotated[float, Field('Decay rate of the running statistics.', low=0, below=1)]
CrossReplicaAxis = Annotated[
    str | None, Field('Axis to average batch statistics over; None: each device has its own.')
]
Remat = Annotated[bool, Field('Recompute blocks in the backward pass: less memory, more time.')]
Scan = Annotated[
    bool,
    Field(
        'Compile the identical blocks of a stage once: deep networks compile several times faster. '
        'Slow on CPUs; see docs/scaling.md.'
    ),
]
Channels = Annotated[int | None, Field('Channels of the images; None: any number.', low=1)]


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


_INTEGERS = 'None or a list of at least one integer, each at least 1'


class Overrides(TypedDict, total=False):
    """Options of every residual family; None or a missing option keeps the value of the variant."""

    width: Annotated[float | None, Field('Width multiplier.', above=0)]
    widths: Annotated[
        Sequence[int] | None,
        Field(
            'Output channels of each stage, before the width multiplier.',
            low=1,
            rule=len,
            wants=_INTEGERS,
        ),
    ]
    depths: Annotated[
        Sequence[int] | None, Field('Blocks of each stage.', low=1, rule=len, wants=_INTEGERS)
    ]
    stem: Annotated[
        Literal['imagenet', 'small'] | None,
        Field('imagenet downsamples the image before the first block, small keeps its size.'),
    ]
    drop_rate: Annotated[float | None, Field('Dropout rate before the classifier.', low=0, below=1)]
    stochdepth_rate: Annotated[float | None, Field('Stochastic-depth rate.', low=0, below=1)]


class ResNetOverrides(Overrides, total=False):
    """Options of every family of ResNets."""

    block: Annotated[
        Literal['bottleneck', 'basic'] | None,
        Field('Residual branch: 1x1-3x3-1x1 or 3x3-3x3 convolutions.'),
    ]


def overrides_of(family: str) -> list[str]:
    """Returns the names of a residual family's overrides."""
    kind = ResNetOverrides if family.endswith('ResNet') else Overrides
    return list(kind.__annotations__)


def resolve(family: str, variant: str, overrides: Overrides) -> Variant:
    """Returns the variant with every override that is not None applied.

    Raises:
      UsageError: the family has no such variant, or its stages do not fit together.
    """
    known_variants = {v.variant: v for v in VARIANTS.values() if v.family == family and not v.base}
    if variant not in known_variants:
        raise UsageError(f'{family} variant: unknown {variant!r}{nearest(variant, known_variants)}')
    given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    resolved = dataclasses.replace(known_variants[variant], **given)
    if len(resolved.widths) != len(resolved.depths):
        raise UsageError(
            f'depths={resolved.depths}: must have one entry a stage, {len(resolved.widths)} as '
            'widths has'
        )
    return resolved


def check_channels(variant: Variant, channels: Iterable[int]) -> None:
    """Raises a UsageError if the width of the variant leaves a convolution without channels."""
    if min(channels) < 1:
        raise UsageError(f'width={variant.width}: leaves a convolution without channels')
