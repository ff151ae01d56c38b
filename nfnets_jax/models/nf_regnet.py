"""Normalizer-Free RegNets ("NF-ResNets", arXiv 2101.08692, section 6)."""

from typing import Any, Unpack

import haiku as hk
import jax

from nfnets_jax import layers
from nfnets_jax.models import options, residual
from nfnets_jax.models.nf_block import NFBlock

Array = jax.Array


class NFRegNet(hk.Module):
    """A Normalizer-Free RegNet with convolutions in groups of 8 channels, B0 to B8.

    Args:
      num_classes: size of the logits; 0 for features only, without a classifier.
      variant: 'B0' to 'B8'.
      expansion: ratio of the inner width of a block to its input width (1 in the first block, as
        published).
      group_size: channels in each group of the grouped convolutions.
      se_ratio: ratio of the hidden width of squeeze-and-excitation to its input width.
      alpha: weight of the residual branch.
      activation: name in layers.nonlinearities.
      skipinit_gain: initial value of the branch's learned gain, or an initialiser.
      fc_init: standard deviation of the classifier's initial weights, or an initialiser.
      conventions: see options.Conventions.
      remat: recompute blocks in the backward pass: less memory, more time.
      scan: compile the identical blocks of a stage once: deep networks compile several times
        faster. Slow on CPUs. See docs/scaling.md.
      channels: channels of the images; None accepts any number.
      **overrides: see options.Overrides; with stem='small' the stem keeps the size of the image.

    Raises:
      UsageError: no network can be built with an option.
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
        channels: int | None = None,
        name: str = 'NF_RegNet',
        **overrides: Unpack[options.Overrides],
    ):
        super().__init__(name=name)
        self.variant = info = options.resolve('NF-RegNet', variant, overrides)
        options.check(
            'NF-RegNet',
            num_classes=num_classes,
            channels=channels,
            expansion=expansion,
            group_size=group_size,
            se_ratio=se_ratio,
            alpha=alpha,
            conventions=conventions,
        )
        self.form = form = options.form(conventions, activation)

        def rounded(width: float) -> int:
            return layers.round_to(width, 8) if form.is_timm else int(width)

        widths = [rounded(width * info.width) for width in info.widths]
        self.remat, self.scan = remat, scan
        self.activation = layers.get_activation(activation, scaled=True)
        self.initial_conv = layers.ScaledWSConv2D(
            widths[0],
            3,
            1 if info.stem == 'small' else 2,
            padding=form.padding,
            in_channels=channels,
            name='initial_conv',
        )
        plans = residual.plan_blocks(
            widths[0],
            widths,
            info.depths,
            [2] * len(info.depths),
            alpha=alpha,
            stochdepth_rate=info.stochdepth_rate,
        )
        self.blocks = [
            NFBlock(
                plan,
                rounded(plan.in_channels * (expansion if plan.index else 1)),
                self.activation,
                group_size=group_size,
                attention=lambda width: layers.SqueezeExcite(
                    width, se_ratio, 8 if form.is_timm else 1
                ),
                attention_inside=True,
                alpha=alpha,
                skipinit_gain=skipinit_gain,
                skip_gain=form.skip_gain,
                padding=form.padding,
            )
            for plan in plans
        ]
        # EfficientNet's 1280 channels, scaled with the width of the last stage.
        if form.is_timm:
            final_channels = rounded(info.width * (1280 * info.widths[-1] // 440))
        else:
            final_channels = 1280 * widths[-1] // 440
        self.final_conv = layers.ScaledWSConv2D(final_channels, 1, name='final_conv')
        self.fc = residual.make_classifier(num_classes, layers.initializer(fc_init, 'stddev'))

    def __call__(
        self,
        images: Array,
        is_training: bool,
        return_metrics: bool = False,
        return_features: bool = False,
    ) -> dict[str, Any]:
        """Classifies normalised images [N, H, W, C]; see `create_model`."""
        out, extras = residual.run_blocks(
            self.blocks,
            self.initial_conv(self.form.scale(images)),
            is_training,
            remat=self.remat,
            scan=self.scan,
            return_metrics=return_metrics,
            return_features=return_features,
        )
        features = self.form.final_activation(self.final_conv(self.form.scale(out)))
        return extras | residual.classify(features, self.fc, self.variant.drop_rate, is_training)
