"""What the four ResNet families share: the stem, the shapes of a block, the plan of the stages."""

import jax

from nfnets_jax import layers
from nfnets_jax.convolution.conv import Padding
from nfnets_jax.errors import UsageError
from nfnets_jax.models import residual
from nfnets_jax.models.variants import Variant

# Arguments of a convolution: output channels, kernel size, stride.
ConvShape = tuple[int, int, int]


def stem_shape(row: Variant) -> ConvShape:
    """Returns the first convolution: 7x7 with stride 2, or 3x3 for small pictures."""
    channels = int(16 * row.width)
    return (channels, 3, 1) if row.stem == 'small' else (channels, 7, 2)


def stem_pool(row: Variant, x: jax.Array, padding: Padding = 'SAME') -> jax.Array:
    """Halves what the first convolution returned, unless the picture was small already."""
    return x if row.stem == 'small' else layers.max_pool(x, 3, 2, padding)


def branch_shapes(row: Variant, plan: residual.BlockPlan) -> list[ConvShape]:
    """Returns the convolutions of a residual branch: 1x1-3x3-1x1, or 3x3-3x3 for basic blocks."""
    if row.block == 'basic':
        return [(plan.out_channels, 3, plan.stride), (plan.out_channels, 3, 1)]
    inner = plan.out_channels // 4
    return [(inner, 1, 1), (inner, 3, plan.stride), (plan.out_channels, 1, 1)]


def plan_resnet(row: Variant, alpha: float = 0.0) -> list[residual.BlockPlan]:
    """Lays out the blocks: every stage but the first halves the picture.

    Raises:
      UsageError: the width leaves a convolution without channels.
    """
    inner = min(row.channels) // (4 if row.block == 'bottleneck' else 1)
    if min(stem_shape(row)[0], inner) < 1:
        raise UsageError(f'{row.family} width: {row.width} leaves a convolution without channels')
    return residual.plan_blocks(
        stem_shape(row)[0],
        row.channels,
        row.depths,
        [1] + [2] * (len(row.depths) - 1),
        alpha=alpha,
        stochdepth_rate=row.stochdepth_rate,
    )
