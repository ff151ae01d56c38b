"""Normalizer-Free ResNets ("NF-ResNets", arXiv 2101.08692)."""

import functools
from collections.abc import Callable
from typing import Annotated, Any, Unpack

import haiku as hk
import jax

from nfnets_jax import fields, layers
from nfnets_jax.errors import UsageError
from nfnets_jax.fields import Field
from nfnets_jax.models import options, residual, resnet_parts

Array = jax.Array


class NFResNet(hk.Module):
    """A pre-activation ResNet whose blocks keep the variance of the signal by construction.

    Setting standardize, activation_gain or downscale to False removes one part of the variance
    preservation, for ablations; parameters and initial values stay the same.

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
        alpha: options.Alpha = 0.2,
        standardize: Annotated[bool, Field('Scaled weight standardization.')] = True,
        activation_gain: Annotated[bool, Field('Scale activations by their gain gamma.')] = True,
        downscale: Annotated[bool, Field('Scale the input of a branch by beta, not 1.')] = True,
        use_se: options.UseSe = False,
        use_eca: Annotated[bool, Field('Efficient channel attention of the branch.')] = False,
        se_ratio: options.SeRatio = 0.25,
        activation: options.Activation = 'relu',
        skipinit_gain: options.SkipinitGain = 0.0,
        fc_init: options.FcInit = 0.01,
        stem_bn: Annotated[
            bool,
            Field(
                'Batch norm after the first convolution. No published NF-ResNet has it; use it to '
                'compare with networks that kept one.'
            ),
        ] = False,
        cross_replica_axis: options.CrossReplicaAxis = None,
        conventions: options.Conventions = 'published',
        remat: options.Remat = False,
        scan: options.Scan = False,
        channels: options.Channels = None,
        name: str = 'NF_ResNet',
        **overrides: Unpack[options.ResNetOverrides],
    ):
        super().__init__(name=name)
        self.variant = info = options.resolve('NF-ResNet', variant, overrides)
        if use_se and use_eca:
            raise UsageError('use_eca=True: must be False where use_se is True')
        self.form = form = options.form(conventions, activation, scaled=activation_gain)
        conv = functools.partial(
            layers.ScaledWSConv2D, padding=form.padding, standardize=standardize
        )
        self.remat, self.scan = remat, scan
        self.activation = layers.get_activation(activation, scaled=activation_gain)
        self.initial_conv = conv(
            *resnet_parts.stem_shape(info), in_channels=channels, name='initial_conv'
        )
        self.initial_bn = (
            layers.BatchNorm(cross_replica_axis=cross_replica_axis, name='initial_bn')
            if stem_bn
            else None
        )
        self.blocks = [
            NFResBlock(
                plan,
                resnet_parts.branch_shapes(info, plan),
                self.activation,
                conv=conv,
                pool_shortcut=form.is_timm,
                alpha=alpha,
                attention=options.attention(use_eca, se_ratio, form) if use_se or use_eca else None,
                skipinit_gain=skipinit_gain,
                skip_gain=form.skip_gain,
            )
            # With alpha = 0 the plan assumes that branches add no variance, so beta is 1.
            for plan in resnet_parts.plan_resnet(info, alpha if downscale else 0.0)
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
        out = self.initial_conv(self.form.scale(images))
        if self.initial_bn:
            out = self.initial_bn(out, is_training)
        out = resnet_parts.stem_pool(self.variant, out, self.form.padding)
        out, extras = residual.run_blocks(
            self.blocks,
            out,
            is_training,
            remat=self.remat,
            scan=self.scan,
            return_metrics=return_metrics,
            return_features=return_features,
        )
        features = self.form.final_activation(out)
        return extras | residual.classify(features, self.fc, self.variant.drop_rate, is_training)


class NFResBlock(hk.Module):
    """x + alpha * gain * branch(beta * activation(x)), without normalization.

    SkipInit ResNets use the same block with plain convolutions and alpha = 1.
    """

    def __init__(
        self,
        plan: residual.BlockPlan,
        branch: list[resnet_parts.ConvArgs],
        activation: layers.Activation,
        *,
        conv: Callable[..., layers.ScaledWSConv2D | layers.Conv2D] = layers.ScaledWSConv2D,
        pool_shortcut: bool = False,
        alpha: float = 0.2,
        attention: Callable[[int], residual.Attention] | None = None,
        skipinit_gain: float | hk.initializers.Initializer = 0.0,
        skip_gain: bool = True,
        name: str | None = None,
    ):
        super().__init__(name=name)
        self.plan, self.alpha, self.activation = plan, alpha, activation
        self.skip_gain = skipinit_gain if skip_gain else None
        last = {} if skip_gain else {'gain_init': skipinit_gain}
        self.convs = [
            conv(*shape, **(last if i == len(branch) - 1 else {}), name=f'conv{i}')
            for i, shape in enumerate(branch)
        ]
        self.pool_shortcut = pool_shortcut and plan.stride > 1
        if plan.is_transition:
            stride = 1 if self.pool_shortcut else plan.stride
            self.conv_shortcut = conv(plan.out_channels, 1, stride, name='conv_shortcut')
        self.attention = attention(plan.out_channels) if attention else None

    def __call__(
        self, x: Array, inputs: residual.BlockInputs, is_training: bool
    ) -> tuple[Array, Array]:
        """Returns output and residual branch, both [N, H', W', out], for x [N, H, W, in]."""
        out = inputs.scale(self.activation(x))
        shortcut = x
        if self.plan.is_transition:
            pooled = layers.avg_pool(out, 2, 2) if self.pool_shortcut else out
            shortcut = self.conv_shortcut(pooled)
        out = self.convs[0](out)
        for conv in self.convs[1:]:
            out = conv(self.activation(out))
        if self.attention:
            out = 2 * self.attention(out) * out
        return shortcut + residual.weigh(inputs.drop(out), self.alpha, self.skip_gain), out
