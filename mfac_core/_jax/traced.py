"""Products inside ``jax.jit``, ``jax.vmap``, ``jax.grad`` and ``jax.jvp``.

JAX has no float64 unless asked for, so the m-sized system is solved on the host, in a callback;
the d-sized passes stay in the traced program.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from mfac_core._arrays import Array
from mfac_core._jax.host import solve_on_host
from mfac_core._ops._blocks import GRAM_COLUMNS, column_slices


def ihvp(gradients: Array, x: Array, damping: Any) -> Array:
    """F⁻¹x for traced arguments; the Gram's products run in the dtype of the gradients."""
    jnp = sys.modules["jax"].numpy
    m, d = gradients.shape
    work = jnp.promote_types(gradients.dtype, jnp.float32)
    gram = jnp.zeros((m, m), work)
    for columns in column_slices(d, GRAM_COLUMNS):
        block = gradients[:, columns].astype(work)
        gram = gram + jnp.matmul(block, block.T, precision="highest")
    return apply(gradients, x, damping, m, _solve, gram, damping)


def apply(
    gradients: Array,
    x: Array,
    damping: Any,
    divisor: int,
    solve: Callable[..., Any],
    *operands: Any,
) -> Array:
    """(x − Gᵀ solve(Gx, *operands)) / damping, with ``solve`` called on the host.

    JAX differentiates it as the solution y of Fy = x, in whatever F and x depend on.
    """
    jax = sys.modules["jax"]
    jnp = jax.numpy
    dtype = jnp.promote_types(gradients.dtype, x.dtype)
    work = jnp.promote_types(dtype, jnp.float32)
    g = gradients.astype(work)

    def forward(y: Array) -> Array:
        projected = jnp.matmul(g, y, precision="highest")
        return damping * y + jnp.matmul(g.T, projected, precision="highest") / divisor

    def inverse(_: Any, x: Array) -> Array:
        projected = jnp.matmul(g, x, precision="highest")
        solution = jax.pure_callback(
            solve,
            jax.ShapeDtypeStruct(projected.shape, work),
            projected,
            *operands,
            vmap_method="sequential",
        )
        return (x - jnp.matmul(g.T, solution, precision="highest")) / damping

    wide = x.astype(work)
    return jax.lax.custom_linear_solve(forward, wide, inverse, symmetric=True).astype(dtype)


def _solve(b: Any, gram: Any, damping: Any) -> np.ndarray[Any, Any]:
    b = np.asarray(b)
    return solve_on_host(gram, len(gram) * float(damping), b).astype(b.dtype)
