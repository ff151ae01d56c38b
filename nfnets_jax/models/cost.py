"""Parameters, operations and activation memory of a network, from its shapes alone.

Nothing is computed.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp

from nfnets_jax import layers
from nfnets_jax.image_size import ImageSize, height_width
from nfnets_jax.models import residual
from nfnets_jax.models.registry import create_model

# Every network reduces the image at most 32-fold, so the size of each feature map is an integer.
_TRACED_SIZE = 32


class ModuleCost(NamedTuple):
    """Multiply-accumulate operations of one module, without its submodules.

    Attributes:
      name: name of the module, as in the names of its parameters.
      conv_macs: operations of a convolution on an image of 32 x 32 pixels.
      linear_macs: operations of a linear layer, channel attention included, on any image.
    """

    name: str
    conv_macs: int
    linear_macs: int

    def macs(self, size: ImageSize) -> float:
        """Returns the multiply-accumulates for an image of a size; see `Cost.macs`."""
        return self.conv_macs * math.prod(height_width(size)) / _TRACED_SIZE**2 + self.linear_macs


@dataclasses.dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-accumulate operations to evaluate or train on one image.

    Attributes:
      parameters: number of parameters, without running statistics.
      modules: costs of the modules, in the order in which they finish.
    """

    parameters: int
    modules: tuple[ModuleCost, ...]

    def macs(self, size: ImageSize) -> float:
        """Returns the multiply-accumulates for an image of a size, as the authors do.

        Convolutions count in proportion to the area of the image. Where a stride does not divide a
        feature map (e.g. NF-RegNets at 272 pixels) this is slightly less than the real number.
        Pooling, activations and weight standardisation do not count.
        """
        return sum(module.macs(size) for module in self.modules)

    def training_macs(self, size: ImageSize, frozen: Collection[str] = ()) -> float:
        """Returns the multiply-accumulates of a forward and a backward pass over one image.

        The gradients with respect to the weights and to the activations each cost as much as the
        forward pass. Every trained module needs weight gradients. The first trained module and all
        later modules count for activation gradients.

        Args:
          size: side of the image in pixels, or its height and width.
          frozen: names of modules without any trained parameter.
        """
        trained = [module.name not in frozen for module in self.modules]
        reached = itertools.accumulate(trained, operator.or_)
        return sum(
            module.macs(size) * (1 + is_trained + is_reached)
            for module, is_trained, is_reached in zip(self.modules, trained, reached, strict=True)
        )


def model_cost(name: str, num_classes: int = 1000, **overrides: Any) -> Cost:
    """Returns the cost of `create_model(name, num_classes, **overrides)`."""
    linears = layers.Linear, layers.EfficientChannelAttention
    convolutions = layers.Conv2D, layers.ScaledWSConv2D
    modules: list[ModuleCost] = []

    def count(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.method_name != '__call__':
            return out
        module, name = context.module, context.module.module_name
        params = module.params_dict()  # includes the submodules
        macs = 0
        if isinstance(module, (*convolutions, *linears)):
            # in x kernel area / groups per output: the product of the weight's other axes
            macs = out.size * math.prod(params[f'{name}/w'].shape[:-1])
        if any(key.rpartition('/')[0] == name for key in params):
            of_conv = isinstance(module, convolutions)
            modules.append(ModuleCost(name, macs * of_conv, macs * (not of_conv)))
        return out

    def forward(images):
        with hk.intercept_methods(count):
            return create_model(name, num_classes, **overrides)(images, False)

    shape = (1, _TRACED_SIZE, _TRACED_SIZE, overrides.get('channels') or 3)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    params, _ = jax.eval_shape(hk.transform_with_state(forward).init, jax.random.key(0), image)
    return Cost(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        modules=tuple(modules),
    )


def activation_bytes(
    name: str,
    image_size: ImageSize,
    saved: Literal['all', 'convolutions', 'blocks'] = 'all',
    **overrides: Any,
) -> float:
    """Returns the bytes per image that training in bfloat16 saves for the backward pass.

    The count is over the residuals that `jax.vjp` saves in the traced program, without weights. A
    compiler may save less: XLA recomputes cheap operations where it fuses them.

    Args:
      name: name of a network that `create_model` knows.
      image_size: side of the image in pixels, or its height and width.
      saved: 'all' residuals that JAX saves; the outputs of 'convolutions' and other costly
        operations, with everything else recomputed; or with remat=True the inputs of residual
        'blocks', while one block at a time needs all of its residuals in addition.
      **overrides: options of the network.
    """
    if saved == 'blocks':
        overrides['remat'] = True
    network = hk.transform_with_state(
        lambda images: create_model(name, 1000, **overrides)(images, True)['logits']
    )
    channels = overrides.get('channels') or 3
    images = jax.ShapeDtypeStruct((_BATCH, *height_width(image_size), channels), jnp.bfloat16)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, state = jax.eval_shape(network.init, key, images)

    def pull_back(params, state, key, images):
        def logits(params):
            return network.apply(params, state, key, images)[0]

        if saved == 'convolutions':
            logits = jax.checkpoint(logits, policy=residual.is_costly)
        return jax.vjp(logits, params)[1]

    residuals = jax.tree.leaves(jax.eval_shape(pull_back, params, state, key, images))
    # Where identical blocks share a program the batch is the second axis.
    kept = [leaf for leaf in residuals if _BATCH in leaf.shape[:2]]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept) / _BATCH


# Differs from the size of every other leading axis, that of blocks in a scan included.
_BATCH = 1009
