"""SkipInit ResNets: the unnormalized baseline of arXiv 2002.10444, as the NFNets authors ran it."""

from typing import Any, Unpack

import haiku as hk
import jax

from nfnets_jax import fields, layers
from nfnets_jax.models import options, residual, resnet_parts
from nfnets_jax.models.nf_resnet import NFResBlock

Array = jax.Array


class SkipInitResNet(hk.Module):
    """A pre-activation ResNet with a zero-initialised gain on every branch instead of a norm.

    Unlike NFResNet, it does not standardize weights, scale activations or divide the input of a
    block by its expected standard deviation.

    `activation` is not scaled.

    Args:
      num_classes: size of the logits; 0 for features only, without a classifier.
      variant: '50', '101', '152', '200', '288' or '600'; for small images '8' to '110'.
      **overrides: these and the keyword arguments are options, described in docs/config.md.

    Raises:
      UsageError: no network can be built with an option.
    """

    @fields.checked()
    def __init__(
        self,
        num_classes: options.NumClasses,
        variant: str = '50',
        *,
        activation: options.Activation = 'relu',
        skipinit_gain: options.SkipinitGain = 0.0,
        fc_init: options.FcInit = 0.0,
        remat: options.Remat = False,
        scan: options.Scan = False,
        channels: options.Channels = None,
        name: str = 'SkipInit_ResNet',
        **overrides: Unpack[options.ResNetOverrides],
    ):
        super().__init__(name=name)
        self.variant = info = options.resolve('SkipInit-ResNet', variant, overrides)
        self.remat, self.scan = remat, scan
        self.activation = layers.get_activation(activation, scaled=False)
        self.initial_conv = layers.Conv2D(
            *resnet_parts.stem_shape(info),
            with_bias=False,
            in_channels=channels,
            name='initial_conv',
        )
        self.blocks = [
            NFResBlock(
                plan,
                resnet_parts.branch_shapes(info, plan),
                self.activation,
                conv=layers.Conv2D,
                alpha=1.0,
                skipinit_gain=skipinit_gain,
            )
            for plan in resnet_parts.plan_resnet(info)
        ]
        self.fc = residual.make_classifier(num_classes, layers.initializer(fc_init, 'stddev'))

    def __call__(
        self,
        images: Array,
        is_training: bool,
        return_metrics: bool = False,
        return_features: bool = False,
    ) -> dict[str, Any]:
        """Classifies normalized images [N, H, W, C]; see `create_model`."""
        out = resnet_parts.stem_pool(self.variant, self.initial_conv(images))
        out, extras = residual.run_blocks(
            self.blocks,
            out,
            is_training,
            remat=self.remat,
            scan=self.scan,
            return_metrics=return_metrics,
            return_features=return_features,
        )
        features = self.activation(out)
        return extras | residual.classify(features, self.fc, self.variant.drop_rate, is_training)
