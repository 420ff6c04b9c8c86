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
    coarse, coarse_gradients = half_precision(high), half_precision(gradients)
    fine = (high - coarse) + low
    leading = coarse[:, None] * coarse_gradients
    rest = coarse[:, None] * (gradients - coarse_gradients) + fine[:, None] * gradients
    zero = np.zeros((), high.dtype)
    total, error = lax.reduce((leading, rest), (zero, zero), add_pairs, (0,))
    return total + error


def half_precision(x: Array) -> Array:
    """Round to half the digits."""
    info = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, info.nexp, (info.nmant - 1) // 2)


def split(x: Array, dtype: Any) -> Array:
    """Return x of at least this dtype as a pair, stacked in front."""
    high = x.astype(dtype)
    return jnp.stack([high, (x - high.astype(x.dtype)).astype(dtype)])


def solve(gram: Array, shift: Array, b: Array) -> Array:
    """(shift·I + gram)⁻¹b in float64, for a pair gram (2, m, m) and pairs b and result (2, m).

    JAX has float64 only in its x64 mode; without it the host solves, in a callback.
    """
    if jax.config.jax_enable_x64:
        factor = _factor_here(gram, shift)
        y = jax.scipy.linalg.cho_solve((factor, True), jnp.sum(b.astype(jnp.float64), axis=0))
        return split(y, b.dtype)
    out = jax.ShapeDtypeStruct(b.shape, b.dtype)
    return jax.pure_callback(_solve_on_host, out, gram, shift, b, vmap_method="sequential")


def column(gram: Array, shift: Array, j: Array, wanted: Array, whole: Array) -> tuple[Array, Array]:
    """Column j of K = (shift·I + gram)⁻¹ where it is wanted, and all of K where that is.

    Pairs, (2, m) and (2, m, m); zeros for what is not wanted.
    """
    out = tuple(jax.ShapeDtypeStruct(x.shape, gram.dtype) for x in (gram[:, 0], gram))
    if not jax.config.jax_enable_x64:
        found: tuple[Array, Array] = jax.pure_callback(
            _column_on_host, out, gram, shift, j, wanted, whole, vmap_method="sequential"
        )
        return found

    def here() -> tuple[Array, Array]:
        factor = _factor_here(gram, shift)
        identity = jnp.eye(len(factor), dtype=factor.dtype)

        def inverse() -> tuple[Array, Array]:
            k = split(jax.scipy.linalg.cho_solve((factor, True), identity), gram.dtype)
            return k[:, :, j], k

        def one() -> tuple[Array, Array]:
            y = jax.scipy.linalg.cho_solve((factor, True), identity[j])
            return split(y, gram.dtype), jnp.zeros_like(gram)

        return lax.cond(whole, inverse, one)  # type: ignore[no-any-return]

    nothing = jnp.zeros_like(gram[:, 0]), jnp.zeros_like(gram)
    return lax.cond(wanted, here, lambda: nothing)  # type: ignore[no-any-return]


def _factor_here(gram: Array, shift: Array) -> Array:
    """Return the lower Cholesky factor of shift·I + gram, in float64."""
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
    return lower


def _solve_on_host(gram: Any, shift: Any, b: Any) -> np.ndarray[Any, Any]:
    gram, b = (np.asarray(parts, dtype=np.float64).sum(axis=0) for parts in (gram, b))
    return _split_on_host(solve_on_host(gram, float(shift), b))


def _column_on_host(
    gram: Any, shift: Any, j: Any, wanted: Any, whole: Any
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    gram = np.asarray(gram)
    if not wanted:
        return np.zeros_like(gram[:, 0]), np.zeros_like(gram)
    a = gram.astype(np.float64).sum(axis=0)
    if whole:
        k = _split_on_host(solve_on_host(a, float(shift), np.eye(len(a))))
        return k[:, :, int(j)].copy(), k
    unit = np.zeros(len(a))
    unit[int(j)] = 1.0
    return _split_on_host(solve_on_host(a, float(shift), unit)), np.zeros_like(gram)


def _split_on_host(y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    high = y.astype(np.float32)
    return np.stack([high, (y - high).astype(np.float32)])
