"""The block of NFNets and NF-RegNets: 1x1, grouped 3x3 once or twice, 1x1."""

import haiku as hk
import jax
import jax.numpy as jnp

from nfnets_jax import layers
from nfnets_jax.convolution import Padding
from nfnets_jax.errors import UsageError
from nfnets_jax.models import residual

Array = jax.Array


class NFBlock(hk.Module):
    """shortcut + alpha * gain * branch(beta * activation(x)), without normalisation.

    Args:
      plan: where the block stands.
      inner_channels: width between the 1x1 convolutions, rounded down to whole groups.
      activation: variance-preserving.
      group_size: channels in a group of the 3x3 convolutions.
      grouped_convs: 1 or 2 of them; the first has the stride.
      se_ratio: of squeeze-and-excitation.
      se_inside: gates after the grouped convolutions (NF-RegNet), or at the end (NFNet).
      alpha: weight of the branch.
      skipinit_gain: initial value of the branch's learned gain, or an initialiser.
      padding: of the grouped convolutions.
      se_divisor: of the hidden width of squeeze-and-excitation.
    """

    def __init__(
        self,
        plan: residual.BlockPlan,
        inner_channels: int,
        activation: layers.Activation,
        *,
        group_size: int,
        grouped_convs: int = 1,
        se_ratio: float,
        se_inside: bool = False,
        alpha: float,
        skipinit_gain: float | hk.initializers.Initializer,
        padding: Padding = 'SAME',
        se_divisor: int = 1,
        name: str | None = None,
    ):
        super().__init__(name=name)
        self.plan, self.alpha, self.activation = plan, alpha, activation
        self.se_inside = se_inside
        self.skipinit_gain = layers.initializer(skipinit_gain, 'constant')
        groups = inner_channels // group_size
        if groups == 0:
            raise UsageError(
                f'group_size: must be at most the {inner_channels} channels that block '
                f'{plan.index} has inside, not {group_size}'
            )
        width, conv = groups * group_size, layers.ScaledWSConv2D
        self.conv0 = conv(width, 1, name='conv0')
        self.grouped = [
            conv(width, 3, stride, groups=groups, padding=padding, name=conv_name)
            for stride, conv_name in ((plan.stride, 'conv1'), (1, 'conv1b'))[:grouped_convs]
        ]
        self.conv2 = conv(plan.out_channels, 1, name='conv2')
        if plan.is_transition:
            self.conv_shortcut = conv(plan.out_channels, 1, name='conv_shortcut')
        se_channels = width if se_inside else plan.out_channels
        self.se = layers.SqueezeExcite(se_channels, se_ratio, se_divisor)

    def __call__(self, x: Array, own: residual.Own, is_training: bool) -> tuple[Array, Array]:
        """[N, H, W, in] -> the block's output and its residual branch, [N, H', W', out] both."""
        out = own.scale(self.activation(x))
        shortcut = x
        if self.plan.is_transition:
            pooled = layers.avg_pool(out, 2, 2) if self.plan.stride > 1 else out
            shortcut = self.conv_shortcut(pooled)
        out = self.conv0(out)
        for conv in self.grouped:
            out = conv(self.activation(out))
        if self.se_inside:
            out = 2 * self.se(out) * out
        out = self.conv2(self.activation(out))
        if not self.se_inside:
            out = 2 * self.se(out) * out
        gain = hk.get_parameter('skip_gain', (), jnp.float32, init=self.skipinit_gain)
        branch = own.drop(out)
        return shortcut + branch * (gain * self.alpha).astype(branch.dtype), out
