"""FixUp ResNets: the unnormalized baseline of arXiv 1901.09321, as the NFNets authors ran it."""

import math
from typing import Any, Unpack

import haiku as hk
import jax
import jax.numpy as jnp

from nfnets_jax import fields, layers
from nfnets_jax.models import options, residual, resnet_parts

Array = jax.Array


class FixupResNet(hk.Module):
    """A post-activation ResNet with rescaled initial weights and scalar biases instead of a norm.

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
        fc_init: options.FcInit = 0.0,
        remat: options.Remat = False,
        scan: options.Scan = False,
        channels: options.Channels = None,
        name: str = 'FixUp_ResNet',
        **overrides: Unpack[options.ResNetOverrides],
    ):
        super().__init__(name=name)
        self.variant = info = options.resolve('Fixup-ResNet', variant, overrides)
        self.remat, self.scan = remat, scan
        self.activation = layers.get_activation(activation, scaled=False)
        self.initial_conv = layers.Conv2D(
            *resnet_parts.stem_shape(info),
            with_bias=False,
            in_channels=channels,
            name='initial_conv',
        )
        plans = resnet_parts.plan_resnet(info)
        self.blocks = [
            ResBlock(plan, resnet_parts.branch_shapes(info, plan), self.activation, len(plans))
            for plan in plans
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
        out = self.activation(_add_scalar(self.initial_conv(images), 'bias1'))
        out = resnet_parts.stem_pool(self.variant, out)
        out, extras = residual.run_blocks(
            self.blocks,
            out,
            is_training,
            remat=self.remat,
            scan=self.scan,
            return_metrics=return_metrics,
            return_features=return_features,
        )

        if (last := self.fc) is None:
            return extras | residual.classify(out, None, self.variant.drop_rate, is_training)

        def classifier(pool: Array) -> Array:
            return last(_add_scalar(pool, 'bias2'))

        return extras | residual.classify(out, classifier, self.variant.drop_rate, is_training)


class ResBlock(hk.Module):
    """activation(x + branch(x)), with a scalar bias around every convolution and activation.

    Each of L branches has m convolutions. The last starts at zero. The others have He
    initialisation times L^(-1 / (2m - 2)) each, so that their product shrinks as 1 / sqrt(L).
    """

    def __init__(
        self,
        plan: residual.BlockPlan,
        branch: list[resnet_parts.ConvArgs],
        activation: layers.Activation,
        num_blocks: int,
        name: str | None = None,
    ):
        super().__init__(name=name)
        self.plan, self.activation = plan, activation
        depth_scale = num_blocks ** (-1 / (2 * len(branch) - 2))
        self.convs = []
        for i, (channels, kernel_size, stride) in enumerate(branch):
            stddev = depth_scale * math.sqrt(2 / (channels * kernel_size**2))
            is_last = i == len(branch) - 1
            self.convs.append(
                layers.Conv2D(
                    channels,
                    kernel_size,
                    stride,
                    with_bias=False,
                    w_init=layers.initializer(0.0 if is_last else stddev, 'stddev'),
                    name=f'conv{i}',
                )
            )
        if plan.is_transition:
            self.conv_shortcut = layers.Conv2D(
                plan.out_channels,
                1,
                plan.stride,
                with_bias=False,
                w_init=hk.initializers.RandomNormal(math.sqrt(2 / plan.out_channels)),
                name='conv_shortcut',
            )

    def __call__(
        self, x: Array, inputs: residual.BlockInputs, is_training: bool
    ) -> tuple[Array, Array]:
        """Returns output and residual branch, both [N, H', W', out], for x [N, H, W, in]."""
        out = _add_scalar(x, 'bias1a')
        shortcut = self.conv_shortcut(out) if self.plan.is_transition else out
        out = self.convs[0](out)
        for i, conv in enumerate(self.convs[1:], start=1):
            out = self.activation(_add_scalar(out, f'bias{i}b'))
            out = conv(_add_scalar(out, f'bias{i + 1}a'))
        scale = hk.get_parameter('scale', (), jnp.float32, init=jnp.ones)
        out = _add_scalar(out * scale.astype(out.dtype), f'bias{len(self.convs)}b')
        branch = inputs.drop(out)
        return self.activation(shortcut + branch), out


def _add_scalar(x: Array, name: str) -> Array:
    """Returns x plus the scalar parameter `name` of the module whose method calls this."""
    return x + hk.get_parameter(name, (), jnp.float32, init=jnp.zeros).astype(x.dtype)
