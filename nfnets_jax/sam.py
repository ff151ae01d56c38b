"""Sharpness-aware minimisation: the gradient at the worst point nearby.

Needs jax only. Sources: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving
Generalization", https://arxiv.org/abs/2010.01412, equation 2 and algorithm 1; the ascent on a part
of each device's batch: Brock et al., https://arxiv.org/abs/2102.06171; the adaptive form: Kwon et
al., "ASAM", https://arxiv.org/abs/2102.11600.

>>> import jax.numpy as jnp
>>> from nfnets_jax import sam_value_and_grad
>>> def loss(w, batch):
...     return jnp.mean((batch @ w) ** 2)
>>> w, batch = jnp.array([1.0, 0.0]), jnp.eye(2)
>>> value, grad = sam_value_and_grad(loss, rho=0.5)(w, batch)  # at w + 0.5 * (1, 0)
>>> print(value, grad)
1.125 [1.5 0. ]
"""

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
Scalar = float | jax.Array

# Lets the adaptive ascent move weights that are zero; the value of the ASAM paper.
_ASAM_ETA = 0.01


def sam_value_and_grad(
    loss_fn: Callable[..., Any],
    rho: Scalar | Callable[[Any], Scalar] = 0.05,
    *,
    ascent_fraction: float = 1.0,
    axis_name: Hashable | None = None,
    has_aux: bool = False,
    both_aux: bool = False,
    adaptive: bool = False,
    value_and_grad: Callable[..., Callable[..., Any]] = jax.value_and_grad,
) -> Callable[..., Any]:
    """Returns `jax.value_and_grad` at params + rho * g / ||g||, where g is the gradient at params.

    Both passes get the same arguments, including a dropout key in `args`. The first pass, the
    ascent, sees only the first examples of `batch`. The caller applies everything else (the mean
    over devices, clipping, weight decay) to the returned gradient, as without SAM.

    A zero gradient leaves the parameters unchanged. rho = 0 gives the plain gradient bit for bit.
    The norm is computed in float32 (float64 for float64) and neither overflows nor underflows. A
    loss scale cancels out of the ascent. An ascent gradient that is not finite makes the result not
    finite, so that `optax.apply_if_finite` or dynamic loss scaling skips it.

    Args:
      loss_fn: `loss_fn(params, batch, *args, **kwargs)`, a real scalar; with `has_aux` a pair
        `(loss, aux)`.
      rho: the ascent distance. A number >= 0, traced or not, or a schedule `step -> rho`. With a
        schedule the returned function takes a keyword `step`, which it does not pass to `loss_fn`.
        The papers use 0.05.
      ascent_fraction: in (0, 1]; the ascent sees the first `ceil(ascent_fraction * n)` of the n
        entries of every leaf of `batch` along its leading axis. 0.2 costs about 1.2 plain gradients
        where 1 costs 2.
      axis_name: the mapped axis over which the ascent gradient is averaged. With None every device
        ascends on its own examples, as in both papers ("m-sharpness", where m is the number of
        examples per device). The result then depends on how many devices share a batch.
      has_aux: whether `loss_fn` returns an auxiliary output.
      both_aux: whether to return the auxiliary output of both passes.
      adaptive: use ASAM, whose distance is relative to the size of each weight and therefore
        invariant to rescaling of the network. It needs a larger rho: its paper uses 0.5 to 2.
      value_and_grad: called once as `jax.value_and_grad(loss_fn, has_aux=has_aux)`; both passes use
        the result. An implementation that accumulates over microbatches finishes the ascent over
        all of them before the descent begins. SAM inside each microbatch would be another method.

    Returns:
      A function `(params, batch, *args, **kwargs) -> (value, grad)`, or `((value, aux), grad)`.
      `grad` is the gradient of `value`, the loss of the whole batch at the perturbed parameters.
      `aux` comes from the first pass, at `params` and on the examples of the ascent, so its
      batch-norm statistics belong to the weights that are kept. With `both_aux` it is the pair
      `(first, final)`; take metrics of the whole batch from `final`.

    Raises:
      ValueError: `ascent_fraction` is outside (0, 1]; `rho` is negative; `both_aux` without
        `has_aux`; at the call: `step` is missing for a schedule, or a leaf of `batch`, named by its
        path, has no leading axis while `ascent_fraction` < 1.
    """
    if not 0 < ascent_fraction <= 1:
        raise ValueError(f'ascent_fraction must be in (0, 1], got {ascent_fraction}')
    if not callable(rho) and not isinstance(rho, jax.core.Tracer) and not rho >= 0:
        raise ValueError(f'rho must be >= 0, got {rho}')
    if both_aux and not has_aux:
        raise ValueError('both_aux=True needs has_aux=True and a loss_fn that returns (loss, aux)')
    differentiate = value_and_grad(loss_fn, has_aux=has_aux)

    @functools.wraps(differentiate)
    def sam(params: PyTree, batch: PyTree, *args: Any, **kwargs: Any) -> Any:
        if not callable(rho):
            radius = rho
        elif 'step' in kwargs:
            radius = rho(kwargs.pop('step'))
        else:
            raise ValueError('rho is a schedule: pass the step too, as the keyword step=...')
        first, ascent = differentiate(params, _head(batch, ascent_fraction), *args, **kwargs)
        if axis_name is not None:
            ascent = jax.lax.pmean(ascent, axis_name)
        final, grad = differentiate(
            _climb(params, ascent, radius, adaptive), batch, *args, **kwargs
        )
        if not has_aux:
            return final, grad
        aux = (first[1], final[1]) if both_aux else first[1]
        return (final[0], aux), grad

    return sam


def _head(batch: PyTree, fraction: float) -> PyTree:
    """Returns the first `fraction` of every leaf along its leading axis, rounded up."""
    if fraction == 1:
        return batch

    def head(path: Any, leaf: Any) -> Any:
        if not jnp.shape(leaf):
            name = jax.tree_util.keystr(path, simple=True, separator='/') or '.'
            raise ValueError(
                f'{name}: ascent_fraction < 1 takes the first examples of every leaf of batch, and '
                'this one has no leading axis; pass it after batch, in args'
            )
        # 0.07 * 100 is slightly more than 7 in floating point; rounding restores 7.
        return leaf[: max(1, math.ceil(round(fraction * jnp.shape(leaf)[0], 6)))]

    return jax.tree_util.tree_map_with_path(head, batch)


def _climb(params: PyTree, grads: PyTree, rho: Scalar, adaptive: bool) -> PyTree:
    """Returns the parameters moved by rho along the gradient."""
    ascent = jax.tree.map(_wide, grads)
    if adaptive:  # T g of the ASAM paper, with T = |w| + eta; the step is T (T g) / ||T g||.
        sizes = jax.tree.map(lambda w: jnp.abs(_wide(w)) + _ASAM_ETA, params)
        ascent = jax.tree.map(jnp.multiply, sizes, ascent)

    # Divide by the largest element, so that squares cannot overflow or all underflow.
    peaks = [jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(ascent)]
    largest = jnp.max(jnp.asarray(peaks), initial=0)
    scale = jnp.where(largest == 0, 1, largest)
    ascent = jax.tree.map(lambda leaf: leaf / scale, ascent)
    square = sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(ascent))
    step = jnp.where(square == 0, 0, rho / jnp.sqrt(jnp.where(square == 0, 1, square)))

    if adaptive:
        ascent = jax.tree.map(jnp.multiply, sizes, ascent)

    def move(w: Any, direction: jax.Array) -> Any:
        # JAX's gradient of a complex parameter is the conjugate of the ascent direction.
        moved = (_wide(w) + step * jnp.conj(direction)).astype(jnp.result_type(w))
        return jnp.where(step == 0, w, moved)  # Not w + 0, which turns -0 into 0.

    return jax.tree.map(move, params, ascent)


def _wide(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
