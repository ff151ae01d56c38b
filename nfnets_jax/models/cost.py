"""How large a network is, from its shapes alone: nothing is computed."""

import dataclasses
import math
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from nfnets_jax import layers
from nfnets_jax.models.registry import create_model

# Every network here reduces the picture 32-fold at most, so each feature map has a whole size.
_TRACED_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-accumulate operations to evaluate one picture.

    Attributes:
      parameters: trained numbers; running statistics are not among them.
      conv_macs: of the convolutions on a picture of 32 x 32 pixels.
      linear_macs: of the linear layers, squeeze-and-excitation included, on any picture.
    """

    parameters: int
    conv_macs: int
    linear_macs: int

    def macs(self, size: int) -> float:
        """Multiply-accumulates for a picture of size x size pixels, as the authors count them.

        Convolutions count in proportion to the picture's area. Where a stride does not divide a
        feature map (NF-RegNets at 272 pixels, for one) that is a little less than what is done.
        Poolings, activations and weight standardisation do not count.
        """
        return self.conv_macs * size**2 / _TRACED_SIZE**2 + self.linear_macs


def model_cost(name: str, num_classes: int = 1000, **overrides: Any) -> Cost:
    """Returns the cost of `create_model(name, num_classes, **overrides)`."""
    macs: dict[type, int] = {layers.Linear: 0, layers.Conv2D: 0, layers.ScaledWSConv2D: 0}

    def count(call, args, kwargs, context):
        out = call(*args, **kwargs)
        kind = type(context.module)
        if kind in macs and context.method_name == '__call__':
            # in x kernel area / groups for each output, which is what the weight's other axes hold
            weight = context.module.params_dict()[f'{context.module.module_name}/w']
            macs[kind] += out.size * math.prod(weight.shape[:-1])
        return out

    def forward(images):
        with hk.intercept_methods(count):
            return create_model(name, num_classes, **overrides)(images, False)

    image = jax.ShapeDtypeStruct((1, _TRACED_SIZE, _TRACED_SIZE, 3), jnp.float32)
    params, _ = jax.eval_shape(hk.transform_with_state(forward).init, jax.random.key(0), image)
    return Cost(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        conv_macs=macs[layers.Conv2D] + macs[layers.ScaledWSConv2D],
        linear_macs=macs[layers.Linear],
    )
