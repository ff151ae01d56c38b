"""What every residual network here is made of: the plan of its blocks, its body and its head."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import haiku as hk
import jax
import jax.numpy as jnp

from nfnets_jax import layers

Array = jax.Array
# block(x, is_training, ...) -> (output, residual branch before it is scaled and added)
Block = Callable[..., tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """Where a block stands in its network.

    Attributes:
      index: from 0 over the whole network.
      in_channels, out_channels: of the block.
      stride: of the block.
      beta: 1 / expected standard deviation of the block's input at initialisation.
      stochdepth_rate: probability of dropping the branch, linear in the index.
    """

    index: int
    in_channels: int
    out_channels: int
    stride: int
    beta: float
    stochdepth_rate: float

    @property
    def is_transition(self) -> bool:
        """Whether the shortcut must change shape, and so needs a convolution of its own."""
        return self.stride > 1 or self.in_channels != self.out_channels


def plan_blocks(
    in_channels: int,
    widths: Sequence[int],
    depths: Sequence[int],
    strides: Sequence[int],
    *,
    alpha: float = 0.0,
    stochdepth_rate: float = 0.0,
) -> list[BlockPlan]:
    """Lays out stages of blocks; the first of each stage has the stride and the new width.

    The input of block l has variance Var_l = Var_{l-1} + alpha^2 at initialisation, except that a
    transition block puts the normalised signal on its shortcut too, which resets the variance to
    1 before the branch is added ("NF-ResNets", section 3).
    """
    plans: list[BlockPlan] = []
    variance = 1.0
    for width, depth, stage_stride in zip(widths, depths, strides, strict=True):
        for position in range(depth):
            plan = BlockPlan(
                index=len(plans),
                in_channels=in_channels,
                out_channels=width,
                stride=stage_stride if position == 0 else 1,
                beta=1.0 / math.sqrt(variance),
                stochdepth_rate=stochdepth_rate * len(plans) / sum(depths),
            )
            plans.append(plan)
            in_channels = width
            variance = (1.0 if plan.is_transition else variance) + alpha**2
    return plans


def run_blocks(
    blocks: Iterable[Block], x: Array, *block_args: bool, remat: bool, return_metrics: bool
) -> tuple[Array, dict[str, dict[str, Array]]]:
    """Runs x through the blocks.

    Args:
      blocks: applied in order.
      x: [N, H, W, C], the output of the stem.
      *block_args: what a block takes besides x, is_training first.
      remat: recompute each block in the backward pass instead of storing what is inside it.
      return_metrics: whether to measure the signal.

    Returns:
      The last block's output and {'signal': layers.signal_metrics}, or {} if not asked for.
    """
    activations, branches = [x], []
    for block in blocks:

        def apply(x: Array, block: Block = block) -> tuple[Array, Array]:
            return block(x, *block_args)

        x, branch = (hk.remat(apply) if remat else apply)(x)
        if return_metrics:
            activations.append(x)
            branches.append(branch)
    return x, {'signal': layers.signal_metrics(activations, branches)} if return_metrics else {}


def drop_branch(branch: Array, plan: BlockPlan, is_training: bool) -> Array:
    """In training, stochastic depth at the rate of the block."""
    if not is_training or plan.stochdepth_rate == 0:
        return branch
    return layers.stochastic_depth(hk.next_rng_key(), plan.stochdepth_rate, branch)


def classify(
    features: Array, classifier: Callable[[Array], Array], drop_rate: float, is_training: bool
) -> dict[str, Array]:
    """Global average pooling, dropout and the classifier, in float32 whatever the features.

    Returns:
      'pool', [N, C] before dropout, and 'logits', [N, classes].
    """
    pool = jnp.mean(features.astype(jnp.float32), (1, 2))
    dropped = pool
    if is_training and drop_rate > 0:
        dropped = hk.dropout(hk.next_rng_key(), drop_rate, pool)
    return {'pool': pool, 'logits': classifier(dropped)}
