"""Split and concatenate with identical operations, which XLA compiles once.

Ordinary slices of an array differ in their start, and XLA compiles each of them again, with
everything it fuses into it. The slices of this module read their start from memory. The gradient of
a deep network whose identical blocks run in a loop has a thousand slices, and nothing else in it
grows with depth.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def _split(x: Array, sizes: Sequence[int], axis: int) -> list[Array]:
    """Returns consecutive slices of these sizes along an axis."""
    starts = itertools.accumulate(sizes, initial=0)
    return [
        jax.lax.dynamic_slice_in_dim(x, _as_data(start, x.shape[axis]), size, axis)
        for start, size in zip(starts, sizes, strict=False)
    ]


split = jax.custom_vjp(_split, nondiff_argnums=(1, 2))
split.defvjp(
    lambda x, sizes, axis: (_split(x, sizes, axis), None),
    lambda sizes, axis, _, cotangents: (jnp.concatenate(cotangents, axis),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def join(parts: Sequence[Array], axis: int) -> Array:
    """Concatenates along an axis; the gradient uses `split`."""
    return jnp.concatenate(parts, axis)


join.defvjp(
    lambda parts, axis: (jnp.concatenate(parts, axis), [np.shape(part)[axis] for part in parts]),
    lambda axis, sizes, cotangent: (_split(cotangent, sizes, axis),),
)


def _as_data(start: int, length: int) -> Array:
    """Returns `start` in a form that XLA cannot fold into the operation that uses it.

    XLA folds a constant. It cannot fold an element of a longer array behind a barrier. `length`
    ensures that the elements are neither equal nor 0, 1, 2...
    """
    return jax.lax.optimization_barrier(np.array([length, start], np.uint32))[1]
