"""Adaptive gradient clipping: bounds the ratio of gradient norm to parameter norm, unit by unit.

Needs only jax and optax. Source: Brock et al., "High-Performance Large-Scale Image Recognition
Without Normalization", https://arxiv.org/abs/2102.06171, section 4, equation 3.

>>> import jax.numpy as jnp, optax
>>> from nfnets_jax import adaptive_grad_clip
>>> params = {'w': jnp.ones((4, 2)), 'b': jnp.zeros(2)}
>>> tx = optax.chain(adaptive_grad_clip(0.01), optax.sgd(0.1, momentum=0.9, nesterov=True))
>>> state = tx.init(params)
>>> grads = {'w': jnp.array([[0.0, 1.0]] * 4), 'b': jnp.zeros(2)}
>>> updates, state = tx.update(grads, state, params)
>>> round(float(optax.tree.get(state, 'clipped_fraction')), 3)  # of w's 2 units and b's 1
0.333
"""

import functools
import inspect
import itertools
import math
import os.path
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

import nfnets_jax.unit_axes as unit_axes

__all__ = [
    'AdaptiveGradClipState',
    'adaptive_grad_clip',
    'clipping_groups',
    'describe_clipping',
    'unit_axes',
]

PyTree = Any
Scalar = float | jax.Array
PerLeaf = Callable[[str, jax.ShapeDtypeStruct], float | None]


class AdaptiveGradClipState(NamedTuple):
    """Statistics of the last update. The tree structure does not depend on the parameters.

    Attributes:
      clipped_fraction: f32 scalar, the fraction of all units whose gradient was scaled down (a unit
        that contains a NaN counts). 0 before the first update.
      clipped_fraction_by_group: f32 [groups], the same for each top-level group of parameters, in
        the order of `clipping_groups(params)`. 0 for a group without clipped leaves.
      step: int32 scalar, the number of updates, if `clipping` is a schedule; else None.
    """

    clipped_fraction: jax.Array
    clipped_fraction_by_group: jax.Array
    step: jax.Array | None


class _Leaf(NamedTuple):
    """A leaf of the parameters and how it is clipped."""

    path: str
    group: str
    shape: tuple[int, ...]  # of the whole leaf, even where a device holds only a part of it
    clipping: Any  # a Python number or a scalar array; None: not clipped
    axes: tuple[int, ...] = ()
    sum_over: tuple[str, ...] = ()  # the mesh axes that split `axes`
    split_by: tuple[str, ...] = ()  # the mesh axes that split the other axes, hence the units

    @property
    def units(self) -> int:
        return math.prod(n for i, n in enumerate(self.shape) if i not in self.axes)


def adaptive_grad_clip(
    clipping: Scalar | optax.Schedule = 0.01,
    eps: Scalar = 1e-3,
    axis: unit_axes.Axes | unit_axes.Rule = None,
    *,
    clipping_by_leaf: PerLeaf | None = None,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    specs: PyTree | None = None,
) -> optax.GradientTransformation:
    """Scales each unit's gradient G down to norm `clipping * max(||W||, eps)` if it is longer.

    A drop-in for `optax.adaptive_grad_clip`: the same first three arguments and the same numbers.
    Put it before weight decay, momentum and the learning rate. The paper exempts the weight of the
    last linear layer: use `mask`, or a `clipping_by_leaf` that returns None for it.

    Norms are computed in float32 (float64 for float64 leaves), whatever the dtype of the leaves,
    and are exact to rounding at any scale. (One exception: `clipping` so small that it brings the
    bound below 2e-34, although `eps` is at least 1e-30, counts as 0.) The output has the dtype of
    the gradient. No dtype is promoted implicitly, so `jax.numpy_dtype_promotion('strict')` is fine.
    Units within the bound are returned bit for bit. Leaves that are not inexact arrays (None,
    `optax.MaskedNode`, integers, float0) are returned unchanged. A NaN spreads over its own unit
    only, so `optax.apply_if_finite` sees it.

    Args:
      clipping: lambda, the largest allowed ratio ||G|| / max(||W||, eps): a float, or a schedule
        `step -> float`. The paper uses 0.01 for batches of 4096 and more (up to 0.16) for smaller
        ones.
      eps: a lower limit on the parameter norm, so that parameters initialized to zero can move.
      axis: the axes to take the norm over, that is, all but the output axes: None for the rule of
        optax (`unit_axes.by_rank`), ints for every leaf, or a function `(path, leaf) -> axes`. See
        `nfnets_jax.unit_axes` for a rule that fits your layout.
      clipping_by_leaf: a function `(path, leaf) -> float | None` that replaces `clipping`; None
        exempts the leaf. `path` and `leaf` are as in `nfnets_jax.unit_axes`.
      mask: a tree of bools like the parameters or a prefix of it, or a function from the parameters
        to such a tree; True where to clip, as in `optax.add_decayed_weights`.
      specs: only for `jax.shard_map` over sharded parameters (plain `jax.jit` does not need it): a
        tree of `jax.sharding.PartitionSpec` like the parameters or a prefix of it, the `in_specs`
        of the parameters. Norms are then those of whole units.

    Returns:
      An `optax.GradientTransformation` with an `AdaptiveGradClipState`. `update` needs `params`.

    Raises:
      ValueError: `clipping` or `eps` is a negative number, or both `clipping` and
        `clipping_by_leaf` are given; at `init`: the clipping of a leaf is negative, axes are
        out of range, `mask` or `clipping_by_leaf` selects no leaf, `specs` names a mesh axis
        that the mesh lacks; at `update`: `params` are missing or do not match the gradients. A
        message about a leaf begins with its path.
    """
    rule = _clipping_rule(clipping, clipping_by_leaf)
    scheduled = _is_schedule(rule)
    _check_arguments(rule, eps)

    def init(params: PyTree) -> AdaptiveGradClipState:
        _plan(params, _at_step(rule, 0), axis, mask, specs)  # raises what is wrong with them
        # Each zero has a buffer of its own, so that the state can be donated.
        return AdaptiveGradClipState(
            clipped_fraction=jnp.zeros((), jnp.float32),
            clipped_fraction_by_group=jnp.zeros(len(clipping_groups(params)), jnp.float32),
            step=jnp.zeros((), jnp.int32) if scheduled else None,
        )

    def update(
        updates: PyTree, state: AdaptiveGradClipState, params: PyTree | None = None
    ) -> tuple[PyTree, AdaptiveGradClipState]:
        if params is None:
            raise ValueError('adaptive_grad_clip needs params: tx.update(grads, state, params)')
        step = state.step if scheduled else None
        leaves = _plan(params, _at_step(rule, step), axis, mask, specs)
        treedef: Any = jax.tree.structure(params, is_leaf=_is_absent)
        weights = treedef.flatten_up_to(params)
        grads = treedef.flatten_up_to(updates)
        _check_alike(leaves, grads, weights)

        chosen = [
            i for i, leaf in enumerate(leaves) if leaf.clipping is not None and _is_float(grads[i])
        ]
        clipped, over = _clip(
            [leaves[i] for i in chosen],
            [jnp.asarray(grads[i]) for i in chosen],
            [jnp.asarray(weights[i]) for i in chosen],
            eps,
        )
        for i, grad in zip(chosen, clipped, strict=True):
            grads[i] = grad

        groups = clipping_groups(params)
        fraction, by_group = _fractions(groups, [leaves[i] for i in chosen], over)
        step = None if step is None else optax.safe_increment(step)
        return treedef.unflatten(grads), AdaptiveGradClipState(fraction, by_group, step)

    return optax.GradientTransformation(init, update)


def clipping_groups(params: PyTree) -> list[str]:
    """Returns the names of the groups that `clipped_fraction_by_group` reports on, sorted.

    The group of a leaf is the first part of its path that is not shared by all leaves, ignoring
    `~`: `nf_block_3` for the Haiku parameter `NFNet/~/nf_block_3/~/conv0/w`, `Conv_0` for Flax's
    `params/Conv_0/kernel`.

    >>> import jax.numpy as jnp
    >>> params = {'net/~/stem': {'w': jnp.ones(2)}, 'net/~/head': {'w': jnp.ones(2)}}
    >>> clipping_groups(params)
    ['head', 'stem']
    """
    return sorted(set(_groups(_paths(params))))


def gradient_to_weight(updates: PyTree, params: PyTree, eps: Scalar = 1e-3) -> jax.Array:
    """Returns ||G|| / max(||W||, eps) of all leaves of each group together, f32 [groups].

    Groups are in the order of `clipping_groups(params)`. 0 for a group without gradients.
    """
    treedef: Any = jax.tree.structure(params, is_leaf=_is_absent)
    weights, grads = treedef.flatten_up_to(params), treedef.flatten_up_to(updates)
    norms: dict[str, jax.Array] = {}
    of_leaves = _groups(_paths(params))
    for group in sorted(set(of_leaves)):
        own = [
            (grad, weight)
            for name, grad, weight in zip(of_leaves, grads, weights, strict=True)
            if name == group and _is_float(grad)
        ]
        of_grads, of_weights = (optax.tree.norm([pair[i] for pair in own]) for i in (0, 1))
        norms[group] = jnp.asarray(of_grads / jnp.maximum(of_weights, eps), jnp.float32)
    return jnp.stack(list(norms.values())) if norms else jnp.zeros(0, jnp.float32)


def describe_clipping(
    params: PyTree,
    clipping: Scalar | optax.Schedule = 0.01,
    eps: Scalar = 1e-3,
    axis: unit_axes.Axes | unit_axes.Rule = None,
    *,
    clipping_by_leaf: PerLeaf | None = None,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> str:
    """Returns a table of how `adaptive_grad_clip` with these arguments treats each leaf.

    `params` may hold arrays or `jax.ShapeDtypeStruct`s, such as `jax.eval_shape` returns.

    >>> import jax.numpy as jnp
    >>> conv = {'w': jnp.ones((3, 3, 8, 16)), 'b': jnp.ones(16)}
    >>> params = {'conv': conv, 'head': jnp.ones((16, 10))}
    >>> print(describe_clipping(params, mask={'conv': True, 'head': False}))
    leaf    shape          norm over  units  clipping  group
    conv/b  (16,)          (0,)           1      0.01  conv
    conv/w  (3, 3, 8, 16)  (0, 1, 2)     16      0.01  conv
    head    (16, 10)       -              -         -  head
    17 units in 2 of 3 leaves: gradient norm <= clipping * max(parameter norm, 0.001)
    """
    rule = _clipping_rule(clipping, clipping_by_leaf)
    _check_arguments(rule, eps)
    leaves = _plan(params, _at_step(rule, 0), axis, mask, None)
    rows = [('leaf', 'shape', 'norm over', 'units', 'clipping', 'group')]
    for leaf in leaves:
        if leaf.clipping is None:
            how = ('-', '-', '-')
        else:
            how = (str(leaf.axes), str(leaf.units), f'{float(leaf.clipping):g}')
        rows.append((leaf.path, str(leaf.shape), *how, leaf.group))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, '<<<>><', strict=True)
        lines.append('  '.join(f'{cell:{side}{width}}' for cell, width, side in cells).rstrip())
    clipped = [leaf for leaf in leaves if leaf.clipping is not None]
    units = sum(leaf.units for leaf in clipped)
    when = ', clipping as at step 0' if _is_schedule(rule) else ''
    lines.append(
        f'{units} units in {len(clipped)} of {len(leaves)} leaves: '
        f'gradient norm <= clipping * max(parameter norm, {eps:g}){when}'
    )
    return '\n'.join(lines)


def _clip(
    leaves: Sequence[_Leaf], grads: Sequence[jax.Array], weights: Sequence[jax.Array], eps: Scalar
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns the clipped gradients, and which of their units exceeded the bound."""
    if not leaves:
        return [], []

    def form(joined: bool, *arrays: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        return _clip_in_groups(joined, leaves, arrays[: len(leaves)], arrays[len(leaves) :], eps)

    clipped, over = jax.lax.platform_dependent(
        *grads,
        *weights,
        cpu=functools.partial(form, False),
        default=functools.partial(form, True),
    )
    return clipped, over


def _clip_in_groups(
    joined: bool,
    leaves: Sequence[_Leaf],
    grads: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    eps: Scalar,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns what `_clip` does, for as many leaves at once as possible if `joined`.

    Any instruction on an accelerator costs time, however few numbers it computes: 1,800 cycles on a
    TPU v5e, a launch on a GPU. There what is computed once a unit is one vector for all leaves. On
    a CPU that takes a quarter longer than leaf by leaf (processor time for an NFNet-F0's update).
    """
    # With a larger floor under all norms there is no need to resolve smaller ones.
    tiny = not (isinstance(eps, int | float) and eps >= 1e-30)
    clipped, over = list(grads), [jnp.zeros(0, bool)] * len(leaves)
    alone = ([i] for i in range(len(leaves)))
    for members in _alike(leaves, grads, weights) if joined else alone:
        first = leaves[members[0]]
        pairs = tuple((_parts(grads[i]), _parts(weights[i])) for i in members)
        axes = tuple(leaves[i].axes for i in members)
        norms = _norms_traced_once(pairs, axes, tiny, joined)
        grad_norm, norm = (_over_mesh(x, first.sum_over) for x in norms)
        dtype = np.promote_types(grad_norm.dtype, norm.dtype)
        grad_norm, norm = grad_norm.astype(dtype), norm.astype(dtype)
        bound = jnp.asarray(first.clipping, dtype) * jnp.maximum(norm, jnp.asarray(eps, dtype))
        if not tiny:
            # A tiny `clipping` is left: norms that underflow must not pass its bound.
            bound = jnp.where(bound < 2e-34, 0, bound)
        within = grad_norm <= bound
        # Two factors, because their product underflows for large gradients. Both are 1 within the
        # bound, unless it is 0.
        unit_length = 1 / jnp.where(within, 1, grad_norm)
        length = jnp.where(within & (bound > 0), 1, bound)
        shapes = tuple(_kept(grads[i].shape, leaves[i].axes) for i in members)
        vectors = (_split(x, shapes) for x in (unit_length, length, ~within))
        for i, *factors, leaf_over in zip(members, *vectors, strict=True):
            clipped[i], over[i] = _multiply(grads[i], *factors), leaf_over
    return clipped, over


def _alike(
    leaves: Sequence[_Leaf], grads: Sequence[jax.Array], weights: Sequence[jax.Array]
) -> Iterable[list[int]]:
    """Returns the indices of leaves whose units can be in one vector, those of a shape together."""
    groups: dict[Any, list[int]] = {}
    for i, (leaf, *pair) in enumerate(zip(leaves, grads, weights, strict=True)):
        types = [jax.typeof(x) for x in pair]
        if leaf.sum_over or leaf.split_by or any(any(x.sharding.spec) for x in types):
            groups[i] = [i]
            continue
        clipping = leaf.clipping
        value = clipping if isinstance(clipping, int | float) else id(clipping)
        # What stands behind the shape, such as 'float32[8]{V:devices}', says over which mesh axes
        # of a shard_map the array varies.
        key = value, tuple((x.dtype, x.sharding.mesh, str(x).partition(']')[2]) for x in types)
        groups.setdefault(key, []).append(i)
    for members in groups.values():
        yield sorted(members, key=lambda i: (leaves[i].shape, leaves[i].axes))


def _kept(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a sum over `axes`, which are kept with length 1."""
    return tuple(1 if axis in axes else size for axis, size in enumerate(shape))


def _split(vector: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """Returns consecutive parts of a vector, in these shapes."""
    if len(shapes) == 1:
        return [vector.reshape(shapes[0])]
    parts = jnp.split(vector, np.cumsum([math.prod(shape) for shape in shapes])[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _multiply(x: jax.Array, *factors: jax.Array) -> jax.Array:
    """Returns x times real factors, computed in their dtype, in the dtype of x."""
    if jnp.iscomplexobj(x):
        parts = [_multiply(part, *factors) for part in (x.real, x.imag)]
        return jax.lax.complex(*parts)
    product = x.astype(factors[0].dtype)
    for factor in factors:
        product *= factor
    return product.astype(x.dtype)


def _parts(x: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the real and imaginary part, if there is one, in float32 or float64."""
    parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
    dtype = jnp.float64 if parts[0].dtype == jnp.float64 else jnp.float32
    return tuple(part.astype(dtype) for part in parts)


_Parts = tuple[jax.Array, ...]
_Sums = Callable[[Sequence[jax.Array], tuple[int, ...]], Sequence[jax.Array]]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _norms(
    pairs: tuple[tuple[_Parts, _Parts], ...],
    axes: tuple[tuple[int, ...], ...],
    tiny: bool,
    joined: bool,
) -> tuple[jax.Array, jax.Array]:
    """Returns L2 norms of the first and of the second array of all pairs, as two vectors.

    A pair has one shape; its norms are over its `axes`, and over real and imaginary parts. They are
    exact to rounding up to the largest number of the dtype, and down to the smallest if `tiny`,
    else to 2e-34.

    Takes sums of squares side by side, of the numbers scaled by different powers of two. Where one
    sum overflows, the next one has lost nothing to underflow. J. L. Blue, "A Portable Fortran
    Program to Find the Euclidean Norm of a Vector" (1978), sorts the numbers by size into such
    sums; here each sum contains all numbers, so that they need no comparisons.
    """
    # A TPU concatenates by one instruction for each array, and has another for each reduction; one
    # that reads gradient and weight side by side is the least. Other platforms know single sums
    # only: the CPU its library, a GPU its fusions. There stacking small leaves saves a kernel each.
    leaves, structure = jax.tree.flatten(pairs)

    def norms(stack_up_to: int, sums: _Sums, *leaves: jax.Array) -> tuple[jax.Array, jax.Array]:
        pairs = jax.tree.unflatten(structure, leaves)
        rows = []  # of each pair or stack: the sums of the first array, of the second; exponents
        for members in _stacks(pairs, axes, stack_up_to):
            pair, over = pairs[members[0]], axes[members[0]]
            count = math.prod(pair[0][0].shape[axis] for axis in over)
            exponents = [_exponents(len(parts) * count, parts[0].dtype, tiny) for parts in pair]
            if len(members) > 1:
                pair = jax.tree.map(_stack, *(pairs[i] for i in members))
                over = tuple(axis + 1 for axis in over)
            rows.append([*_scaled_sums(pair, exponents, over, sums), exponents])
        of_first, of_second, powers = zip(*rows, strict=True)
        first, second = zip(*powers, strict=True)
        return _choose(of_first, first), _choose(of_second, second)

    apart = functools.partial(norms, _SMALL, _sums_apart)
    if not joined:  # The form of a CPU.
        return apart(*leaves)
    together = functools.partial(norms, 0, _sums_together)
    first, second = jax.lax.platform_dependent(*leaves, tpu=together, default=apart)
    return first, second


_SMALL = 1 << 14  # numbers in a leaf that is worth copying to share a reduction with others


def _stacks(
    pairs: Sequence[tuple[_Parts, _Parts]], axes: Sequence[tuple[int, ...]], up_to: int
) -> Iterable[list[int]]:
    """Returns the indices of consecutive pairs of a shape up to a size, and of each other pair."""

    def kind(i: int) -> Any:
        array = pairs[i][0][0]
        return (array.shape, axes[i]) if array.size <= up_to else i

    return [list(members) for _, members in itertools.groupby(range(len(pairs)), kind)]


def _stack(*arrays: jax.Array) -> jax.Array:
    return jnp.concatenate([x.ravel() for x in arrays]).reshape(-1, *arrays[0].shape)


def _scaled_sums(
    pair: tuple[_Parts, _Parts],
    exponents: Sequence[Sequence[int]],
    axes: tuple[int, ...],
    sums: _Sums,
) -> list[list[jax.Array]]:
    """Returns for both arrays the sums of their squares, scaled by each power of two."""
    # The barrier keeps XLA from factoring a constant out of a square, where it underflows, and from
    # writing one broadcast of it to memory for all leaves of a shape. It is one for all sums, so
    # that they can share one read of the numbers.
    scales = [
        [jnp.asarray(2.0**exponent, parts[0].dtype) for exponent in each]
        for parts, each in zip(pair, exponents, strict=True)
    ]
    pair, scales = jax.lax.optimization_barrier((pair, scales))
    squares = [
        [[jnp.square(part * scale) for part in parts] for scale in each]
        for parts, each in zip(pair, scales, strict=True)
    ]
    leaves, structure = jax.tree.flatten(squares)
    found = jax.tree.unflatten(structure, sums(leaves, axes))
    return [[functools.reduce(jnp.add, parts) for parts in each] for each in found]


def _sums_together(arrays: Sequence[jax.Array], axes: tuple[int, ...]) -> Sequence[jax.Array]:
    zeros = [jnp.zeros((), x.dtype) for x in arrays]
    return list(jax.lax.reduce(arrays, zeros, lambda x, y: list(map(jnp.add, x, y)), axes))


def _sums_apart(arrays: Sequence[jax.Array], axes: tuple[int, ...]) -> Sequence[jax.Array]:
    return [jnp.sum(x, axis=axes) for x in arrays]


def _exponents(count: int, dtype: Any, tiny: bool) -> list[int]:
    """Returns the powers of two by which `count` numbers are scaled before they are squared."""
    info = jnp.finfo(dtype)
    # Scaled by `down`, no sum overflows unless the norm itself does. `up` is the largest exponent
    # at which a sum overflows only if what underflowed in the other is a rounding error there. In
    # float32, for 2**12 numbers: 45 and -64.
    down = -(info.maxexp // 2)
    up = -down - 1 - math.ceil((info.nmant + 1 + math.log2(max(count, 1))) / 2)
    exponents = [up, down]
    if tiny:
        exponents.insert(0, info.maxexp - 8)  # the inverse is a normal number
    return exponents


def _choose(sums: Sequence[Sequence[jax.Array]], exponents: Sequence[Sequence[int]]) -> jax.Array:
    """Returns all norms as a vector, each by its first sum of scaled squares that is finite."""
    columns = zip(zip(*sums, strict=True), zip(*exponents, strict=True), strict=True)
    *scaled_up, norm = [
        jnp.sqrt(jnp.concatenate([total.ravel() for total in totals]))
        * jnp.concatenate(
            [
                jnp.full(total.size, 2.0**-exponent, total.dtype)
                for total, exponent in zip(totals, powers, strict=True)
            ]
        )
        for totals, powers in columns
    ]
    for candidate in reversed(scaled_up):
        norm = jnp.where(candidate < jnp.inf, candidate, norm)
    return norm


@_norms.defjvp
def _norms_jvp(
    axes: tuple[tuple[int, ...], ...],
    tiny: bool,
    joined: bool,
    primals: tuple[Any, ...],
    tangents: Any,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The derivative is the unit vector along the numbers; 0 at 0."""
    (pairs,), (changes,) = primals, tangents
    norms = _norms(pairs, axes, tiny, joined)
    shapes = [_kept(parts[0].shape, over) for (parts, _), over in zip(pairs, axes, strict=True)]

    def along(norm: jax.Array, side: int) -> jax.Array:
        safe = _split(jnp.where(norm == 0, 1, norm), shapes)
        totals = [
            sum(
                jnp.sum(part / length * change, axis=over).ravel()
                for part, change in zip(pair[side], by[side], strict=True)
            )
            for pair, by, length, over in zip(pairs, changes, safe, axes, strict=True)
        ]
        return jnp.concatenate(totals)

    return norms, (along(norms[0], 0), along(norms[1], 1))


# Leaves repeat their shapes. `inline`: the program is as without this, only its trace is shared.
_norms_traced_once = jax.jit(_norms, static_argnums=(1, 2, 3), inline=True)


def _over_mesh(norm: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Returns the norms of units that are split between devices along the mesh axes `names`."""
    if not names:
        return norm
    largest = jax.lax.pmax(jax.lax.stop_gradient(norm), names)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return scale * _sqrt(jax.lax.psum((norm / scale) ** 2, names))


def _sqrt(x: jax.Array) -> jax.Array:
    """Returns the square root, with gradient 0 at 0."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))


def _fractions(
    groups: Sequence[str], leaves: Sequence[_Leaf], over: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns the fraction of units that exceed the bound, of all units and by group."""
    units = dict.fromkeys(groups, 0)
    alike: dict[tuple[str, tuple[str, ...]], list[jax.Array]] = {}
    for leaf, leaf_over in zip(leaves, over, strict=True):
        units[leaf.group] += leaf.units
        alike.setdefault((leaf.group, leaf.split_by), []).append(leaf_over)
    counts = {group: jnp.zeros((), jnp.float32) for group in groups}
    for (group, names), flags in alike.items():
        for joined in _joined(flags):
            count = jnp.sum(joined, dtype=jnp.float32)
            counts[group] += jax.lax.psum(count, names) if names else count
    total = sum(counts.values(), jnp.zeros((), jnp.float32)) / max(sum(units.values()), 1)
    if not groups:
        return total, jnp.zeros(0, jnp.float32)
    return total, jnp.stack([counts[group] / max(units[group], 1) for group in groups])


def _joined(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the elements of all arrays in one vector per sharding, to need few operations."""
    alike: dict[Any, list[jax.Array]] = {}
    for x in arrays:
        vector = x.ravel()
        alike.setdefault(jax.typeof(vector).sharding, []).append(vector)
    return [jnp.concatenate(vectors) for vectors in alike.values()]


def _plan(
    params: PyTree,
    clipping: Scalar | PerLeaf,
    axis: unit_axes.Axes | unit_axes.Rule,
    mask: PyTree | Callable[[PyTree], PyTree] | None,
    specs: PyTree | None,
) -> list[_Leaf]:
    """Returns how each leaf of `params` is clipped; None and MaskedNode count as leaves."""
    entries = jax.tree.leaves(params, is_leaf=_is_absent)
    if not entries:  # as optax does it to learn the state's structure, see optax.tree_map_params
        return []
    paths = _paths(params)
    # A mask that is itself a tree may be callable too, such as an Equinox module.
    if callable(mask) and jax.tree_util.all_leaves([mask]):
        mask = mask(params)
    masks = _broadcast(True if mask is None else mask, params)
    leaf_specs = _broadcast(PartitionSpec() if specs is None else specs, params)

    leaves = []
    for path, group, value, selected, spec in zip(
        paths, _groups(paths), entries, masks, leaf_specs, strict=True
    ):
        if not _is_float(value):
            leaves.append(_Leaf(path, group, np.shape(value), None))
            continue
        names = _mesh_axes(path, spec, np.ndim(value))
        shape = tuple(
            size * math.prod(jax.lax.axis_size(name) for name in by)
            for size, by in zip(np.shape(value), names, strict=True)
        )
        leaf = jax.ShapeDtypeStruct(shape, jnp.result_type(value))
        ratio = clipping(path, leaf) if callable(clipping) else clipping
        if not selected or ratio is None or leaf.size == 0:
            leaves.append(_Leaf(path, group, shape, None))
            continue
        _check_not_negative(f'{path}: clipping', ratio)
        axes = unit_axes.normalize(path, leaf, axis(path, leaf) if callable(axis) else axis)
        sum_over = tuple(name for i in axes for name in names[i])
        split_by = tuple(name for i in range(leaf.ndim) if i not in axes for name in names[i])
        leaves.append(_Leaf(path, group, shape, ratio, axes, sum_over, split_by))

    floats = [
        path
        for path, value in zip(paths, entries, strict=True)
        if _is_float(value) and np.size(value)
    ]
    if floats and all(leaf.clipping is None for leaf in leaves):
        raise ValueError(
            f'mask and clipping select none of the {len(floats)} leaves (the first is '
            f'{floats[0]!r}); select one or remove adaptive_grad_clip'
        )
    return leaves


def _broadcast(prefix: PyTree, tree: PyTree) -> list[Any]:
    """Returns the leaves of `prefix`, each repeated for the leaves of `tree` below it."""
    full = jax.tree.map(
        lambda leaf, subtree: jax.tree.map(lambda _: leaf, subtree, is_leaf=_is_absent),
        prefix,
        tree,
    )
    return jax.tree.leaves(full, is_leaf=_is_absent)


def _paths(params: PyTree) -> list[str]:
    """Returns the path of each leaf, its keys joined by `/`; `.` for a tree that is one leaf."""
    entries = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_absent)[0]
    return [jax.tree_util.keystr(path, simple=True, separator='/') or '.' for path, _ in entries]


def _groups(paths: Sequence[str]) -> list[str]:
    """Returns for each path the first part that is not shared by all paths, ignoring `~`."""
    parts = [[part for part in path.split('/') if part != '~'] for path in paths]
    shared = len(os.path.commonprefix(parts))
    return [part[min(shared, len(part) - 1)] for part in parts]


def _mesh_axes(path: str, spec: PartitionSpec | None, ndim: int) -> list[tuple[str, ...]]:
    """Returns for each axis of a leaf the mesh axes that split it between devices.

    Skips a mesh axis that is not manual here (outside `shard_map`, or automatic inside), because
    arrays have their full size along it.
    """
    by_axis: list[tuple[str, ...]] = []
    for entry in spec or ():
        names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        by_axis.append(tuple(name for name in names if _is_manual(path, name)))
    if len(by_axis) > ndim:
        raise ValueError(f'{path}: {spec} in specs has more entries than the leaf has axes, {ndim}')
    return by_axis + [()] * (ndim - len(by_axis))


def _is_manual(path: str, name: str) -> bool:
    known = jax.sharding.get_abstract_mesh().axis_names
    if known and name not in known:
        raise ValueError(f'{path}: specs names the mesh axis {name!r}; the mesh has {known}')
    try:
        jax.lax.axis_size(name)
    except NameError:
        return False
    return True


def _clipping_rule(
    clipping: Scalar | optax.Schedule | PerLeaf, clipping_by_leaf: PerLeaf | None
) -> Scalar | optax.Schedule | PerLeaf:
    """Returns the one of the two arguments that was given.

    Raises:
      ValueError: both were given.
    """
    if clipping_by_leaf is None:
        if callable(clipping) and not _is_schedule(clipping):
            warnings.warn(
                'clipping=<function of (path, leaf)> is deprecated; pass it as clipping_by_leaf',
                DeprecationWarning,
                stacklevel=3,
            )
        return clipping
    if callable(clipping) or (isinstance(clipping, int | float) and clipping != 0.01):
        raise ValueError(
            f'clipping={clipping} and clipping_by_leaf exclude each other; give one of them'
        )
    if not callable(clipping_by_leaf) or _is_schedule(clipping_by_leaf):
        raise ValueError(
            'clipping_by_leaf must be a function (path, leaf) -> float or None, got '
            f'{clipping_by_leaf!r}'
        )
    return clipping_by_leaf


def _is_schedule(clipping: Scalar | optax.Schedule | PerLeaf) -> bool:
    """Tells `step -> float` from `(path, leaf) -> float | None` by their required arguments."""
    if not callable(clipping):
        return False
    required = [
        p
        for p in inspect.signature(clipping).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) not in (1, 2):
        raise ValueError(
            'clipping must be a float, a schedule (step) -> float or a function (path, leaf) -> '
            f'float; got a function of {len(required)} required arguments'
        )
    return len(required) == 1


def _at_step(clipping: Scalar | optax.Schedule | PerLeaf, step: Any) -> Any:
    """Returns the value of a schedule at `step`; anything else unchanged."""
    return cast(optax.Schedule, clipping)(step) if _is_schedule(clipping) else clipping


def _check_arguments(clipping: Scalar | optax.Schedule | PerLeaf, eps: Scalar) -> None:
    if not callable(clipping):
        _check_not_negative('clipping', clipping)
    _check_not_negative('eps', eps)


def _check_not_negative(name: str, value: Scalar) -> None:
    if isinstance(value, jax.core.Tracer):  # a hyperparameter under jit, unknown while tracing
        return
    is_number = isinstance(value, int | float | np.generic | np.ndarray | jax.Array)
    if not is_number or np.ndim(value) or not float(value) >= 0:  # NaN is refused too.
        raise ValueError(f'{name} must be a number >= 0, got {value}')


def _check_alike(leaves: Sequence[_Leaf], grads: Sequence[Any], weights: Sequence[Any]) -> None:
    for leaf, grad, weight in zip(leaves, grads, weights, strict=True):
        if _is_float(grad) and (_is_absent(weight) or np.shape(grad) != np.shape(weight)):
            held = 'no array' if _is_absent(weight) else f'shape {np.shape(weight)}'
            raise ValueError(
                f'{leaf.path}: the gradient has shape {np.shape(grad)} and params {held} there; '
                'pass the params with respect to which the gradient was taken'
            )


def _is_absent(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def _is_float(leaf: Any) -> bool:
    """Whether a leaf holds floating-point or complex numbers."""
    dtype = getattr(leaf, 'dtype', None)
    if dtype is None:
        return isinstance(leaf, float | complex)
    return jnp.issubdtype(dtype, jnp.inexact)
