"""The layers of Normalizer-Free networks, as Haiku modules.

Every layer follows two rules. Parameters and statistics are float32 for every input dtype; the
arithmetic uses the dtype of the input (float32 or bfloat16). Parameter names are those of the
published weights.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from nfnets_jax import extras
from nfnets_jax.convolution import conv
from nfnets_jax.errors import UsageError, nearest

with extras.optional():
    import haiku as hk
Array = jax.Array
Activation = Callable[[Array], Array]

activations: Mapping[str, Activation] = {
    'identity': lambda x: x,
    'celu': jax.nn.celu,
    'elu': jax.nn.elu,
    'gelu': functools.partial(jax.nn.gelu, approximate=True),
    'glu': jax.nn.glu,
    'leaky_relu': jax.nn.leaky_relu,
    'log_sigmoid': jax.nn.log_sigmoid,
    'log_softmax': jax.nn.log_softmax,
    'relu': jax.nn.relu,
    'relu6': jax.nn.relu6,
    'selu': jax.nn.selu,
    'sigmoid': jax.nn.sigmoid,
    'silu': jax.nn.silu,
    'soft_sign': jax.nn.soft_sign,
    'softplus': jax.nn.softplus,
    'tanh': jnp.tanh,
}

# 1 / std(f(z)) for z ~ N(0, 1), as published. The authors estimated it by sampling, so it is within
# about 1e-3 of the integral. Keep every digit: the released weights were trained with them.
gains: Mapping[str, float] = {
    'identity': 1.0,
    'celu': 1.270926833152771,
    'elu': 1.2716004848480225,
    'gelu': 1.7015043497085571,
    'glu': 1.8484294414520264,
    'leaky_relu': 1.70590341091156,
    'log_sigmoid': 1.9193484783172607,
    'log_softmax': 1.0002083778381348,
    'relu': 1.7139588594436646,
    'relu6': 1.7131484746932983,
    'selu': 1.0008515119552612,
    'sigmoid': 4.803835391998291,
    'silu': 1.7881293296813965,
    'soft_sign': 2.338853120803833,
    'softplus': 1.9203323125839233,
    'tanh': 1.5939117670059204,
}


def _scaled(name: str) -> Activation:
    return lambda x: activations[name](x) * gains[name]


# Variance-preserving: a unit-variance Gaussian keeps unit variance ("NF-ResNets", section 4.3).
nonlinearities: Mapping[str, Activation] = {
    'identity': activations['identity'],
    **{name: _scaled(name) for name in activations if name != 'identity'},
}


def get_activation(name: str, *, scaled: bool) -> Activation:
    """Returns the nonlinearity called `name`, variance-preserving if `scaled`.

    Raises:
      UsageError: the name is unknown.
    """
    name = _activation_name(name)
    return nonlinearities[name] if scaled else activations[name]


def get_gain(name: str) -> float:
    """Returns the gain gamma of the nonlinearity called `name`.

    Raises:
      UsageError: the name is unknown.
    """
    return gains[_activation_name(name)]


def _activation_name(name: str) -> str:
    if name == 'swish':  # An alias of silu, which the authors' code accepts too.
        name = 'silu'
    if name not in activations:
        raise UsageError(f'activation={name!r} is unknown{nearest(name, activations)}')
    return name


def initializer(
    value: float | hk.initializers.Initializer, number_means: Literal['constant', 'stddev']
) -> hk.initializers.Initializer:
    """Returns an initialiser; a number in a config means a constant or the stddev of a normal."""
    if callable(value):
        return value
    if number_means == 'constant' or value == 0:
        return hk.initializers.Constant(value)
    return hk.initializers.RandomNormal(stddev=value)


@jax.named_scope('standardize')  # its name in profiles and compiled programs
def standardize(weight: Array, gain: Array, eps: float = 1e-4) -> Array:
    """Scales and shifts each output channel to zero mean and variance gain^2 / fan_in.

    This is scaled weight standardization, "NF-ResNets" equation 1, with the published guard: the
    variance times the fan-in is clamped from below to `eps` (`eps` is not added).

    Args:
      weight: [..., out]; the statistics are over all axes but the last.
      gain: [out].
      eps: floor of variance * fan_in.

    Returns:
      An array of the shape and dtype of `weight`.
    """
    # Reshape to a matrix: on the CPU the backward pass sums over [1, 1, in, out] many times slower.
    matrix = weight.reshape(-1, weight.shape[-1])
    mean = jnp.mean(matrix, 0)
    scale = gain * jax.lax.rsqrt(jnp.maximum(_variance(matrix) * len(matrix), eps))
    return (matrix * scale - mean * scale).reshape(weight.shape)


@jax.custom_jvp
def _variance(matrix: Array) -> Array:
    """Returns the variance over axis 0, of which the mean costs its derivative no sum."""
    return jnp.var(matrix, 0)


@_variance.defjvp
def _variance_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (matrix,), (change,) = primals, tangents
    # The mean changes too, but the deviations from it sum to zero. Autodiff would sum them.
    deviations = matrix - jnp.mean(matrix, 0)
    return _variance(matrix), 2 * jnp.mean(deviations * change, 0)


def _fan_in_init(shape: Sequence[int], dtype) -> Array:
    """Draws with stddev 1 / sqrt(fan-in), truncated at two: Haiku's and the baselines' default."""
    return _drawn_flat(hk.initializers.TruncatedNormal(_fan_in_stddev(shape)), shape, dtype)


def he_init(shape: Sequence[int], dtype) -> Array:
    """Draws with variance 2 / fan-in, truncated at two (He et al., arXiv 1502.01852).

    A ReLU halves the variance. Use it where nothing else preserves the variance of the signal.
    """
    # Divide by the standard deviation of a unit normal truncated at two.
    stddev = _fan_in_stddev(shape) * 2**0.5 / 0.87962566103423978
    return _drawn_flat(hk.initializers.TruncatedNormal(stddev), shape, dtype)


def _fan_in_stddev(shape: Sequence[int]) -> float:
    return math.prod(shape[:-1]) ** -0.5


def _drawn_flat(initial: hk.initializers.Initializer, shape: Sequence[int], dtype) -> Array:
    """Draws a vector and reshapes it: the same values, but XLA compiles it 20 times faster.

    That figure is for the CPU and kernels like [3, 3, 8, 9], whose last axis is narrower than a
    vector register.
    """
    return initial((math.prod(shape),), dtype).reshape(shape)


class Conv2D(hk.Module):
    """A plain convolution, NHWC by HWIO: parameter `w` and, if `with_bias`, `b`.

    Raises UsageError for an input without exactly `in_channels` channels, unless that is None.
    """

    def __init__(
        self,
        output_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        padding: Literal['SAME', 'VALID'] = 'SAME',
        with_bias: bool = True,
        w_init: hk.initializers.Initializer | None = None,
        in_channels: int | None = None,
        name: str | None = None,
    ):
        super().__init__(name=name)
        self.output_channels = output_channels
        self.in_channels = in_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.groups = 1
        self.padding = padding
        self.with_bias = with_bias
        self.w_init = w_init or _fan_in_init

    def __call__(self, x: Array) -> Array:
        """[N, H, W, in] -> [N, H', W', out] in the dtype of x."""
        _check_channels(x.shape[-1], self.in_channels)
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.output_channels)
        w = hk.get_parameter('w', shape, jnp.float32, init=self.w_init)
        out = conv.conv2d(x, w.astype(x.dtype), self.stride, padding=self.padding)
        if self.with_bias:
            b = hk.get_parameter('b', shape[-1:], jnp.float32, init=jnp.zeros)
            out = out + b.astype(x.dtype)
        return out


def _check_channels(channels: int, expected: int | None) -> None:
    if expected not in (None, channels):
        raise UsageError(f'channels: the images must have {expected}, not {channels}')


class ScaledWSConv2D(hk.Module):
    """A convolution with scaled weight standardization: parameters `w`, `gain` and `bias`.

    The weight is standardized in float32 and then cast to the dtype of the input: bfloat16 is too
    coarse for variances over thousands of values. See the function `standardize`. With
    standardize=False the weight is `w` times `gain`, which has the same variance at initialisation,
    but only in expectation. `in_channels` is as in Conv2D.
    """

    def __init__(
        self,
        output_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        groups: int = 1,
        padding: conv.Padding = 'SAME',
        standardize: bool = True,
        gain_init: float | hk.initializers.Initializer = 1.0,
        in_channels: int | None = None,
        name: str | None = None,
    ):
        super().__init__(name=name)
        self.output_channels = output_channels
        self.in_channels = in_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.groups = groups
        self.gain_init = initializer(gain_init, 'constant')
        self.padding = padding
        self.standardize = standardize

    def __call__(self, x: Array) -> Array:
        """[N, H, W, in] -> [N, ceil(H / stride), ceil(W / stride), out] in the dtype of x."""
        w, b = self.effective(x.shape[-1], x.dtype)
        return conv.conv2d(x, w, self.stride, groups=self.groups, padding=self.padding) + b

    def effective(self, inputs: int, dtype: jax.typing.DTypeLike) -> tuple[Array, Array]:
        """Returns the weight that is convolved with, [K, K, inputs / groups, out], and the bias."""
        _check_channels(inputs, self.in_channels)
        kernel = self.kernel_size
        shape = (kernel, kernel, inputs // self.groups, self.output_channels)
        normal = hk.initializers.RandomNormal(_fan_in_stddev(shape))
        w = hk.get_parameter('w', shape, jnp.float32, init=functools.partial(_drawn_flat, normal))
        gain = hk.get_parameter('gain', shape[-1:], jnp.float32, init=self.gain_init)
        bias = hk.get_parameter('bias', shape[-1:], jnp.float32, init=jnp.zeros)
        w = standardize(w, gain) if self.standardize else w * gain
        return w.astype(dtype), bias.astype(dtype)


class Linear(hk.Module):
    """Computes x @ w + b over the last axis, with float32 parameters."""

    def __init__(
        self,
        output_size: int,
        w_init: hk.initializers.Initializer | None = None,
        name: str | None = None,
    ):
        super().__init__(name=name)
        self.output_size = output_size
        self.w_init = w_init or _fan_in_init

    def __call__(self, x: Array) -> Array:
        """[..., in] -> [..., out] in the dtype of x."""
        shape = (x.shape[-1], self.output_size)
        w = hk.get_parameter('w', shape, jnp.float32, init=self.w_init)
        b = hk.get_parameter('b', shape[-1:], jnp.float32, init=jnp.zeros)
        return x @ w.astype(x.dtype) + b.astype(x.dtype)


def round_to(channels: float, divisor: int) -> int:
    """Returns the multiple of `divisor` nearest to `channels`, at least `divisor`."""
    return max(divisor, int(channels + divisor / 2) // divisor * divisor)


class SqueezeExcite(hk.Module):
    """Squeeze-and-excitation gates, one per sample and channel (arXiv 1709.01507).

    The hidden layer has max(1, int(channels * ratio)) units, rounded to a multiple of `divisor`
    unless that is 1. The caller multiplies its activations by the gates. Normalizer-Free networks
    multiply by twice the gates, because the sigmoid of zero is one half.
    """

    def __init__(self, channels: int, ratio: float, divisor: int = 1, name: str | None = None):
        super().__init__(name=name)
        hidden = channels * ratio
        self.squeeze = Linear(round_to(hidden, divisor) if divisor > 1 else max(1, int(hidden)))
        self.excite = Linear(channels)

    def __call__(self, x: Array) -> Array:
        """[N, H, W, C] -> gates in (0, 1), [N, 1, 1, C]."""
        hidden = jax.nn.relu(self.squeeze(jnp.mean(x, (1, 2), keepdims=True)))
        return jax.nn.sigmoid(self.excite(hidden))


class EfficientChannelAttention(hk.Module):
    """Efficient channel attention: gates, one per sample and channel (arXiv 1910.03151).

    The gates are the sigmoid of a convolution without bias over the channels' spatial means, with
    parameter `w`, [K, 1, 1]. K grows with the number of channels: (log2(channels) + 1) / 2, rounded
    down and then up to an odd number, at least 3 (equation 12 of the paper). Initial weights are
    uniform within 1 / sqrt(K), as in timm. The caller multiplies, as with SqueezeExcite.
    """

    def __init__(self, channels: int, name: str | None = None):
        super().__init__(name=name)
        self.kernel_size = max(3, int((math.log2(channels) + 1) / 2) | 1)

    def __call__(self, x: Array) -> Array:
        """[N, H, W, C] -> gates in (0, 1), [N, 1, 1, C]."""
        bound = self.kernel_size**-0.5
        shape, init = (self.kernel_size, 1, 1), hk.initializers.RandomUniform(-bound, bound)
        w = hk.get_parameter('w', shape, jnp.float32, init=init).astype(x.dtype)
        reach = self.kernel_size // 2
        means = jnp.mean(x, (1, 2), keepdims=True)
        padded = jnp.pad(means, ((0, 0), (0, 0), (0, 0), (reach, reach)))
        # A sum of shifted copies: the arrays are small, and every platform and ONNX support it.
        shifted = [padded[..., i : i + x.shape[-1]] * w[i, 0, 0] for i in range(self.kernel_size)]
        return jax.nn.sigmoid(functools.reduce(jnp.add, shifted))


def stochastic_depth(key: Array, rate: jax.typing.ArrayLike, x: Array) -> Array:
    """Zeroes each sample of x [N, ...] with probability `rate`.

    Survivors are not rescaled: in a Normalizer-Free network the branch must keep the variance it
    has at evaluation, and the published networks were trained this way.
    """
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return x * keep.astype(x.dtype)


class BatchNorm(hk.Module):
    """Batch normalization with the parameter and state names of hk.BatchNorm.

    Unlike hk.BatchNorm, it keeps scale, offset and statistics in float32 and normalises in float32
    for every input dtype, and `cross_replica_axis` need not be bound while the parameters are
    initialised.

    Attributes:
      decay_rate: of the running mean and variance (debiased, so one update is already a mean).
      eps: added to the variance.
      cross_replica_axis: name of the mapped axis over which statistics are averaged. None
        normalises each device's batch separately, which is a different network: its batch size is
        that of one device.
    """

    def __init__(
        self,
        decay_rate: float = 0.9,
        eps: float = 1e-5,
        cross_replica_axis: str | None = None,
        name: str | None = None,
    ):
        super().__init__(name=name)
        self.eps = eps
        self.cross_replica_axis = cross_replica_axis
        self.mean_ema = hk.ExponentialMovingAverage(decay_rate, name='mean_ema')
        self.var_ema = hk.ExponentialMovingAverage(decay_rate, name='var_ema')

    def __call__(self, x: Array, is_training: bool, test_local_stats: bool = False) -> Array:
        """Normalises x over all axes but the last.

        Args:
          x: [..., C].
          is_training: use the statistics of the batch and update the running ones.
          test_local_stats: use the statistics of the batch, update nothing.

        Returns:
          An array of the shape and dtype of x.
        """
        shape = (1,) * (x.ndim - 1) + x.shape[-1:]
        scale = hk.get_parameter('scale', shape, jnp.float32, init=jnp.ones)
        offset = hk.get_parameter('offset', shape, jnp.float32, init=jnp.zeros)
        x32 = x.astype(jnp.float32)
        # While the parameters are initialised there are no running statistics yet.
        is_training = is_training or hk.running_init()
        if is_training or test_local_stats:
            axes = tuple(range(x.ndim - 1))
            # Not E[x^2] - E[x]^2: its float32 cancellation flips the sign of activations before a
            # ReLU, which changes the gradients of a ResNet-50 (by 2.5e-3 in the golden test).
            mean = self._mean(x32, axes)
            var = self._mean(jnp.square(x32 - mean), axes)
        else:
            mean, var = self.mean_ema.average, self.var_ema.average
        if is_training:
            # Haiku's moving averages raise a float32 to the power of an int32.
            with jax.numpy_dtype_promotion('standard'):
                self.mean_ema(mean)
                self.var_ema(var)
        out = (x32 - mean) * (scale * jax.lax.rsqrt(var + self.eps)) + offset
        return out.astype(x.dtype)

    def _mean(self, x: Array, axes: tuple[int, ...]) -> Array:
        mean = jnp.mean(x, axes, keepdims=True)
        if self.cross_replica_axis is None or hk.running_init():
            return mean
        return jax.lax.pmean(mean, self.cross_replica_axis)


def avg_pool(x: Array, window: int, stride: int) -> Array:
    """Returns the mean of [N, H, W, C] over square windows; padding is not part of the mean."""
    return hk.avg_pool(x, (1, window, window, 1), (1, stride, stride, 1), 'SAME')


def average_variance(x: Array) -> Array:
    """Returns the variance over batch and space, averaged over channels, in float32."""
    return jnp.mean(jnp.var(x.astype(jnp.float32), tuple(range(x.ndim - 1))))


def average_squared_mean(x: Array) -> Array:
    """Returns the squared mean over batch and space, averaged over channels, in float32."""
    return jnp.mean(jnp.square(jnp.mean(x.astype(jnp.float32), tuple(range(x.ndim - 1)))))


def signal_metrics(activations: Sequence[Array], branches: Sequence[Array]) -> dict[str, Array]:
    """Returns the statistics of a signal-propagation plot ("NF-ResNets", section 3).

    Args:
      activations: arrays [N, H, W, C], before the first block and after each of B blocks.
      branches: outputs [N, H, W, C] of the B residual branches, before they are scaled and added.

    Returns:
      avg_sq_mean and avg_var, each [B + 1], and res_avg_var, [B], float32.
    """
    return {
        'avg_sq_mean': jnp.stack([average_squared_mean(x) for x in activations]),
        'avg_var': jnp.stack([average_variance(x) for x in activations]),
        'res_avg_var': jnp.stack([average_variance(x) for x in branches]),
    }
