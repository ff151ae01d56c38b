"""How large a network is, from its shapes alone: nothing is computed."""

import dataclasses
import math
from typing import Any, Literal

import haiku as hk
import jax
import jax.numpy as jnp

from nfnets_jax import layers
from nfnets_jax.models import residual
from nfnets_jax.models.registry import create_model

# Every network here reduces the picture 32-fold at most, so each feature map has a whole size.
_TRACED_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-accumulate operations to evaluate one picture.

    Attributes:
      parameters: trained numbers; running statistics are not among them.
      conv_macs: of the convolutions on a picture of 32 x 32 pixels.
      linear_macs: of the linear layers, those of channel attention included, on any picture.
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
    linears = layers.Linear, layers.EfficientChannelAttention
    macs: dict[type, int] = dict.fromkeys((layers.Conv2D, layers.ScaledWSConv2D, *linears), 0)

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

    shape = (1, _TRACED_SIZE, _TRACED_SIZE, overrides.get('channels') or 3)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    params, _ = jax.eval_shape(hk.transform_with_state(forward).init, jax.random.key(0), image)
    return Cost(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        conv_macs=macs[layers.Conv2D] + macs[layers.ScaledWSConv2D],
        linear_macs=sum(macs[kind] for kind in linears),
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
