"""Weights as programs that run without this package: StableHLO, and ONNX.

Both fold the scaled weight standardization: the standardized weight of a convolution does not
depend on the image, so it is computed once and the network has plain convolutions. Programs map
pixels, float32 [batch, height, width, channels] on a scale of 0..255 as `make_transform` returns
them, to logits, float32 [batch, classes] (to 'pool', [batch, features], where the network has no
classifier). The normalization is part of the program, and the batch size is symbolic.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nfnets_jax import augment, extras, layers
from nfnets_jax.convolution import conv
from nfnets_jax.errors import UsageError
from nfnets_jax.image_size import ImageSize, height_width
from nfnets_jax.weights import pretrained

with extras.optional():
    import haiku as hk
PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')


def fold_standardization(params: hk.Params, standardize: bool = True) -> hk.Params:
    """Returns parameters in which every `ScaledWSConv2D` has its folded weight, and no 'gain'.

    Args:
      params: parameters of a model.
      standardize: the model's option `standardize`.
    """
    fold = layers.standardize if standardize else jnp.multiply

    def folded(p: Mapping[str, Any]) -> Mapping[str, Any]:  # arrays of NumPy or JAX
        return {'w': np.asarray(fold(p['w'], p['gain'])), 'bias': p['bias']}

    return {module: folded(p) if 'gain' in p else p for module, p in params.items()}


def make_classifier(
    weights: pretrained.Weights, conv2d: Callable[..., jax.Array] = conv.conv2d
) -> Callable[[jax.Array], jax.Array]:
    """Returns the function pixels -> logits in float32, with folded weights.

    Args:
      weights: weights whose metadata name the model.
      conv2d: implementation of all convolutions, with the signature of `conv.conv2d`.
    """
    metadata = weights.metadata
    model = pretrained.network(metadata)
    params = fold_standardization(weights.params, metadata.options.get('standardize', True))
    interceptor = functools.partial(convolve_folded, conv2d)

    def classify(pixels: jax.Array) -> jax.Array:
        images = augment.normalize(pixels, metadata.mean, metadata.std)
        with hk.intercept_methods(interceptor):
            outputs, _ = model.apply(params, weights.state, None, images, False)
        return outputs[output_name(metadata)]

    return classify


def to_stablehlo(weights: pretrained.Weights) -> bytes:
    """Returns the program for `jax.export.deserialize(program).call(pixels)`, weights included.

    It is lowered for every platform of `PLATFORMS`, with the fastest convolutions on each.

    Raises:
      UsageError: the metadata lack the model or the size.
    """
    height, width = height_width(image_size(weights))
    channels = weights.metadata.channels
    shape = jax.export.symbolic_shape(f'batch, {height}, {width}, {channels}')
    pixels = jax.ShapeDtypeStruct(shape, jnp.float32)
    classify = jax.jit(make_classifier(weights))
    return bytes(jax.export.export(classify, platforms=PLATFORMS)(pixels).serialize())


def to_onnx(weights: pretrained.Weights) -> bytes:
    """Returns a serialized ONNX ModelProto with input 'pixels' and output 'logits' or 'pool'.

    Raises:
      UsageError: jax2onnx is not installed, or the metadata lack the model or the size.
    """
    try:
        import jax2onnx
    except ImportError as error:
        raise UsageError(f'ONNX needs jax2onnx: pip install "nfnets_jax[onnx]" ({error})') from None
    height, width = height_width(image_size(weights))
    classify = make_classifier(weights, _conv2d_as_onnx_knows_it)
    model = jax2onnx.to_onnx(
        classify,
        inputs=[('batch', height, width, weights.metadata.channels)],
        input_names=['pixels'],
        output_names=[output_name(weights.metadata)],
    )
    return model.SerializeToString()


def convolve_folded(conv2d, next_call, args, kwargs, context):
    """Applies convolutions with their folded weights, as a Haiku method interceptor."""
    conv = context.module
    is_convolution = isinstance(conv, layers.ScaledWSConv2D | layers.Conv2D)
    if not is_convolution or context.method_name != '__call__':
        return next_call(*args, **kwargs)
    (x,) = args
    shape = (conv.kernel_size,) * 2 + (x.shape[-1] // conv.groups, conv.output_channels)
    w = hk.get_parameter('w', shape, init=jnp.zeros)
    out = conv2d(x, w, stride=conv.stride, groups=conv.groups, padding=conv.padding)
    if isinstance(conv, layers.ScaledWSConv2D):
        return out + hk.get_parameter('bias', shape[-1:], init=jnp.zeros)
    return out + hk.get_parameter('b', shape[-1:], init=jnp.zeros) if conv.with_bias else out


def _conv2d_as_onnx_knows_it(x, w, *, stride, groups, padding):
    return conv.xla(conv.ConvOptions(stride, groups, padding), x, w)


def output_name(metadata: pretrained.Metadata) -> str:
    """Returns the name of the network output that an exported program returns."""
    return 'pool' if metadata.num_classes == 0 else 'logits'


def image_size(weights: pretrained.Weights) -> ImageSize:
    """Returns the size of the test images of the weights: their side, or height and width.

    Raises:
      UsageError: the metadata lack the size.
    """
    if weights.metadata.test_size is None:
        raise UsageError('the weights do not say the size of their images')
    return weights.metadata.test_size
