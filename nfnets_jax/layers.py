"""The layers of Normalizer-Free networks, as Haiku modules.

Two rules hold for every layer here. Parameters and statistics are float32 whatever the input;
the arithmetic is done in the dtype of the input (float32 or bfloat16). Parameter names are
those of the published weights.
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

# 1 / std(f(z)) for z ~ N(0, 1), as published: estimated there by sampling, so within about
# 1e-3 of the integral. The digits matter, the released weights were trained with them.
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


# Variance-preserving: unit-variance Gaussian in, unit variance out ("NF-ResNets", section 4.3).
nonlinearities: Mapping[str, Activation] = {
    'identity': activations['identity'],
    **{name: _scaled(name) for name in activations if name != 'identity'},
}


def get_activation(name: str, *, scaled: bool) -> Activation:
    """Returns the nonlinearity called `name`, variance-preserving if `scaled`.

    Raises:
      UsageError: there is none of that name.
    """
    name = _activation_name(name)
    return nonlinearities[name] if scaled else activations[name]


def get_gain(name: str) -> float:
    """Returns the gain gamma of the nonlinearity called `name`.

    Raises:
      UsageError: there is none of that name.
    """
    return gains[_activation_name(name)]


def _activation_name(name: str) -> str:
    if name == 'swish':  # The other name of silu, which the authors' code knows too.
        name = 'silu'
    if name not in activations:
        raise UsageError(f'activation: unknown {name!r}{nearest(name, activations)}')
    return name


def initializer(
    value: float | hk.initializers.Initializer, number_means: Literal['constant', 'stddev']
) -> hk.initializers.Initializer:
    """Returns an initialiser; a number, as configs hold, is a constant or a normal's stddev."""
    if callable(value):
        return value
    if number_means == 'constant' or value == 0:
        return hk.initializers.Constant(value)
    return hk.initializers.RandomNormal(stddev=value)


def standardize(weight: Array, gain: Array, eps: float = 1e-4) -> Array:
    """Scaled weight standardisation: zero mean and variance gain^2 / fan_in per output channel.

    "NF-ResNets" equation 1, with the published guard: the variance times the fan-in is taken
    to be at least `eps` (it is not added).

    Args:
      weight: [..., out], statistics are taken over all axes but the last.
      gain: [out].
      eps: floor of variance * fan_in.

    Returns:
      An array of the shape and dtype of `weight`.
    """
    # As a matrix: in the backward pass XLA sums over [1, 1, in, out] many times slower on the CPU.
    matrix = weight.reshape(-1, weight.shape[-1])
    mean = jnp.mean(matrix, 0)
    scale = gain * jax.lax.rsqrt(jnp.maximum(jnp.var(matrix, 0) * len(matrix), eps))
    return (matrix * scale - mean * scale).reshape(weight.shape)


def _fan_in_init(shape: Sequence[int], dtype) -> Array:
    """Haiku's default, which the published baselines use: stddev 1 / sqrt(fan-in), cut at two."""
    return _drawn_flat(hk.initializers.TruncatedNormal(_fan_in_stddev(shape)), shape, dtype)


def he_init(shape: Sequence[int], dtype) -> Array:
    """He et al.'s (arXiv 1502.01852): variance 2 / fan-in, of which a ReLU leaves half; cut at two.

    For networks in which nothing else keeps the signal's size.
    """
    # The standard deviation of a unit normal that is cut at two.
    stddev = _fan_in_stddev(shape) * 2**0.5 / 0.87962566103423978
    return _drawn_flat(hk.initializers.TruncatedNormal(stddev), shape, dtype)


def _fan_in_stddev(shape: Sequence[int]) -> float:
    return math.prod(shape[:-1]) ** -0.5


def _drawn_flat(initial: hk.initializers.Initializer, shape: Sequence[int], dtype) -> Array:
    """Draws a vector and gives it a shape: the same numbers, but XLA compiles it 20 times faster.

    That is on the CPU and for kernels like [3, 3, 8, 9], whose last axis fills no vector register.
    """
    return initial((math.prod(shape),), dtype).reshape(shape)


class Conv2D(hk.Module):
    """A plain convolution, NHWC by HWIO: parameters `w` and, with_bias, `b`.

    It refuses an input of other than `in_channels` channels, if that is not None.
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
        _check_channels(x, self.in_channels)
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.output_channels)
        w = hk.get_parameter('w', shape, jnp.float32, init=self.w_init)
        out = conv.conv2d(x, w.astype(x.dtype), self.stride, padding=self.padding)
        if self.with_bias:
            b = hk.get_parameter('b', shape[-1:], jnp.float32, init=jnp.zeros)
            out = out + b.astype(x.dtype)
        return out


def _check_channels(x: Array, expected: int | None) -> None:
    if expected not in (None, x.shape[-1]):
        raise UsageError(f'channels: the images must have {expected}, not {x.shape[-1]}')


class ScaledWSConv2D(hk.Module):
    """A convolution with scaled weight standardisation: parameters `w`, `gain` and `bias`.

    The weight is standardised in float32 and then cast to the dtype of the input: variances of
    thousands of bfloat16 numbers are not worth having. See `standardize`; without it the weight is
    `w` times `gain`, of the same variance at initialisation, but in expectation only.
    `in_channels` is as in Conv2D.
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
        _check_channels(x, self.in_channels)
        shape = (
            self.kernel_size,
            self.kernel_size,
            x.shape[-1] // self.groups,
            self.output_channels,
        )
        normal = hk.initializers.RandomNormal(_fan_in_stddev(shape))
        w = hk.get_parameter('w', shape, jnp.float32, init=functools.partial(_drawn_flat, normal))
        gain = hk.get_parameter('gain', shape[-1:], jnp.float32, init=self.gain_init)
        bias = hk.get_parameter('bias', shape[-1:], jnp.float32, init=jnp.zeros)
        w = (standardize(w, gain) if self.standardize else w * gain).astype(x.dtype)
        out = conv.conv2d(x, w, self.stride, groups=self.groups, padding=self.padding)
        return out + bias.astype(x.dtype)


class Linear(hk.Module):
    """x @ w + b over the last axis, with float32 parameters."""

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
    """Returns the multiple of `divisor` nearest to `channels`, not 0."""
    return max(divisor, int(channels + divisor / 2) // divisor * divisor)


class SqueezeExcite(hk.Module):
    """Squeeze-and-excitation gates, one per sample and channel (arXiv 1709.01507).

    The hidden layer has max(1, int(channels * ratio)) units, rounded to a multiple of `divisor` if
    that is not 1. The caller multiplies, by twice the gates in Normalizer-Free networks: a sigmoid
    of zero is one half.
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

    A gate is the sigmoid of a convolution, without bias, of the channels' spatial means: parameter
    `w`, [K, 1, 1]. K grows with the number of channels: (log2(channels) + 1) / 2, rounded down and
    then up to an odd number, 3 at least (equation 12 there). Initial weights are uniform within
    1 / sqrt(K), as timm's. The caller multiplies, as with SqueezeExcite.
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
        # Few terms of few numbers: a sum of shifted copies, which every platform and ONNX know.
        shifted = [padded[..., i : i + x.shape[-1]] * w[i, 0, 0] for i in range(self.kernel_size)]
        return jax.nn.sigmoid(functools.reduce(jnp.add, shifted))


def stochastic_depth(key: Array, rate: jax.typing.ArrayLike, x: Array) -> Array:
    """Zeroes each sample of x [N, ...] with probability `rate`.

    Survivors are not rescaled: in a Normalizer-Free network the branch must keep the variance it
    has at evaluation, and the published networks were trained so.
    """
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return x * keep.astype(x.dtype)


class BatchNorm(hk.Module):
    """Batch normalisation with the parameter and state names of hk.BatchNorm.

    Unlike it, scale, offset, statistics and the normalisation itself are float32 whatever the
    dtype of the input, and `cross_replica_axis` may name an axis that is not bound while the
    parameters are made.

    Attributes:
      decay_rate: of the running mean and variance (debiased, so one update is already a mean).
      eps: added to the variance.
      cross_replica_axis: name of the mapped axis to average statistics over; None normalises each
        device's batch by itself, which is a different network: its batch is the device's.
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
        # There are no running statistics yet while the parameters are made.
        is_training = is_training or hk.running_init()
        if is_training or test_local_stats:
            axes = tuple(range(x.ndim - 1))
            # Not E[x^2] - E[x]^2: what float32 loses there turns the sign of activations that a
            # ReLU follows, and gradients of a ResNet-50 with them (by 2.5e-3 in the golden test).
            mean = self._mean(x32, axes)
            var = self._mean(jnp.square(x32 - mean), axes)
        else:
            mean, var = self.mean_ema.average, self.var_ema.average
        if is_training:
            # Haiku's moving averages take a float32 to the power of an int32.
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


def max_pool(x: Array, window: int, stride: int, padding: conv.Padding = 'SAME') -> Array:
    """[N, H, W, C] -> the maximum over square windows."""
    if padding == 'SYMMETRIC':
        ends, padding = (window // 2, window // 2), 'VALID'
        x = jnp.pad(x, ((0, 0), ends, ends, (0, 0)), constant_values=-jnp.inf)
    return hk.max_pool(x, (1, window, window, 1), (1, stride, stride, 1), padding)


def avg_pool(x: Array, window: int, stride: int) -> Array:
    """[N, H, W, C] -> the mean over square windows; at the border, over the pixels there are."""
    return hk.avg_pool(x, (1, window, window, 1), (1, stride, stride, 1), 'SAME')


def average_variance(x: Array) -> Array:
    """Variance of each channel over batch and space, averaged over channels, float32."""
    return jnp.mean(jnp.var(x.astype(jnp.float32), tuple(range(x.ndim - 1))))


def average_squared_mean(x: Array) -> Array:
    """Square of each channel's mean over batch and space, averaged over channels, float32."""
    return jnp.mean(jnp.square(jnp.mean(x.astype(jnp.float32), tuple(range(x.ndim - 1)))))


def signal_metrics(activations: Sequence[Array], branches: Sequence[Array]) -> dict[str, Array]:
    """What a signal-propagation plot shows ("NF-ResNets", section 3).

    Args:
      activations: [N, H, W, C] before the first block and after each of B blocks.
      branches: [N, H, W, C] of the B residual branches, before they are scaled and added.

    Returns:
      avg_sq_mean and avg_var, each [B + 1], and res_avg_var, [B], float32.
    """
    return {
        'avg_sq_mean': jnp.stack([average_squared_mean(x) for x in activations]),
        'avg_var': jnp.stack([average_variance(x) for x in activations]),
        'res_avg_var': jnp.stack([average_variance(x) for x in branches]),
    }
