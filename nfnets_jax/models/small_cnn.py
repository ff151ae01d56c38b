"""The small CIFAR CNN of the report on adaptive gradient clipping."""

from typing import Any

import haiku as hk
import jax

from nfnets_jax import fields, layers, pooling
from nfnets_jax.errors import UsageError
from nfnets_jax.models import options, residual

Array = jax.Array
SMALLEST = 14  # pixels: the unpadded convolutions reduce smaller images to nothing


class SmallCNN(hk.Module):
    """Four unpadded 3x3 convolutions of 32 channels, max pool after the second, three linears.

    It has 37,322 parameters for 10 classes, and 37,834 with batch normalization if its 256 running
    statistics count as parameters, as in the report.

    `activation` is not scaled. Options are described in docs/config.md.

    Args:
      num_classes: size of the logits; 0 for features only, without the three linears.

    """

    @fields.checked()
    def __init__(
        self,
        num_classes: options.NumClasses,
        *,
        norm: options.Norm = 'batch',
        bn_decay_rate: options.BnDecayRate = 0.9,
        cross_replica_axis: options.CrossReplicaAxis = None,
        activation: options.Activation = 'relu',
        channels: options.Channels = None,
        name: str = 'SmallCNN',
    ):
        super().__init__(name=name)
        self.activation = layers.get_activation(activation, scaled=False)
        self.convs = [
            layers.Conv2D(
                32,
                3,
                padding='VALID',
                w_init=layers.he_init,
                in_channels=None if i else channels,
                name=f'conv{i}',
            )
            for i in range(4)
        ]
        self.norms = [
            layers.BatchNorm(bn_decay_rate, cross_replica_axis=cross_replica_axis, name=f'bn{i}')
            if norm == 'batch'
            else None
            for i in range(4)
        ]
        self.hidden = [layers.Linear(128, layers.he_init), layers.Linear(32, layers.he_init)]
        self.fc = residual.make_classifier(num_classes, None)

    def __call__(self, images: Array, is_training: bool) -> dict[str, Any]:
        """Classifies normalized images [N, H, W, C], with H, W >= SMALLEST; see `create_model`."""
        if min(images.shape[1:3]) < SMALLEST:
            raise UsageError(
                f'SmallCNN: images must have at least {SMALLEST} x {SMALLEST} pixels, not '
                f'{images.shape[1]} x {images.shape[2]}'
            )
        out = images
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            out = conv(out)
            if norm:
                out = norm(out, is_training)
            out = self.activation(out)
            if i == 1:
                out = pooling.max_pool(out, 2, 2, 'VALID')

        if (last := self.fc) is None:
            return residual.classify(out, None, 0.0, is_training)

        def classifier(pool: Array) -> Array:
            for linear in self.hidden:
                pool = self.activation(linear(pool))
            return last(pool)

        return residual.classify(out, classifier, 0.0, is_training)
