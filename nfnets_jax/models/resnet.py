"""The batch-normalized ResNets that Normalizer-Free ones are compared with."""

import functools
from collections.abc import Callable
from typing import Annotated, Any, Unpack

import haiku as hk
import jax

from nfnets_jax import fields, layers
from nfnets_jax.fields import Field
from nfnets_jax.models import options, residual, resnet_parts

Array = jax.Array
# norm(x, is_training, test_local_stats)
Norm = Callable[[Array, bool, bool], Array]


class ResNet(hk.Module):
    """A ResNet with batch normalization, pre-activation (arXiv 1603.05027) by default.

    preactivation=False is the order of arXiv 1512.03385. norm='none' is the same network without
    normalization and with biases added; it has He initialization, as nothing else preserves the
    variance of the signal. `activation` is not scaled.

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
        preactivation: Annotated[bool, Field('Activation before the convolutions.')] = True,
        norm: options.Norm = 'batch',
        bn_decay_rate: options.BnDecayRate = 0.9,
        cross_replica_axis: options.CrossReplicaAxis = None,
        use_se: options.UseSe = False,
        se_ratio: options.SeRatio = 0.25,
        activation: options.Activation = 'relu',
        fc_init: options.FcInit = 0.0,
        remat: options.Remat = False,
        scan: options.Scan = False,
        channels: options.Channels = None,
        name: str = 'ResNet',
        **overrides: Unpack[options.ResNetOverrides],
    ):
        super().__init__(name=name)
        self.variant = info = options.resolve('ResNet', variant, overrides)
        self.preactivation, self.remat, self.scan = preactivation, remat, scan
        self.activation = layers.get_activation(activation, scaled=False)

        def make_norm(name: str) -> Norm:
            if norm == 'none':
                return _no_norm
            return layers.BatchNorm(bn_decay_rate, cross_replica_axis=cross_replica_axis, name=name)

        # Normalisation cancels the bias before it and the scale of the weights.
        if norm == 'none':
            conv = functools.partial(layers.Conv2D, w_init=layers.he_init)
        else:
            conv = functools.partial(layers.Conv2D, with_bias=False)
        self.initial_conv = conv(
            *resnet_parts.stem_shape(info), in_channels=channels, name='initial_conv'
        )
        if not preactivation:
            self.initial_bn = make_norm('initial_bn')
        block = ResBlockV2 if preactivation else ResBlockV1
        self.blocks = [
            block(
                plan,
                resnet_parts.branch_shapes(info, plan),
                self.activation,
                conv,
                make_norm,
                se_ratio=se_ratio if use_se else None,
            )
            for plan in resnet_parts.plan_resnet(info)
        ]
        if preactivation:
            self.final_bn = make_norm('final_bn')
        self.fc = residual.make_classifier(num_classes, layers.initializer(fc_init, 'stddev'))

    def __call__(
        self,
        images: Array,
        is_training: bool,
        return_metrics: bool = False,
        test_local_stats: bool = False,
        return_features: bool = False,
    ) -> dict[str, Any]:
        """Classifies normalized images [N, H, W, C]; see `create_model`.

        test_local_stats evaluates with the statistics of the batch.
        """
        out = self.initial_conv(images)
        if not self.preactivation:
            out = self.activation(self.initial_bn(out, is_training, test_local_stats))
        out = resnet_parts.stem_pool(self.variant, out)
        out, extras = residual.run_blocks(
            self.blocks,
            out,
            is_training,
            test_local_stats,
            remat=self.remat,
            scan=self.scan,
            return_metrics=return_metrics,
            return_features=return_features,
        )
        if self.preactivation:
            out = self.activation(self.final_bn(out, is_training, test_local_stats))
        return extras | residual.classify(out, self.fc, self.variant.drop_rate, is_training)


class ResBlockV2(hk.Module):
    """x + branch(x), with normalization and activation before each convolution."""

    def __init__(
        self,
        plan: residual.BlockPlan,
        branch: list[resnet_parts.ConvArgs],
        activation: layers.Activation,
        conv: Callable[..., layers.Conv2D],
        make_norm: Callable[[str], Norm],
        *,
        se_ratio: float | None = None,
        name: str | None = None,
    ):
        super().__init__(name=name)
        self.plan, self.activation, self.make_norm = plan, activation, make_norm
        self.norms = [make_norm(f'bn{i}') for i in range(len(branch))]
        self.convs = [conv(*shape, name=f'conv{i}') for i, shape in enumerate(branch)]
        if plan.is_transition:
            self.conv_shortcut = conv(plan.out_channels, 1, plan.stride, name='conv_shortcut')
        self.se = layers.SqueezeExcite(plan.out_channels, se_ratio) if se_ratio else None

    def __call__(
        self, x: Array, inputs: residual.BlockInputs, is_training: bool, test_local_stats: bool
    ) -> tuple[Array, Array]:
        """Returns output and residual branch, both [N, H', W', out], for x [N, H, W, in]."""
        out = self.activation(self.norms[0](x, is_training, test_local_stats))
        shortcut = self.conv_shortcut(out) if self.plan.is_transition else x
        out = self.convs[0](out)
        for norm, conv in zip(self.norms[1:], self.convs[1:], strict=True):
            out = conv(self.activation(norm(out, is_training, test_local_stats)))
        if self.se:
            out = self.se(out) * out
        return shortcut + inputs.drop(out), out


class ResBlockV1(ResBlockV2):
    """activation(x + branch(x)), with normalization after each convolution."""

    def __call__(
        self, x: Array, inputs: residual.BlockInputs, is_training: bool, test_local_stats: bool
    ) -> tuple[Array, Array]:
        """Returns output and residual branch, both [N, H', W', out], for x [N, H, W, in]."""
        shortcut = x
        if self.plan.is_transition:
            shortcut_norm = self.make_norm('shortcut_bn')
            shortcut = shortcut_norm(self.conv_shortcut(x), is_training, test_local_stats)
        out = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            out = norm(conv(self.activation(out) if i else out), is_training, test_local_stats)
        if self.se:
            out = self.se(out) * out
        branch = inputs.drop(out)
        return self.activation(shortcut + branch), out


def _no_norm(x: Array, is_training: bool, test_local_stats: bool) -> Array:
    del is_training, test_local_stats
    return x
