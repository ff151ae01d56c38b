"""Rules for which axes of a parameter make up one unit in adaptive gradient clipping.

The paper clips each unit separately: an output channel of a convolution, an output feature of a
linear layer, a whole bias or gain. A rule is a function `(path, leaf) -> axes` that returns the
axes to take the norm over, that is, all axes *but* the output axes:

* `path` joins the keys of the leaf in the tree by `/`: `'NFNet/~/linear/w'`;
* `leaf` is a `jax.ShapeDtypeStruct`, with `shape`, `ndim`, `size` and `dtype` but no values;
* the axes are an int, a tuple of ints (negative ones count from the end), or None for `by_rank`.

Like the paper's code, the rules here treat a leaf with at most one axis longer than 1 as a vector,
which is one unit whatever its rank (Equinox stores the bias of a convolution as [C, 1, 1]). Only
`dense_general` and the kernels of `flax_attention` go by the place of an axis.

The rule for each layout of kernels:

* `hwio`: Haiku and Flax, linear layers (IO) and convolutions (WIO, HWIO, DHWIO), also grouped and
  depthwise ones;
* `oihw`: Equinox, also transposed convolutions, and PyTorch's order (OI, OIW, OIHW, OIDHW);
* `hwoi`: `haiku.Conv2DTranspose` and Flax `ConvTranspose(transpose_kernel=True)`;
* `flax_attention`: Flax `MultiHeadAttention`, [in, heads, size] and [heads, size, out];
* `dense_general(inputs)`: Flax `DenseGeneral`, inputs first, then outputs;
* `stacked(rule)`: layers stacked by scan or vmap, with a leading axis for the layers.

A group of a grouped convolution is a range of output channels, so its units are the channels of
the plain layout. The exception is PyTorch's grouped *transposed* convolution, [I, O/groups, H, W]:
its unit is a slice of both leading axes, which no set of axes describes; reshape it to
[groups, I/groups, O/groups, H, W] and reduce over (1, 3, 4).

For a tree that mixes layouts, write your own rule:

>>> from nfnets_jax import describe_clipping, unit_axes
>>> def axes(path, leaf):
...     rule = unit_axes.stacked(unit_axes.hwio) if path.startswith('blocks/') else unit_axes.hwio
...     return rule(path, leaf)
>>> shapes = {'blocks': {'w': (6, 3, 3, 8, 8), 'b': (6, 8)}, 'stem': {'w': (3, 3, 3, 8), 'b': (8,)}}
>>> params = {
...     module: {name: jax.ShapeDtypeStruct(shape, 'float32') for name, shape in leaves.items()}
...     for module, leaves in shapes.items()
... }
>>> print(describe_clipping(params, axis=axes))
leaf      shape            norm over  units  clipping  group
blocks/b  (6, 8)           (1,)           6      0.01  blocks
blocks/w  (6, 3, 3, 8, 8)  (1, 2, 3)     48      0.01  blocks
stem/b    (8,)             (0,)           1      0.01  stem
stem/w    (3, 3, 3, 8)     (0, 1, 2)      8      0.01  stem
63 units in 4 of 4 leaves: gradient norm <= clipping * max(parameter norm, 0.001)
"""

import operator
from collections.abc import Callable, Sequence

import jax
import numpy as np

Axes = int | Sequence[int] | None
Rule = Callable[[str, jax.ShapeDtypeStruct], Axes]


def _is_vector(leaf: jax.ShapeDtypeStruct) -> bool:
    return bool(sum(size != 1 for size in leaf.shape) <= 1)


def by_rank(path: str, leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The rule of `optax.adaptive_grad_clip`; `axis=None` selects it.

    All axes of scalars and vectors, axis 0 at ranks 2 and 3, all but the last at ranks 4 and 5.
    At rank 3 this fits an attention kernel [in, heads, size], but *not* the kernel of a 1-D
    convolution, WIO, which needs `hwio`.

    Raises:
      ValueError: the rank is 6 or more, which does not determine the layout.
    """
    if _is_vector(leaf):
        return tuple(range(leaf.ndim))
    if leaf.ndim > 5:
        raise ValueError(
            f'{path}: the rank of shape {leaf.shape} does not determine which axes are a unit; '
            'name them: axis=unit_axes.hwio, other axes, or a function (path, leaf) -> axes'
        )
    return (0,) if leaf.ndim <= 3 else tuple(range(leaf.ndim - 1))


def hwio(path: str, leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Output channel last (Haiku, Flax; any number of spatial axes): all axes but the last."""
    del path
    return tuple(range(leaf.ndim if _is_vector(leaf) else leaf.ndim - 1))


def oihw(path: str, leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Output channel first (Equinox, PyTorch order): all axes but the first."""
    del path
    return tuple(range(0 if _is_vector(leaf) else 1, leaf.ndim))


def hwoi(path: str, leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Output channel last but one (Haiku's transposed convolutions): all axes but that one."""
    del path
    if _is_vector(leaf):
        return tuple(range(leaf.ndim))
    return tuple(axis for axis in range(leaf.ndim) if axis != leaf.ndim - 2)


def per_tensor(path: str, leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The whole leaf is one unit: layer-wise clipping, with which the paper compares."""
    del path
    return tuple(range(leaf.ndim))


def dense_general(inputs: int) -> Rule:
    """Returns a rule for kernels of `inputs` input axes followed by any number of output axes.

    The rank of a bias, which has only output axes, can be that of a kernel: select another rule for
    biases, by their path.

    Raises:
      ValueError: `inputs` is less than 1; in the rule: a leaf has fewer axes than that.
    """
    if inputs < 1:
        raise ValueError(f'dense_general: inputs must be at least 1, got {inputs}')

    def rule(path: str, leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
        if leaf.ndim < inputs:
            raise ValueError(f'{path}: shape {leaf.shape} has fewer than {inputs} input axes')
        return tuple(range(inputs))

    return rule


def flax_attention(path: str, leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Flax's `MultiHeadAttention` (Linen and NNX), recognized by names; other leaves as `hwio`.

    One unit per head and feature in the query, key and value kernels [in, heads, size], one for
    each of their biases [heads, size]; one per output feature in the out kernel [heads, size, out].
    """
    names = path.split('/')
    for module, name in zip(names, names[1:], strict=False):
        if module in ('query', 'key', 'value'):
            if name == 'kernel':
                return (0,)
            if name == 'bias':
                return per_tensor(path, leaf)
    return hwio(path, leaf)


def stacked(rule: Rule, axes: int = 1) -> Rule:
    """Returns `rule` for layers stacked along `axes` leading axes, which are never reduced.

    `jax.lax.scan` over layers, `jax.vmap` of an initializer, `flax.nnx.scan` and
    `equinox.filter_vmap` make such leaves. Each layer is then clipped as if it were alone.

    Raises:
      ValueError: `axes` is less than 1; in the rule: a leaf has fewer axes than that.
    """
    if axes < 1:
        raise ValueError(f'stacked: axes must be at least 1, got {axes}')

    def stacked_rule(path: str, leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
        if leaf.ndim < axes:
            raise ValueError(f'{path}: shape {leaf.shape} has fewer than {axes} stacked axes')
        layer = jax.ShapeDtypeStruct(leaf.shape[axes:], leaf.dtype)
        return tuple(axis + axes for axis in normalize(path, layer, rule(path, layer)))

    return stacked_rule


def normalize(path: str, leaf: jax.ShapeDtypeStruct, axes: Axes) -> tuple[int, ...]:
    """Returns the axes as a sorted tuple of non-negative ints; None becomes `by_rank`'s.

    Raises:
      ValueError: an axis is not an int, out of range or repeated; the message begins with `path`.
    """
    if axes is None:
        return by_rank(path, leaf)
    try:
        chosen = [operator.index(axis) for axis in (axes if np.iterable(axes) else (axes,))]
    except TypeError:
        raise ValueError(
            f'{path}: axes must be ints known before tracing, got {axes!r} (with '
            "optax.inject_hyperparams pass static_args=('axis',))"
        ) from None
    outside = [axis for axis in chosen if not -leaf.ndim <= axis < leaf.ndim]
    if outside:
        raise ValueError(
            f'{path}: axis {outside[0]} is out of range for shape {leaf.shape}; give a function '
            '(path, leaf) -> axes, such as unit_axes.hwio, or exclude the leaf with mask'
        )
    positive = sorted(axis % leaf.ndim for axis in chosen)
    if len(set(positive)) < len(positive):
        raise ValueError(f'{path}: axes {tuple(chosen)} repeat an axis of shape {leaf.shape}')
    return tuple(positive)
