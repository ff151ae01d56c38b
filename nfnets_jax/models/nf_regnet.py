"""Normalizer-Free RegNets ("NF-ResNets", arXiv 2101.08692, section 6)."""

from typing import Annotated, Any, Unpack

import haiku as hk
import jax

from nfnets_jax import fields, layers
from nfnets_jax.fields import Field
from nfnets_jax.models import options, residual
from nfnets_jax.models.nf_block import NFBlock

Array = jax.Array


class NFRegNet(hk.Module):
    """A Normalizer-Free RegNet with convolutions in groups of 8 channels, B0 to B8.

    With stem='small' the stem keeps the size of the image.

    Args:
      num_classes: size of the logits; 0 for features only, without a classifier.
      variant: 'B0' to 'B8'.
      **overrides: these and the keyword arguments are options, described in docs/config.md.

    Raises:
      UsageError: no network can be built with an option.
    """

    @fields.checked()
    def __init__(
        self,
        num_classes: options.NumClasses,
        variant: str = 'B0',
        *,
        expansion: Annotated[
            float,
            Field(
                'Ratio of the inner width of a block to its input width; 1 in the first block, as '
                'published.',
                above=0,
            ),
        ] = 2.25,
        group_size: options.GroupSize = 8,
        se_ratio: options.SeRatio = 0.5,
        alpha: options.Alpha = 0.2,
        activation: options.Activation = 'silu',
        skipinit_gain: options.SkipinitGain = 0.0,
        fc_init: options.FcInit = 0.0,
        conventions: options.Conventions = 'published',
        remat: options.Remat = False,
        scan: options.Scan = False,
        channels: options.Channels = None,
        name: str = 'NF_RegNet',
        **overrides: Unpack[options.Overrides],
    ):
        super().__init__(name=name)
        self.variant = info = options.resolve('NF-RegNet', variant, overrides)
        self.form = form = options.form(conventions, activation)

        def rounded(width: float) -> int:
            return layers.round_to(width, 8) if form.is_timm else int(width)

        widths = [rounded(width * info.width) for width in info.widths]
        options.check_channels(info, widths)
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
        """Classifies normalized images [N, H, W, C]; see `create_model`."""
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
