"""NFNets ("High-Performance Large-Scale Image Recognition Without Normalization", 2102.06171)."""

from collections.abc import Sequence
from typing import Annotated, Any, Unpack

import haiku as hk
import jax

from nfnets_jax import fields, layers
from nfnets_jax.convolution import packed
from nfnets_jax.errors import UsageError
from nfnets_jax.fields import Field
from nfnets_jax.models import options, residual
from nfnets_jax.models.nf_block import NFBlock

Array = jax.Array


class NFNet(hk.Module):
    """A Normalizer-Free network, F0 to F7 and the wider F0+ to F7+.

    `width` does not reach the stem, as published; with stem='small' the stem keeps the size of the
    image.

    Args:
      num_classes: size of the logits; 0 for features only, without a classifier.
      variant: 'F0' to 'F7', 'F0+' to 'F7+'.
      **overrides: these and the keyword arguments are options, described in docs/config.md.

    Raises:
      UsageError: no network can be built with an option.
    """

    @fields.checked()
    def __init__(
        self,
        num_classes: options.NumClasses,
        variant: str = 'F0',
        *,
        expansion: Annotated[
            float,
            Field(
                'Ratio of the width of the grouped convolutions to the width of the block.', above=0
            ),
        ] = 0.5,
        group_size: options.GroupSize = 128,
        big_width: Annotated[bool, Field('Expand from the output width, not the input.')] = True,
        use_two_convs: Annotated[bool, Field('Two grouped 3x3 convolutions, not one.')] = True,
        use_eca: Annotated[bool, Field('ECA instead of squeeze-and-excitation.')] = False,
        se_ratio: options.SeRatio = 0.5,
        alpha: options.Alpha = 0.2,
        final_conv_mult: Annotated[
            float | None,
            Field(
                'Ratio of the width of the last 1x1 convolution to that of the last block; None: '
                'final_conv_ch.',
                above=0,
            ),
        ] = 2,
        final_conv_ch: Annotated[
            int | None,
            Field('Width of the last convolution where final_conv_mult is None.', low=1),
        ] = None,
        stem_width: Annotated[
            int | None,
            Field(
                'Channels of the last stem convolution; None: half the width of the first stage.',
                low=8,
                rule=lambda width: width % 8 == 0,
                wants='a positive multiple of 8, or None',
            ),
        ] = None,
        activation: options.Activation = 'gelu',
        skipinit_gain: options.SkipinitGain = 0.0,
        fc_init: options.FcInit = 0.01,
        conventions: options.Conventions = 'published',
        remat: options.Remat = False,
        scan: options.Scan = False,
        channels: options.Channels = None,
        name: str = 'NFNet',
        **overrides: Unpack[options.Overrides],
    ):
        super().__init__(name=name)
        self.variant = info = options.resolve('NFNet', variant, overrides)
        if final_conv_mult is not None:
            final_conv_ch = int(final_conv_mult * info.channels[-1])
        elif final_conv_ch is None:
            raise UsageError('final_conv_ch=None: must be given, as final_conv_mult is None')
        if final_conv_ch < 1:
            raise UsageError(
                f'final_conv_mult={final_conv_mult}: leaves the last convolution empty'
            )
        self.form = form = options.form(conventions, activation)
        self.remat, self.scan = remat, scan
        self.activation = layers.get_activation(activation, scaled=True)
        strides = (1, 1, 1, 1) if info.stem == 'small' else (2, 1, 1, 2)
        if stem_width is None:
            stem_channels = (16, 32, 64, info.widths[0] // 2)
        else:
            stem_channels = (stem_width // 8, stem_width // 4, stem_width // 2, stem_width)
        options.check_channels(info, (*stem_channels, *info.channels))
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
        """Classifies normalized images [N, H, W, C]; see `create_model`."""
        out = _apply_stem(self.stem, self.activation, self.form.scale(images), is_training)
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


def _apply_stem(
    convs: Sequence[layers.ScaledWSConv2D],
    activation: layers.Activation,
    x: Array,
    is_training: bool,
) -> Array:
    """Computes the stem; in training as one chain, for which a TPU takes half as long."""
    strides, padding = tuple(conv.stride for conv in convs), convs[0].padding
    height, width, channels = x.shape[1:]
    # Where the network is not trained, interceptors may replace the calls: see weights/export.py.
    as_chain = is_training and not hk.running_init()
    if not as_chain or not packed.can_pack(strides, padding, height, width):
        out = convs[0](x)
        for conv in convs[1:]:
            out = conv(activation(out))
        return out
    inputs = (channels, *(conv.output_channels for conv in convs[:-1]))
    kernels = [conv.effective(n, x.dtype) for conv, n in zip(convs, inputs, strict=True)]
    return packed.chain(packed.ChainOptions(strides, padding, activation, 'stem_conv'), x, kernels)
