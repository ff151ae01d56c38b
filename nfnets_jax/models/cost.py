"""How large a network is, from its shapes alone: nothing is computed."""

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
from nfnets_jax.models import residual
from nfnets_jax.models.registry import create_model

# Every network here reduces the picture 32-fold at most, so each feature map has a whole size.
_TRACED_SIZE = 32


class ModuleCost(NamedTuple):
    """Multiply-accumulate operations of one module by itself, without those inside it.

    Attributes:
      name: of the module, as in the names of its parameters.
      conv_macs: of a convolution on an image of 32 x 32 pixels.
      linear_macs: of a linear layer, those of channel attention included, on any image.
    """

    name: str
    conv_macs: int
    linear_macs: int

    def macs(self, size: int) -> float:
        """Multiply-accumulates for an image of size x size pixels; see `Cost.macs`."""
        return self.conv_macs * size**2 / _TRACED_SIZE**2 + self.linear_macs


@dataclasses.dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-accumulate operations to evaluate or train on one image.

    Attributes:
      parameters: trained numbers; running statistics are not among them.
      modules: in the order in which their outputs are ready.
    """

    parameters: int
    modules: tuple[ModuleCost, ...]

    def macs(self, size: int) -> float:
        """Multiply-accumulates for an image of size x size pixels, as the authors count them.

        Convolutions count in proportion to the picture's area. Where a stride does not divide a
        feature map (NF-RegNets at 272 pixels, for one) that is a little less than what is done.
        Poolings, activations and weight standardisation do not count.
        """
        return sum(module.macs(size) for module in self.modules)

    def training_macs(self, size: int, frozen: Collection[str] = ()) -> float:
        """Multiply-accumulates of a forward and a backward pass over one image.

        The gradients with respect to the weights and to the activations cost as much as the
        forward pass, each. The former are needed of modules that are trained; the latter of the
        first of these and all that follow.

        Args:
          size: side of the image, pixels.
          frozen: the names of modules none of whose parameters are trained.
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
        params = module.params_dict()  # those of the modules inside it, too
        macs = 0
        if isinstance(module, (*convolutions, *linears)):
            # in x kernel area / groups for each output, which is what the weight's other axes hold
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
    image_size: int,
    saved: Literal['all', 'convolutions', 'blocks'] = 'all',
    **overrides: Any,
) -> float:
    """Returns the bytes that training in bfloat16 keeps of one picture for the backward pass.

    They are counted in the traced program, as what `jax.vjp` saves between the two passes, weights
    left out. A compiler may save less: XLA computes cheap operations anew where it fuses them.

    Args:
      name: of a network that `create_model` knows.
      image_size: side of the picture, pixels.
      saved: 'all' that JAX saves; the outputs of 'convolutions' and other costly operations, all
        else being computed anew; or with remat=True the inputs of residual 'blocks', besides
        which one block at a time needs 'all' of its own.
      **overrides: options of the network.
    """
    if saved == 'blocks':
        overrides['remat'] = True
    network = hk.transform_with_state(
        lambda images: create_model(name, 1000, **overrides)(images, True)['logits']
    )
    images = jax.ShapeDtypeStruct((_BATCH, image_size, image_size, 3), jnp.bfloat16)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, state = jax.eval_shape(network.init, key, images)

    def pull_back(params, state, key, images):
        def logits(params):
            return network.apply(params, state, key, images)[0]

        if saved == 'convolutions':
            logits = jax.checkpoint(logits, policy=residual.is_costly)
        return jax.vjp(logits, params)[1]

    residuals = jax.tree.leaves(jax.eval_shape(pull_back, params, state, key, images))
    # Where equal blocks share a program the batch is the second axis.
    kept = [leaf for leaf in residuals if _BATCH in leaf.shape[:2]]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept) / _BATCH


_BATCH = 13  # the size of no other leading axis
