"""NFNets ("High-Performance Large-Scale Image Recognition Without Normalization", 2102.06171)."""

from typing import Any, Unpack

import haiku as hk
import jax

from nfnets_jax import layers
from nfnets_jax.errors import UsageError
from nfnets_jax.models import options, residual
from nfnets_jax.models.nf_block import NFBlock

Array = jax.Array


class NFNet(hk.Module):
    """A Normalizer-Free network, F0 to F7 and the wider F0+ to F7+.

    Args:
      num_classes: size of the logits.
      variant: 'F0' to 'F7', 'F0+' to 'F7+'.
      expansion: width of the grouped convolutions over the width of the block.
      group_size: channels in each of their groups.
      big_width: whether `expansion` multiplies the block's output width, or its input width.
      use_two_convs: two grouped 3x3 convolutions in a block, or one.
      se_ratio: hidden width of squeeze-and-excitation over its width.
      alpha: weight of the residual branch.
      final_conv_mult: width of the last 1x1 convolution over that of the last block; None to
        give it as final_conv_ch.
      final_conv_ch: width of the last convolution if final_conv_mult is None.
      activation: name in layers.nonlinearities.
      skipinit_gain: initial value of the branch's learned gain, or an initialiser.
      fc_init: standard deviation of the classifier's initial weights, or an initialiser.
      remat: recompute blocks in the backward pass: less memory, more time.
      scan: compile the equal blocks of a stage once: deep networks compile several times faster.
        Slow on CPUs. See docs/scaling.md.
      **overrides: see options.Overrides. `width` does not reach the stem, as published; with
        stem='small' the stem keeps the size of the picture.

    Raises:
      UsageError: an option no network could be built from.
    """

    def __init__(
        self,
        num_classes: int,
        variant: str = 'F0',
        *,
        expansion: float = 0.5,
        group_size: int = 128,
        big_width: bool = True,
        use_two_convs: bool = True,
        se_ratio: float = 0.5,
        alpha: float = 0.2,
        final_conv_mult: float | None = 2,
        final_conv_ch: int | None = None,
        activation: str = 'gelu',
        skipinit_gain: float | hk.initializers.Initializer = 0.0,
        fc_init: float | hk.initializers.Initializer = 0.01,
        remat: bool = False,
        scan: bool = False,
        name: str = 'NFNet',
        **overrides: Unpack[options.Overrides],
    ):
        super().__init__(name=name)
        self.row = row = options.resolve('NFNet', variant, overrides)
        if final_conv_mult is not None:
            final_conv_ch = int(final_conv_mult * row.channels[-1])
        elif final_conv_ch is None:
            raise UsageError('NFNet final_conv_ch: must be given, as final_conv_mult is None')
        options.check(
            'NFNet',
            num_classes=num_classes,
            expansion=expansion,
            group_size=group_size,
            se_ratio=se_ratio,
            alpha=alpha,
            final_conv_ch=final_conv_ch,
        )
        self.remat, self.scan = remat, scan
        self.activation = layers.get_activation(activation, scaled=True)
        strides = (1, 1, 1, 1) if row.stem == 'small' else (2, 1, 1, 2)
        stem_channels = (16, 32, 64, row.widths[0] // 2)
        self.stem = [
            layers.ScaledWSConv2D(channels, 3, stride, name=f'stem_conv{i}')
            for i, (channels, stride) in enumerate(zip(stem_channels, strides, strict=True))
        ]
        plans = residual.plan_blocks(
            stem_channels[-1],
            row.channels,
            row.depths,
            [1] + [2] * (len(row.depths) - 1),
            alpha=alpha,
            stochdepth_rate=row.stochdepth_rate,
        )
        self.blocks = [
            NFBlock(
                plan,
                int((plan.out_channels if big_width else plan.in_channels) * expansion),
                self.activation,
                group_size=group_size,
                grouped_convs=2 if use_two_convs else 1,
                alpha=alpha,
                se_ratio=se_ratio,
                skipinit_gain=skipinit_gain,
            )
            for plan in plans
        ]
        self.final_conv = layers.ScaledWSConv2D(final_conv_ch, 1, name='final_conv')
        self.fc = layers.Linear(num_classes, layers.initializer(fc_init, 'stddev'))

    def __call__(
        self, images: Array, is_training: bool, return_metrics: bool = False
    ) -> dict[str, Any]:
        """Classifies normalised images [N, H, W, 3]; see `create_model`."""
        out = self.stem[0](images)
        for conv in self.stem[1:]:
            out = conv(self.activation(out))
        out, metrics = residual.run_blocks(
            self.blocks,
            out,
            is_training,
            remat=self.remat,
            scan=self.scan,
            return_metrics=return_metrics,
        )
        features = self.activation(self.final_conv(out))
        return metrics | residual.classify(features, self.fc, self.row.drop_rate, is_training)
