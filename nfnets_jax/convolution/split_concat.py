"""Splitting and joining arrays by operations that are equal, for XLA compiles equal ones once.

Slices of one array differ in where they begin, and each is compiled anew together with what XLA
fuses to it. Those of this module read it from memory. A deep network whose equal blocks are a loop
has a thousand slices in its gradient, and nothing else that grows with its depth.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def _split(x: Array, sizes: Sequence[int], axis: int) -> list[Array]:
    """Returns slices of these sizes, one after another along an axis."""
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
    """Concatenates along an axis; the gradient is split by `split`."""
    return jnp.concatenate(parts, axis)


join.defvjp(
    lambda parts, axis: (jnp.concatenate(parts, axis), [np.shape(part)[axis] for part in parts]),
    lambda axis, sizes, cotangent: (_split(cotangent, sizes, axis),),
)


def _as_data(start: int, length: int) -> Array:
    """Returns `start` as XLA can not make it a part of the operation that uses it.

    As a number it would. It does not know the number if it is read from an array of several behind
    a barrier; `length` makes sure that they are neither equal nor 0, 1, 2...
    """
    return jax.lax.optimization_barrier(np.array([length, start], np.uint32))[1]
