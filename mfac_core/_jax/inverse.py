"""The inverse K = A⁻¹ of the dual, kept as a pair, and brought up to date in O(m²).

Row and column j of A = shift·I + GGᵀ are deleted by K ← K − k kᵀ/k_j, k = Keⱼ, and the new ones
inserted by their Schur complement. What K then says is refined against A itself; its residual
tells when K has drifted too far. Everything is in the pairs' own dtype, and so inside the program,
also where JAX has no float64.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from mfac_core._arrays import Array
from mfac_core._jax.pairs import add_pairs, half_precision

Pair = tuple[Array, Array]

LARGEST_RESIDUAL = 2.0**-10
"""Of what K says at first, relative to the right-hand side; each refinement gains this much."""


def replaced(inverse: Array, column: Array, j: Array, shift: Array) -> tuple[Array, Array]:
    """Return K for another row and column j of A, and its column j.

    Parameters
    ----------
    inverse : array, shape (2, m, m)
        K before, a pair.
    column : array, shape (2, m)
        The new column of GGᵀ.
    j : array, shape ()
        Its number.
    shift : array, shape (2,)
        What A has on its diagonal besides GGᵀ.
    """
    k = inverse[0, :, j], inverse[1, :, j]
    b = column[0].at[j].set(0.0), column[1].at[j].set(0.0)
    v = divide(k, _at(k, j))
    u = _subtract(matvec(inverse, b), multiply(v, _total(multiply(k, b))))
    corner = add((column[0, j], column[1, j]), (shift[0], shift[1]))
    schur = _subtract(corner, _total(multiply(b, u)))
    w = u[0].at[j].set(-1.0), u[1].at[j].set(0.0)
    z = divide(w, schur)
    deleted = _subtract((inverse[0], inverse[1]), multiply(_rows(k), v))
    return jnp.stack(add(deleted, multiply(_rows(w), z))), -jnp.stack(z)


def refined(inverse: Array, gram: Array, shift: Array, b: Array, x: Array) -> tuple[Array, Array]:
    """Take x, shape (2, m), two steps nearer to A⁻¹b, and say whether it is there."""
    largest = jnp.max(jnp.abs(b[0]))
    found = []
    for _ in range(2):
        pair = x[0], x[1]
        product = add(matvec(gram, pair), multiply((shift[0], shift[1]), pair))
        r = sum(_subtract((b[0], b[1]), product))
        found.append(jnp.max(jnp.abs(r)))
        zero = jnp.zeros_like(r)
        x = jnp.stack(add(pair, (jnp.matmul(inverse[0], r, precision="highest"), zero)))
    small = jnp.finfo(gram.dtype).eps
    return x, (found[0] <= LARGEST_RESIDUAL * largest) & (found[1] <= small * largest)


def matvec(a: Array, x: Pair) -> Pair:
    """Return A x for pairs, shapes (2, m, m) and (m,) twice."""
    return _total(multiply((a[0], a[1]), x))


def multiply(a: Pair, b: Pair) -> Pair:
    """Multiply two pairs, the high parts by Dekker's exact product."""
    product = a[0] * b[0]
    coarse_a, coarse_b = half_precision(a[0]), half_precision(b[0])
    fine_a, fine_b = a[0] - coarse_a, b[0] - coarse_b
    error = ((coarse_a * coarse_b - product) + coarse_a * fine_b + fine_a * coarse_b) + (
        fine_a * fine_b
    )
    return _settled(product, error + (a[0] * b[1] + a[1] * b[0]))


def add(a: Pair, b: Pair) -> Pair:
    """Add two pairs."""
    return _settled(*add_pairs(a, b))


def divide(a: Pair, b: Pair) -> Pair:
    """Divide a pair by another, in two steps."""
    first = a[0] / b[0]
    rest = _subtract(a, multiply(b, (first, jnp.zeros_like(first))))
    return _settled(first, (rest[0] + rest[1]) / b[0])


def _total(a: Pair) -> Pair:
    """Sum along the last axis."""
    zero = np.zeros((), a[0].dtype)
    return _settled(*lax.reduce(a, (zero, zero), add_pairs, (a[0].ndim - 1,)))


def _subtract(a: Pair, b: Pair) -> Pair:
    return add(a, (-b[0], -b[1]))


def _settled(high: Array, low: Array) -> Pair:
    """Return the same sum with its low part below the rounding of the high one.

    After a cancellation it is not, and the product of two low parts would then count.
    """
    total = high + low
    return total, low - (total - high)


def _at(a: Pair, j: Array) -> Pair:
    return a[0][j], a[1][j]


def _rows(a: Pair) -> Pair:
    return a[0][:, None], a[1][:, None]
