"""The block of NFNets and NF-RegNets: 1x1, grouped 3x3 once or twice, 1x1."""

from collections.abc import Callable

import haiku as hk
import jax

from nfnets_jax import layers
from nfnets_jax.convolution.conv import Padding
from nfnets_jax.errors import UsageError
from nfnets_jax.models import residual

Array = jax.Array


class NFBlock(hk.Module):
    """shortcut + alpha * gain * branch(beta * activation(x)), without normalisation.

    Args:
      plan: position and shape of the block.
      inner_channels: width between the 1x1 convolutions, rounded down to whole groups.
      activation: variance-preserving nonlinearity.
      group_size: channels in a group of the 3x3 convolutions.
      grouped_convs: number of 3x3 convolutions, 1 or 2; the first has the stride.
      attention: function from the number of channels to the attention module.
      attention_inside: True puts attention after the grouped convolutions (NF-RegNet), False at the
        end (NFNet).
      alpha: weight of the branch.
      skipinit_gain: initial value of the branch's learned gain, or an initialiser.
      skip_gain: True makes that gain a separate parameter; False makes it the gain of the last
        convolution.
      padding: padding of the grouped convolutions.
    """

    def __init__(
        self,
        plan: residual.BlockPlan,
        inner_channels: int,
        activation: layers.Activation,
        *,
        group_size: int,
        grouped_convs: int = 1,
        attention: Callable[[int], residual.Attention],
        attention_inside: bool = False,
        alpha: float,
        skipinit_gain: float | hk.initializers.Initializer,
        skip_gain: bool = True,
        padding: Padding = 'SAME',
        name: str | None = None,
    ):
        super().__init__(name=name)
        self.plan, self.alpha, self.activation = plan, alpha, activation
        self.attention_inside = attention_inside
        self.skip_gain = skipinit_gain if skip_gain else None
        groups = inner_channels // group_size
        if groups == 0:
            raise UsageError(
                f'group_size={group_size}: must be at most the {inner_channels} channels that '
                f'block {plan.index} has inside'
            )
        width, conv = groups * group_size, layers.ScaledWSConv2D
        self.conv0 = conv(width, 1, name='conv0')
        self.grouped = [
            conv(width, 3, stride, groups=groups, padding=padding, name=conv_name)
            for stride, conv_name in ((plan.stride, 'conv1'), (1, 'conv1b'))[:grouped_convs]
        ]
        gain_init = 1.0 if skip_gain else skipinit_gain
        self.conv2 = conv(plan.out_channels, 1, gain_init=gain_init, name='conv2')
        if plan.is_transition:
            self.conv_shortcut = conv(plan.out_channels, 1, name='conv_shortcut')
        self.attention = attention(width if attention_inside else plan.out_channels)

    def __call__(
        self, x: Array, inputs: residual.BlockInputs, is_training: bool
    ) -> tuple[Array, Array]:
        """Returns output and residual branch, both [N, H', W', out], for x [N, H, W, in]."""
        out = inputs.scale(self.activation(x))
        shortcut = x
        if self.plan.is_transition:
            pooled = layers.avg_pool(out, 2, 2) if self.plan.stride > 1 else out
            shortcut = self.conv_shortcut(pooled)
        out = self.conv0(out)
        for conv in self.grouped:
            out = conv(self.activation(out))
        if self.attention_inside:
            out = 2 * self.attention(out) * out
        out = self.conv2(self.activation(out))
        if not self.attention_inside:
            out = 2 * self.attention(out) * out
        return shortcut + residual.weigh(inputs.drop(out), self.alpha, self.skip_gain), out
