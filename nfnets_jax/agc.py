"""Adaptive gradient clipping: unit by unit, by the ratio of gradient norm to parameter norm.

Needs jax and optax only. Source: Brock et al., "High-Performance Large-Scale Image Recognition
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
import math
import os.path
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

import nfnets_jax.unit_axes as unit_axes

__all__ = ['AdaptiveGradClipState', 'adaptive_grad_clip', 'describe_clipping', 'unit_axes']

PyTree = Any
Scalar = float | jax.Array
PerLeaf = Callable[[str, jax.ShapeDtypeStruct], float | None]


class AdaptiveGradClipState(NamedTuple):
    """What the last update did.

    Attributes:
      clipped_fraction: f32 scalar, the share of all units whose gradient was scaled down (a unit
        that holds a NaN counts). 0 before the first update.
      clipped_fraction_by_group: the same by top-level group. A leaf's group is its path's first
        part that is not shared by all leaves, `~` apart: `nf_block_3` for the Haiku parameter
        `NFNet/~/nf_block_3/~/conv0/w`, `Conv_0` for Flax's `params/Conv_0/kernel`.
      step: int32 scalar, the number of updates, if `clipping` is a schedule; else None.
    """

    clipped_fraction: jax.Array
    clipped_fraction_by_group: dict[str, jax.Array]
    step: jax.Array | None


class _Leaf(NamedTuple):
    """A leaf of the parameters and how it is clipped."""

    path: str
    group: str
    shape: tuple[int, ...]  # of the whole leaf, also where a device holds a part
    clipping: Any  # a number, Python's or JAX's; None: not clipped
    axes: tuple[int, ...] = ()
    sum_over: tuple[str, ...] = ()  # the mesh axes that split `axes`
    split_by: tuple[str, ...] = ()  # the mesh axes that split the other axes, so the units

    @property
    def units(self) -> int:
        return math.prod(n for i, n in enumerate(self.shape) if i not in self.axes)


def adaptive_grad_clip(
    clipping: Scalar | optax.Schedule | PerLeaf = 0.01,
    eps: Scalar = 1e-3,
    axis: unit_axes.Axes | unit_axes.Rule = None,
    *,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    specs: PyTree | None = None,
) -> optax.GradientTransformation:
    """Scales each unit's gradient G down to norm `clipping * max(||W||, eps)`, if it is longer.

    A drop-in for `optax.adaptive_grad_clip`: the same first three arguments and the same numbers.
    Put it before weight decay, momentum and the learning rate; the paper leaves the last linear
    layer's weight out (`mask`, or a `clipping` function that returns None for it).

    Norms are computed in float32 (float64 for float64 leaves) whatever the leaves' dtype, and
    neither overflow nor underflow; the output has the gradient's dtype. Units within the bound pass
    bit for bit. What is no inexact array (None, `optax.MaskedNode`, integers, float0) passes as it
    is. A NaN spreads over its own unit and no further, so `optax.apply_if_finite` sees it.

    Args:
      clipping: lambda, the largest allowed ratio ||G|| / max(||W||, eps). A float; or a schedule
        `step -> float`; or a function `(path, leaf) -> float`, or None for a leaf that is not to be
        clipped, with `path` and `leaf` as in `nfnets_jax.unit_axes`. The paper: 0.01 for batches of
        4096, more (to 0.16) for smaller ones.
      eps: the norm that parameters are taken to have at least, so that those that start at zero can
        leave it.
      axis: the axes to take the norm over, so all but the output's: None for the rule of
        optax (`unit_axes.by_rank`), ints for every leaf, or a function `(path, leaf) -> axes`,
        see `nfnets_jax.unit_axes` for one that fits your layout.
      mask: a tree of bools like the parameters or a prefix of it, or a function from the parameters
        to that, True where to clip; as in `optax.add_decayed_weights`.
      specs: only for `jax.shard_map` over sharded parameters (under plain `jax.jit` sharded
        arrays need nothing): a tree of `jax.sharding.PartitionSpec` like the parameters or a prefix
        of it, the `in_specs` of the parameters. Norms are then of whole units.

    Returns:
      An `optax.GradientTransformation` with an `AdaptiveGradClipState`. `update` needs `params`.

    Raises:
      ValueError: `clipping` or `eps` is a negative number; at `init`: it is for a leaf, axes are
        out of range, a `mask` or `clipping` selects no leaf, `specs` names a mesh axis that
        the mesh lacks; at `update`: `params` are missing or not like the gradients. What concerns a
        leaf names it by its path.
    """
    scheduled = _is_schedule(clipping)
    _check_arguments(clipping, eps)

    def init(params: PyTree) -> AdaptiveGradClipState:
        leaves = _plan(params, _at_step(clipping, 0), axis, mask, specs)
        # Each zero is a buffer of its own, for states that are donated.
        return AdaptiveGradClipState(
            clipped_fraction=jnp.zeros((), jnp.float32),
            clipped_fraction_by_group={
                leaf.group: jnp.zeros((), jnp.float32)
                for leaf in leaves
                if leaf.clipping is not None
            },
            step=jnp.zeros((), jnp.int32) if scheduled else None,
        )

    def update(
        updates: PyTree, state: AdaptiveGradClipState, params: PyTree | None = None
    ) -> tuple[PyTree, AdaptiveGradClipState]:
        if params is None:
            raise ValueError('adaptive_grad_clip needs params: tx.update(grads, state, params)')
        step = state.step if scheduled else None
        leaves = _plan(params, _at_step(clipping, step), axis, mask, specs)
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

        groups = [leaf.group for leaf in leaves if leaf.clipping is not None]
        fraction, by_group = _fractions(groups, [leaves[i] for i in chosen], over)
        step = None if step is None else optax.safe_increment(step)
        return treedef.unflatten(grads), AdaptiveGradClipState(fraction, by_group, step)

    return optax.GradientTransformation(init, update)


def describe_clipping(
    params: PyTree,
    clipping: Scalar | optax.Schedule | PerLeaf = 0.01,
    eps: Scalar = 1e-3,
    axis: unit_axes.Axes | unit_axes.Rule = None,
    *,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> None:
    """Prints how `adaptive_grad_clip` with these arguments treats each leaf of `params`.

    `params` may hold arrays or `jax.ShapeDtypeStruct`s, as `jax.eval_shape` gives them.

    >>> import jax.numpy as jnp
    >>> conv = {'w': jnp.ones((3, 3, 8, 16)), 'b': jnp.ones(16)}
    >>> params = {'conv': conv, 'head': jnp.ones((16, 10))}
    >>> describe_clipping(params, mask={'conv': True, 'head': False})
    leaf    shape          norm over  units  clipping  group
    conv/b  (16,)          (0,)           1      0.01  conv
    conv/w  (3, 3, 8, 16)  (0, 1, 2)     16      0.01  conv
    head    (16, 10)       -              -         -  head
    17 units in 2 of 3 leaves: gradient norm <= clipping * max(parameter norm, 0.001)
    """
    _check_arguments(clipping, eps)
    leaves = _plan(params, _at_step(clipping, 0), axis, mask, None)
    rows = [('leaf', 'shape', 'norm over', 'units', 'clipping', 'group')]
    for leaf in leaves:
        if leaf.clipping is None:
            how = ('-', '-', '-')
        else:
            how = (str(leaf.axes), str(leaf.units), f'{float(leaf.clipping):g}')
        rows.append((leaf.path, str(leaf.shape), *how, leaf.group))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, '<<<>><', strict=True)
        print('  '.join(f'{cell:{side}{width}}' for cell, width, side in cells).rstrip())
    clipped = [leaf for leaf in leaves if leaf.clipping is not None]
    units = sum(leaf.units for leaf in clipped)
    when = ', clipping as at step 0' if _is_schedule(clipping) else ''
    print(
        f'{units} units in {len(clipped)} of {len(leaves)} leaves: '
        f'gradient norm <= clipping * max(parameter norm, {eps:g}){when}'
    )


def _clip(
    leaves: Sequence[_Leaf],
    grads: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    eps: Scalar,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns the clipped gradients, and for each leaf which of its units were over the bound."""
    norms = _unit_norms(
        [*grads, *weights],
        tuple(leaf.axes for leaf in leaves) * 2,
        # Which norms are as good as zero: a gradient's that no bound is below, a parameter's
        # below eps.
        [leaf.clipping * eps for leaf in leaves] + [eps for _ in leaves],
    )
    norms = [
        _over_mesh(n, leaf.sum_over) for n, leaf in zip(norms, [*leaves, *leaves], strict=True)
    ]
    clipped, over = [], []
    for leaf, grad, grad_norm, norm in zip(
        leaves, grads, norms[: len(leaves)], norms[len(leaves) :], strict=True
    ):
        bound = leaf.clipping * jnp.maximum(norm, eps)
        within = grad_norm <= bound
        # Two factors, as their product underflows for large gradients. Both are 1 within the bound.
        unit_length = jnp.where(within, 1, 1 / grad_norm)
        length = jnp.where(within, 1, bound)
        clipped.append((grad * unit_length * length).astype(grad.dtype))
        over.append(~within)
    return clipped, over


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _unit_norms(
    arrays: Sequence[jax.Array], axes: tuple[tuple[int, ...], ...], floors: Sequence[Scalar]
) -> list[jax.Array]:
    """L2 norms over `axes`, which are kept with length 1; exact to rounding at any scale.

    One pass over the arrays in the common case. Only if somewhere the sum of squares left the range
    of its dtype, a second pass takes all norms again from scaled numbers; they replace those that
    went wrong and no others. A sum that is too small is let be where all norms below that array's
    floor mean the same, so that at the default eps units that are all zero cost nothing.
    """
    if not arrays:
        return []
    sums = [_sum_of_squares(x, a, 1) for x, a in zip(arrays, axes, strict=True)]

    def second_pass() -> list[jax.Array]:
        again = []
        for x, a, total, floor in zip(arrays, axes, sums, floors, strict=True):
            scale = _rescaling(total, floor)
            # XLA turns (x * scale) * (x * scale) into (x * x) * (scale * scale) where it finds
            # one of them constant.
            x, factor = jax.lax.optimization_barrier((x, scale))
            again.append(jnp.where(scale == 1, total, _sum_of_squares(x, a, factor)))
        return again

    scales = [_rescaling(total, floor) for total, floor in zip(sums, floors, strict=True)]
    any_lost = functools.reduce(jnp.logical_or, [jnp.any(s != 1) for s in _joined(scales)])
    sums = jax.lax.cond(any_lost, second_pass, lambda: sums)
    return [_sqrt(total) / scale for total, scale in zip(sums, scales, strict=True)]


def _rescaling(total: jax.Array, floor: Scalar) -> jax.Array:
    """The factor at which numbers with this sum of squares have one to trust; 1 if they have."""
    # Powers of 2 that bring the squares to the middle of the range: 2**-80 and 2**80 in float32.
    power = 2.0 ** (jnp.finfo(total.dtype).maxexp * 5 // 8)
    # What underflowed on the way to a sum above this is a rounding error of it.
    smallest = float(jnp.finfo(total.dtype).tiny) * 2.0**56
    up = jnp.where((total < smallest) & (floor < smallest**0.5), power, 1)
    return jnp.where(jnp.isinf(total), 1 / power, up).astype(total.dtype)


def _sum_of_squares(x: jax.Array, axes: tuple[int, ...], scale: jax.typing.ArrayLike) -> jax.Array:
    if jnp.iscomplexobj(x):
        return _sum_of_squares(x.real, axes, scale) + _sum_of_squares(x.imag, axes, scale)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32)) * scale
    return jnp.sum(x * x, axis=axes, keepdims=True)


def _over_mesh(norm: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """The norm of units of which each device along the mesh axes `names` holds a part."""
    if not names:
        return norm
    largest = jax.lax.pmax(jax.lax.stop_gradient(norm), names)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return scale * _sqrt(jax.lax.psum((norm / scale) ** 2, names))


def _sqrt(x: jax.Array) -> jax.Array:
    """The square root, with gradient 0 at 0."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))


def _fractions(
    groups: Sequence[str], leaves: Sequence[_Leaf], over: Sequence[jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the share of units that are over the bound, of all and by group."""
    units = dict.fromkeys(groups, 0)
    alike: dict[tuple[str, tuple[str, ...]], list[jax.Array]] = {}
    for leaf, leaf_over in zip(leaves, over, strict=True):
        units[leaf.group] += leaf.units
        alike.setdefault((leaf.group, leaf.split_by), []).append(leaf_over)
    counts = {group: jnp.zeros((), jnp.float32) for group in units}
    for (group, names), flags in alike.items():
        for joined in _joined(flags):
            count = jnp.sum(joined, dtype=jnp.float32)
            counts[group] += jax.lax.psum(count, names) if names else count
    by_group = {group: count / max(units[group], 1) for group, count in counts.items()}
    total = sum(counts.values(), jnp.zeros((), jnp.float32)) / max(sum(units.values()), 1)
    return total, by_group


def _joined(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns the arrays' elements in one vector per sharding: few operations on many arrays."""
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
    """Returns how each leaf of `params` is clipped, None and MaskedNode counted as leaves."""
    entries = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_absent)[0]
    paths = [jax.tree_util.keystr(path, simple=True, separator='/') or '.' for path, _ in entries]
    # A mask that is itself a tree may be callable too: an Equinox module.
    if callable(mask) and jax.tree_util.all_leaves([mask]):
        mask = mask(params)
    masks = _broadcast(True if mask is None else mask, params)
    leaf_specs = _broadcast(PartitionSpec() if specs is None else specs, params)

    leaves = []
    for path, group, (_, value), selected, spec in zip(
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
        for path, (_, value) in zip(paths, entries, strict=True)
        if _is_float(value) and np.size(value)
    ]
    if floats and all(leaf.clipping is None for leaf in leaves):
        raise ValueError(
            f'mask and clipping select none of the {len(floats)} leaves (the first is '
            f'{floats[0]!r}); select one or leave adaptive_grad_clip out'
        )
    return leaves


def _broadcast(prefix: PyTree, tree: PyTree) -> list[Any]:
    """Returns the leaves of `prefix` repeated for each leaf of `tree`, absent ones counted."""
    full = jax.tree.map(
        lambda leaf, subtree: jax.tree.map(lambda _: leaf, subtree, is_leaf=_is_absent),
        prefix,
        tree,
    )
    return jax.tree.leaves(full, is_leaf=_is_absent)


def _groups(paths: Sequence[str]) -> list[str]:
    """Returns for each path the first part that is not shared by all of them, `~` apart."""
    parts = [[part for part in path.split('/') if part != '~'] for path in paths]
    shared = len(os.path.commonprefix(parts))
    return [part[min(shared, len(part) - 1)] for part in parts]


def _mesh_axes(path: str, spec: PartitionSpec | None, ndim: int) -> list[tuple[str, ...]]:
    """Returns for each axis of a leaf the mesh axes that split it between devices here.

    A mesh axis that is not manual here (outside `shard_map`, or automatic inside) splits nothing:
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
    """Returns a schedule's value at `step`; what is no schedule as it is."""
    return cast(optax.Schedule, clipping)(step) if _is_schedule(clipping) else clipping


def _check_arguments(clipping: Scalar | optax.Schedule | PerLeaf, eps: Scalar) -> None:
    if not callable(clipping):
        _check_not_negative('clipping', clipping)
    _check_not_negative('eps', eps)


def _check_not_negative(name: str, value: Scalar) -> None:
    if isinstance(value, jax.core.Tracer):  # Not known yet: a hyperparameter under jit.
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
                'pass the params that the gradient was taken of'
            )


def _is_absent(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def _is_float(leaf: Any) -> bool:
    """Whether a leaf holds floating-point or complex numbers."""
    dtype = getattr(leaf, 'dtype', None)
    if dtype is None:
        return isinstance(leaf, float | complex)
    return jnp.issubdtype(dtype, jnp.inexact)
