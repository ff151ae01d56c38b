"""Normalizer-Free RegNets ("NF-ResNets", arXiv 2101.08692, section 6)."""

from typing import Any, Unpack

import haiku as hk
import jax

from nfnets_jax import layers
from nfnets_jax.convolution import Padding
from nfnets_jax.models import options, residual
from nfnets_jax.models.nf_block import NFBlock

Array = jax.Array


class NFRegNet(hk.Module):
    """A RegNet with depthwise-like groups of 8 and no normalisation, B0 to B8.

    Args:
      num_classes: size of the logits.
      variant: 'B0' to 'B8'.
      expansion: width inside a block over its input width (1 in the first block, as published).
      group_size: channels in each group of the grouped convolutions.
      se_ratio: hidden width of squeeze-and-excitation over its width.
      alpha: weight of the residual branch.
      activation: name in layers.nonlinearities.
      skipinit_gain: initial value of the branch's learned gain, or an initialiser.
      fc_init: standard deviation of the classifier's initial weights, or an initialiser.
      conventions: 'timm' pads convolutions symmetrically and rounds every width to a multiple of 8.
      remat: recompute blocks in the backward pass: less memory, more time.
      scan: compile the equal blocks of a stage once: deep networks compile several times faster.
        Slow on CPUs. See docs/scaling.md.
      **overrides: see options.Overrides; with stem='small' the stem keeps the size of the picture.

    Raises:
      UsageError: an option no network could be built from.
    """

    def __init__(
        self,
        num_classes: int,
        variant: str = 'B0',
        *,
        expansion: float = 2.25,
        group_size: int = 8,
        se_ratio: float = 0.5,
        alpha: float = 0.2,
        activation: str = 'silu',
        skipinit_gain: float | hk.initializers.Initializer = 0.0,
        fc_init: float | hk.initializers.Initializer = 0.0,
        conventions: options.Conventions = 'published',
        remat: bool = False,
        scan: bool = False,
        name: str = 'NF_RegNet',
        **overrides: Unpack[options.Overrides],
    ):
        super().__init__(name=name)
        self.row = row = options.resolve('NF-RegNet', variant, overrides)
        options.check(
            'NF-RegNet',
            num_classes=num_classes,
            expansion=expansion,
            group_size=group_size,
            se_ratio=se_ratio,
            alpha=alpha,
            conventions=conventions,
        )
        is_timm = conventions == 'timm'
        padding: Padding = 'SYMMETRIC' if is_timm else 'SAME'

        def rounded(channels: float) -> int:
            return layers.round_to(channels, 8) if is_timm else int(channels)

        channels = [rounded(width * row.width) for width in row.widths]
        self.remat, self.scan = remat, scan
        self.activation = layers.get_activation(activation, scaled=True)
        self.initial_conv = layers.ScaledWSConv2D(
            channels[0],
            3,
            1 if row.stem == 'small' else 2,
            padding=padding,
            name='initial_conv',
        )
        plans = residual.plan_blocks(
            channels[0],
            channels,
            row.depths,
            [2] * len(row.depths),
            alpha=alpha,
            stochdepth_rate=row.stochdepth_rate,
        )
        self.blocks = [
            NFBlock(
                plan,
                rounded(plan.in_channels * (expansion if plan.index else 1)),
                self.activation,
                group_size=group_size,
                se_ratio=se_ratio,
                se_inside=True,
                alpha=alpha,
                skipinit_gain=skipinit_gain,
                padding=padding,
                se_divisor=8 if is_timm else 1,
            )
            for plan in plans
        ]
        # EfficientNet's 1280 channels, in proportion.
        if is_timm:
            final_channels = rounded(row.width * (1280 * row.widths[-1] // 440))
        else:
            final_channels = 1280 * channels[-1] // 440
        self.final_conv = layers.ScaledWSConv2D(final_channels, 1, name='final_conv')
        self.fc = layers.Linear(num_classes, layers.initializer(fc_init, 'stddev'))

    def __call__(
        self, images: Array, is_training: bool, return_metrics: bool = False
    ) -> dict[str, Any]:
        """Classifies normalised images [N, H, W, 3]; see `create_model`."""
        out, metrics = residual.run_blocks(
            self.blocks,
            self.initial_conv(images),
            is_training,
            remat=self.remat,
            scan=self.scan,
            return_metrics=return_metrics,
        )
        features = self.activation(self.final_conv(out))
        return metrics | residual.classify(features, self.fc, self.row.drop_rate, is_training)
