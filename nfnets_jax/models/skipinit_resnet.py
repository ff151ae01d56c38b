"""SkipInit ResNets: the unnormalised baseline of arXiv 2002.10444, as the NFNets authors ran it."""

from typing import Any, Unpack

import haiku as hk
import jax

from nfnets_jax import layers
from nfnets_jax.models import options, residual, resnet_parts
from nfnets_jax.models.nf_resnet import NFResBlock

Array = jax.Array


class SkipInitResNet(hk.Module):
    """A pre-activation ResNet with a zero-initialised gain on every branch instead of a norm.

    Unlike NFResNet, it does not standardise weights, scale activations or divide the input of a
    block by its expected standard deviation.

    Args:
      num_classes: size of the logits; 0 for features only, without a classifier.
      variant: '50', '101', '152', '200', '288' or '600'; for small images '8' to '110'.
      activation: name in layers.activations; not scaled.
      skipinit_gain: initial value of the branch's learned gain, or an initialiser.
      fc_init: standard deviation of the classifier's initial weights, or an initialiser.
      remat: recompute blocks in the backward pass: less memory, more time.
      scan: compile the identical blocks of a stage once: deep networks compile several times
        faster. Slow on CPUs. See docs/scaling.md.
      channels: channels of the images; None accepts any number.
      **overrides: see options.ResNetOverrides.

    Raises:
      UsageError: no network can be built with an option.
    """

    def __init__(
        self,
        num_classes: int,
        variant: str = '50',
        *,
        activation: str = 'relu',
        skipinit_gain: float | hk.initializers.Initializer = 0.0,
        fc_init: float | hk.initializers.Initializer = 0.0,
        remat: bool = False,
        scan: bool = False,
        channels: int | None = None,
        name: str = 'SkipInit_ResNet',
        **overrides: Unpack[options.ResNetOverrides],
    ):
        super().__init__(name=name)
        self.variant = info = options.resolve('SkipInit-ResNet', variant, overrides)
        options.check('SkipInit-ResNet', num_classes=num_classes, channels=channels)
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
        """Classifies normalised images [N, H, W, C]; see `create_model`."""
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
