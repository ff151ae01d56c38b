"""The small CIFAR CNN of the report on adaptive gradient clipping."""

from typing import Any, Literal

import haiku as hk
import jax

from nfnets_jax import layers
from nfnets_jax.errors import UsageError
from nfnets_jax.models import options, residual

Array = jax.Array
SMALLEST = 14  # pixels: the unpadded convolutions reduce smaller images to nothing


class SmallCNN(hk.Module):
    """Four unpadded 3x3 convolutions of 32 channels, max pool after the second, three linears.

    It has 37,322 parameters for 10 classes, and 37,834 with batch normalisation if its 256 running
    statistics count as parameters, as in the report.

    Args:
      num_classes: size of the logits; 0 for features only, without the three linears.
      norm: 'batch' for batch normalisation after each convolution, or 'none'.
      bn_decay_rate: decay rate of the running statistics.
      cross_replica_axis: as in ResNet.
      activation: name in layers.activations; not scaled.
      channels: channels of the images; None accepts any number.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        norm: Literal['batch', 'none'] = 'batch',
        bn_decay_rate: float = 0.9,
        cross_replica_axis: str | None = None,
        activation: str = 'relu',
        channels: int | None = None,
        name: str = 'SmallCNN',
    ):
        super().__init__(name=name)
        options.check(
            'SmallCNN',
            num_classes=num_classes,
            norm=norm,
            bn_decay_rate=bn_decay_rate,
            channels=channels,
        )
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
        """Classifies normalised images [N, H, W, C], with H, W >= SMALLEST; see `create_model`."""
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
                out = layers.max_pool(out, 2, 2, 'VALID')

        if (last := self.fc) is None:
            return residual.classify(out, None, 0.0, is_training)

        def classifier(pool: Array) -> Array:
            for linear in self.hidden:
                pool = self.activation(linear(pool))
            return last(pool)

        return residual.classify(out, classifier, 0.0, is_training)
