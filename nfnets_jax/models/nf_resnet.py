"""Normalizer-Free ResNets ("NF-ResNets", arXiv 2101.08692)."""

import functools
from collections.abc import Callable
from typing import Any, Unpack

import haiku as hk
import jax
import jax.numpy as jnp

from nfnets_jax import layers
from nfnets_jax.convolution import Padding
from nfnets_jax.models import options, residual, resnet_parts

Array = jax.Array


class NFResNet(hk.Module):
    """A pre-activation ResNet whose blocks keep the variance of the signal by construction.

    Args:
      num_classes: size of the logits.
      variant: '50', '101', '152', '200', '288' or '600'; for small pictures '8' to '110'.
      alpha: weight of the residual branch.
      standardize: scaled weight standardisation. This and the next two take one part each out of
        what preserves the variance, for ablations; parameters and initial values stay the same.
      activation_gain: multiply activations by their gain gamma, so that they preserve variance.
      downscale: multiply what a branch receives by beta; False fixes beta to 1.
      use_se: squeeze-and-excitation at the end of the branch.
      se_ratio: its hidden width over its width.
      activation: name in layers.nonlinearities.
      skipinit_gain: initial value of the branch's learned gain, or an initialiser.
      fc_init: standard deviation of the classifier's initial weights, or an initialiser.
      stem_bn: batch norm after the first convolution. No NF-ResNet has it; it is there to compare
        with networks in which it was left.
      cross_replica_axis: of that batch norm, as in ResNet.
      conventions: 'timm' pads convolutions symmetrically and pools shortcuts before their
        convolution instead of striding it.
      remat: recompute blocks in the backward pass: less memory, more time.
      scan: compile the equal blocks of a stage once: deep networks compile several times faster.
        Slow on CPUs. See docs/scaling.md.
      **overrides: see options.ResNetOverrides.

    Raises:
      UsageError: an option no network could be built from.
    """

    def __init__(
        self,
        num_classes: int,
        variant: str = '50',
        *,
        alpha: float = 0.2,
        standardize: bool = True,
        activation_gain: bool = True,
        downscale: bool = True,
        use_se: bool = False,
        se_ratio: float = 0.25,
        activation: str = 'relu',
        skipinit_gain: float | hk.initializers.Initializer = 0.0,
        fc_init: float | hk.initializers.Initializer = 0.01,
        stem_bn: bool = False,
        cross_replica_axis: str | None = None,
        conventions: options.Conventions = 'published',
        remat: bool = False,
        scan: bool = False,
        name: str = 'NF_ResNet',
        **overrides: Unpack[options.ResNetOverrides],
    ):
        super().__init__(name=name)
        self.row = row = options.resolve('NF-ResNet', variant, overrides)
        options.check(
            'NF-ResNet',
            num_classes=num_classes,
            alpha=alpha,
            se_ratio=se_ratio,
            conventions=conventions,
        )
        self.padding: Padding = 'SYMMETRIC' if conventions == 'timm' else 'SAME'
        conv = functools.partial(
            layers.ScaledWSConv2D, padding=self.padding, standardize=standardize
        )
        self.remat, self.scan = remat, scan
        self.activation = layers.get_activation(activation, scaled=activation_gain)
        self.initial_conv = conv(*resnet_parts.stem_shape(row), name='initial_conv')
        self.initial_bn = (
            layers.BatchNorm(cross_replica_axis=cross_replica_axis, name='initial_bn')
            if stem_bn
            else None
        )
        self.blocks = [
            NFResBlock(
                plan,
                resnet_parts.branch_shapes(row, plan),
                self.activation,
                conv=conv,
                pool_shortcut=conventions == 'timm',
                alpha=alpha,
                se_ratio=se_ratio if use_se else None,
                skipinit_gain=skipinit_gain,
            )
            # Branches that add no variance leave nothing to scale by.
            for plan in resnet_parts.plan_resnet(row, alpha if downscale else 0.0)
        ]
        self.fc = layers.Linear(num_classes, layers.initializer(fc_init, 'stddev'))

    def __call__(
        self, images: Array, is_training: bool, return_metrics: bool = False
    ) -> dict[str, Any]:
        """Classifies normalised images [N, H, W, 3]; see `create_model`."""
        out = self.initial_conv(images)
        if self.initial_bn:
            out = self.initial_bn(out, is_training)
        out = resnet_parts.stem_pool(self.row, out, self.padding)
        out, metrics = residual.run_blocks(
            self.blocks,
            out,
            is_training,
            remat=self.remat,
            scan=self.scan,
            return_metrics=return_metrics,
        )
        features = self.activation(out)
        return metrics | residual.classify(features, self.fc, self.row.drop_rate, is_training)


class NFResBlock(hk.Module):
    """x + alpha * gain * branch(beta * activation(x)), without normalisation.

    SkipInit ResNets are made of the same blocks with plain convolutions and alpha = 1.
    """

    def __init__(
        self,
        plan: residual.BlockPlan,
        branch: list[resnet_parts.ConvShape],
        activation: layers.Activation,
        *,
        conv: Callable[..., layers.ScaledWSConv2D | layers.Conv2D] = layers.ScaledWSConv2D,
        pool_shortcut: bool = False,
        alpha: float = 0.2,
        se_ratio: float | None = None,
        skipinit_gain: float | hk.initializers.Initializer = 0.0,
        name: str | None = None,
    ):
        super().__init__(name=name)
        self.plan, self.alpha, self.activation = plan, alpha, activation
        self.skipinit_gain = layers.initializer(skipinit_gain, 'constant')
        self.convs = [conv(*shape, name=f'conv{i}') for i, shape in enumerate(branch)]
        self.pool_shortcut = pool_shortcut and plan.stride > 1
        if plan.is_transition:
            stride = 1 if self.pool_shortcut else plan.stride
            self.conv_shortcut = conv(plan.out_channels, 1, stride, name='conv_shortcut')
        self.se = layers.SqueezeExcite(plan.out_channels, se_ratio) if se_ratio else None

    def __call__(self, x: Array, own: residual.Own, is_training: bool) -> tuple[Array, Array]:
        """[N, H, W, in] -> the block's output and its residual branch, [N, H', W', out] both."""
        out = own.scale(self.activation(x))
        shortcut = x
        if self.plan.is_transition:
            pooled = layers.avg_pool(out, 2, 2) if self.pool_shortcut else out
            shortcut = self.conv_shortcut(pooled)
        out = self.convs[0](out)
        for conv in self.convs[1:]:
            out = conv(self.activation(out))
        if self.se:
            out = 2 * self.se(out) * out
        gain = hk.get_parameter('skip_gain', (), jnp.float32, init=self.skipinit_gain)
        branch = own.drop(out)
        return shortcut + branch * (gain * self.alpha).astype(branch.dtype), out
