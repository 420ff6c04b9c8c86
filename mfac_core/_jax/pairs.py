"""The three acts on a window under JAX, for float32 without float64: project, solve, combine.

What is m-sized comes and goes as a *pair*, the unevaluated sum of a high and a low part stacked in
front, which holds twice the digits of its dtype. The d-sized vectors have the dtype of the pairs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mfac_core._arrays import Array
from mfac_core._dual import LARGEST_LIFTS
from mfac_core._jax.host import solve_on_host
from mfac_core._ops._blocks import GRAM_COLUMNS

SUMMED_COLUMNS = 256
"""Products summed in their own precision; the sums of so many are added as pairs."""

LARGEST_CANCELLATION = 1024.0
"""Terms of Gᵀc relative to their sum above which they are added as pairs, too."""


def project(gradients: Array, x: Array) -> Array:
    """G x as a pair, shape (2, m), for x of shape (d,)."""
    products = gradients.astype(x.dtype) * x
    zero = np.zeros((), x.dtype)
    # A sliding reduction is the one that XLA fuses with the products for any d.
    size, padding = (1, SUMMED_COLUMNS), ((0, 0), (0, -x.shape[0] % SUMMED_COLUMNS))
    sums = lax.reduce_window(products, zero, lax.add, size, size, padding)
    return jnp.stack(lax.reduce((sums, jnp.zeros_like(sums)), (zero, zero), add_pairs, (1,)))


def cross(g: Array, h: Array) -> Array:
    """G Hᵀ as a pair, shape (2, m, k), for g (m, d) and h (k, d); products in at least float32."""
    dtype = jnp.promote_types(g.dtype, jnp.float32)

    def product(start: Any, width: int) -> Array:
        blocks = (lax.dynamic_slice_in_dim(x, start, width, 1).astype(dtype) for x in (g, h))
        return lax.dot_general(
            *blocks, (((1,), (1,)), ((), ())), precision="highest", preferred_element_type=dtype
        )

    d = g.shape[1]
    rest = d % GRAM_COLUMNS
    first = product(d - rest, rest)
    zero = jnp.zeros_like(first)
    if d < GRAM_COLUMNS:
        return jnp.stack([first, zero])

    def add(i: Any, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        return add_pairs(pair, (product(i * GRAM_COLUMNS, GRAM_COLUMNS), zero))

    return jnp.stack(lax.fori_loop(0, d // GRAM_COLUMNS, add, (first, zero)))


def add_pairs(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Add two pairs, the high parts by Knuth's exact addition."""
    total = a[0] + b[0]
    part = total - a[0]
    error = (a[0] - (total - part)) + (b[0] - part)
    return total, a[1] + b[1] + error


def combine(gradients: Array, gram: Array, c: Array) -> Array:
    """Gᵀc, shape (d,), for c a pair, shape (2, m)."""
    high, low = c
    y = jnp.sum(high[:, None] * gradients.astype(c.dtype), axis=0)
    terms = jnp.sum(jnp.square(high) * jnp.diagonal(gram[0]))
    cancels = terms > LARGEST_CANCELLATION**2 * jnp.sum(jnp.square(y))
    return lax.cond(cancels, lambda: _combine_exactly(gradients, high, low), lambda: y)


def _combine_exactly(gradients: Array, high: Array, low: Array) -> Array:
    """Gᵀ(high + low), its terms to twice their precision."""
    gradients = gradients.astype(high.dtype)
    # Numbers of half the digits have exact products; all else is smaller by those digits.
    coarse, coarse_gradients = _half_precision(high), _half_precision(gradients)
    fine = (high - coarse) + low
    leading = coarse[:, None] * coarse_gradients
    rest = coarse[:, None] * (gradients - coarse_gradients) + fine[:, None] * gradients
    zero = np.zeros((), high.dtype)
    total, error = lax.reduce((leading, rest), (zero, zero), add_pairs, (0,))
    return total + error


def _half_precision(x: Array) -> Array:
    """Round to half the digits."""
    info = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, info.nexp, (info.nmant - 1) // 2)


def solve(gram: Array, shift: Array, b: Array) -> Array:
    """(shift·I + gram)⁻¹b in float64, for a pair gram (2, m, m) and pairs b and result (2, m).

    JAX has float64 only in its x64 mode; without it the host solves, in a callback.
    """
    if jax.config.jax_enable_x64:
        return _solve_here(gram, shift, b)
    out = jax.ShapeDtypeStruct(b.shape, b.dtype)
    return jax.pure_callback(_solve_on_host, out, gram, shift, b, vmap_method="sequential")


def _solve_here(gram: Array, shift: Array, b: Array) -> Array:
    a = jnp.sum(gram.astype(jnp.float64), axis=0)
    identity = jnp.eye(len(a), dtype=jnp.float64)

    def factor(lift: Array) -> Array:
        return jnp.linalg.cholesky(a + (shift + lift) * identity)

    # A shift below the rounding of the Gram may leave A indefinite, as in Dual.factor.
    lifts = len(a) * 2.0**-52 * jnp.max(jnp.diagonal(a)) * 8.0 ** jnp.arange(LARGEST_LIFTS)
    _, lower = lax.while_loop(
        lambda tried: (tried[0] < LARGEST_LIFTS) & jnp.isnan(tried[1][-1, -1]),
        lambda tried: (tried[0] + 1, factor(lifts[tried[0]])),
        (0, factor(jnp.zeros(()))),
    )
    y = jax.scipy.linalg.cho_solve((lower, True), jnp.sum(b.astype(jnp.float64), axis=0))
    high = y.astype(b.dtype)
    return jnp.stack([high, (y - high).astype(b.dtype)])


def _solve_on_host(gram: Any, shift: Any, b: Any) -> np.ndarray[Any, Any]:
    gram, b = (np.asarray(parts, dtype=np.float64).sum(axis=0) for parts in (gram, b))
    y = solve_on_host(gram, float(shift), b)
    high = y.astype(np.float32)
    return np.stack([high, (y - high).astype(np.float32)])
