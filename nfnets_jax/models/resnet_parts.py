"""Shared by the four ResNet families: the stem, the convolutions of a block, the stage plan."""

import jax

from nfnets_jax import pooling
from nfnets_jax.convolution.conv import Padding
from nfnets_jax.models import options, residual
from nfnets_jax.models.variants import Variant

# Arguments of a convolution: output channels, kernel size, stride.
ConvArgs = tuple[int, int, int]


def stem_shape(variant: Variant) -> ConvArgs:
    """Returns the first convolution: 7x7 with stride 2, or 3x3 for small images."""
    channels = int(16 * variant.width)
    return (channels, 3, 1) if variant.stem == 'small' else (channels, 7, 2)


def stem_pool(variant: Variant, x: jax.Array, padding: Padding = 'SAME') -> jax.Array:
    """Halves the output of the first convolution, unless the stem is 'small'."""
    return x if variant.stem == 'small' else pooling.max_pool(x, 3, 2, padding)


def branch_shapes(variant: Variant, plan: residual.BlockPlan) -> list[ConvArgs]:
    """Returns the convolutions of a residual branch: 1x1-3x3-1x1, or 3x3-3x3 for basic blocks."""
    if variant.block == 'basic':
        return [(plan.out_channels, 3, plan.stride), (plan.out_channels, 3, 1)]
    inner = plan.out_channels // 4
    return [(inner, 1, 1), (inner, 3, plan.stride), (plan.out_channels, 1, 1)]


def plan_resnet(variant: Variant, alpha: float = 0.0) -> list[residual.BlockPlan]:
    """Returns the plan of the blocks: every stage but the first halves the feature map.

    Raises:
      UsageError: the width leaves a convolution without channels.
    """
    inner = min(variant.channels) // (4 if variant.block == 'bottleneck' else 1)
    options.check_channels(variant, (stem_shape(variant)[0], inner))
    return residual.plan_blocks(
        stem_shape(variant)[0],
        variant.channels,
        variant.depths,
        [1] + [2] * (len(variant.depths) - 1),
        alpha=alpha,
        stochdepth_rate=variant.stochdepth_rate,
    )
