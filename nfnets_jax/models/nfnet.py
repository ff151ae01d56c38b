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
      num_classes: size of the logits; 0 for features only, without a classifier.
      variant: 'F0' to 'F7', 'F0+' to 'F7+'.
      expansion: ratio of the width of the grouped convolutions to the width of the block.
      group_size: channels in each group of these convolutions.
      big_width: True multiplies the output width of a block by `expansion`, False its input width.
      use_two_convs: True puts two grouped 3x3 convolutions in a block, False one.
      use_eca: efficient channel attention instead of squeeze-and-excitation.
      se_ratio: ratio of the hidden width of squeeze-and-excitation to its input width.
      alpha: weight of the residual branch.
      final_conv_mult: ratio of the width of the last 1x1 convolution to that of the last block;
        None uses final_conv_ch.
      final_conv_ch: width of the last convolution if final_conv_mult is None.
      stem_width: channels of the last stem convolution; None for half the width of the first stage.
      activation: name in layers.nonlinearities.
      skipinit_gain: initial value of the branch's learned gain, or an initialiser.
      fc_init: standard deviation of the classifier's initial weights, or an initialiser.
      conventions: see options.Conventions.
      remat: recompute blocks in the backward pass: less memory, more time.
      scan: compile the identical blocks of a stage once: deep networks compile several times
        faster. Slow on CPUs. See docs/scaling.md.
      channels: channels of the images; None accepts any number.
      **overrides: see options.Overrides. `width` does not reach the stem, as published; with
        stem='small' the stem keeps the size of the image.

    Raises:
      UsageError: no network can be built with an option.
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
        use_eca: bool = False,
        se_ratio: float = 0.5,
        alpha: float = 0.2,
        final_conv_mult: float | None = 2,
        final_conv_ch: int | None = None,
        stem_width: int | None = None,
        activation: str = 'gelu',
        skipinit_gain: float | hk.initializers.Initializer = 0.0,
        fc_init: float | hk.initializers.Initializer = 0.01,
        conventions: options.Conventions = 'published',
        remat: bool = False,
        scan: bool = False,
        channels: int | None = None,
        name: str = 'NFNet',
        **overrides: Unpack[options.Overrides],
    ):
        super().__init__(name=name)
        self.variant = info = options.resolve('NFNet', variant, overrides)
        if final_conv_mult is not None:
            final_conv_ch = int(final_conv_mult * info.channels[-1])
        elif final_conv_ch is None:
            raise UsageError('NFNet final_conv_ch: must be given, as final_conv_mult is None')
        options.check(
            'NFNet',
            num_classes=num_classes,
            channels=channels,
            conventions=conventions,
            expansion=expansion,
            group_size=group_size,
            se_ratio=se_ratio,
            alpha=alpha,
            final_conv_ch=final_conv_ch,
        )
        self.form = form = options.form(conventions, activation)
        self.remat, self.scan = remat, scan
        self.activation = layers.get_activation(activation, scaled=True)
        strides = (1, 1, 1, 1) if info.stem == 'small' else (2, 1, 1, 2)
        if stem_width is None:
            stem_channels = (16, 32, 64, info.widths[0] // 2)
        else:
            options.check('NFNet', stem_width=stem_width)
            stem_channels = (stem_width // 8, stem_width // 4, stem_width // 2, stem_width)
        self.stem = [
            layers.ScaledWSConv2D(
                width,
                3,
                stride,
                padding=form.padding,
                in_channels=None if i else channels,
                name=f'stem_conv{i}',
            )
            for i, (width, stride) in enumerate(zip(stem_channels, strides, strict=True))
        ]
        plans = residual.plan_blocks(
            stem_channels[-1],
            info.channels,
            info.depths,
            [1] + [2] * (len(info.depths) - 1),
            alpha=alpha,
            stochdepth_rate=info.stochdepth_rate,
        )
        self.blocks = [
            NFBlock(
                plan,
                int((plan.out_channels if big_width else plan.in_channels) * expansion),
                self.activation,
                group_size=group_size,
                grouped_convs=2 if use_two_convs else 1,
                alpha=alpha,
                attention=options.attention(use_eca, se_ratio, form),
                skipinit_gain=skipinit_gain,
                skip_gain=form.skip_gain,
                padding=form.padding,
            )
            for plan in plans
        ]
        self.final_conv = layers.ScaledWSConv2D(final_conv_ch, 1, name='final_conv')
        self.fc = residual.make_classifier(num_classes, layers.initializer(fc_init, 'stddev'))

    def __call__(
        self,
        images: Array,
        is_training: bool,
        return_metrics: bool = False,
        return_features: bool = False,
    ) -> dict[str, Any]:
        """Classifies normalised images [N, H, W, C]; see `create_model`."""
        out = self.stem[0](self.form.scale(images))
        for conv in self.stem[1:]:
            out = conv(self.activation(out))
        out, extras = residual.run_blocks(
            self.blocks,
            out,
            is_training,
            remat=self.remat,
            scan=self.scan,
            return_metrics=return_metrics,
            return_features=return_features,
        )
        features = self.form.final_activation(self.final_conv(self.form.scale(out)))
        return extras | residual.classify(features, self.fc, self.variant.drop_rate, is_training)
