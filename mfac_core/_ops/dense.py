"""Factorisations and updates of the m-sized float64 matrices, in their home.

SciPy is called with NumPy arrays only: it would silently turn others into NumPy. It brings a BLAS
of its own, whose threads go on spinning for a while after a call and take the cores from NumPy's:
so what is threaded goes through NumPy, as the passes over the gradients do.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import scipy
from array_api_compat import is_cupy_namespace, is_torch_namespace

from mfac_core._arrays import Array, Home

UPDATE_ROWS = 64
"""Rows of a rank-two update at a time: the product they are added to stays in cache."""


def cholesky(home: Home, a: Array) -> Array | None:
    """Return the lower triangular L of a = L Lᵀ, or None where a is not positive definite."""
    xp = home.xp
    if is_torch_namespace(xp):
        factor, info = sys.modules["torch"].linalg.cholesky_ex(a)
        return None if int(info) else factor
    try:
        factor = xp.linalg.cholesky(a)
    except Exception as error:  # each library has its own LinAlgError
        if "LinAlgError" in type(error).__name__:
            return None
        raise
    # CuPy marks a failure by NaN instead of raising, NumPy does not look at NaN.
    return factor if bool(xp.all(xp.isfinite(factor))) else None


def solve_lower(home: Home, factor: Array, b: Array) -> Array:
    """Return L⁻¹b for a lower triangular L."""
    return _solve_triangular(home, factor, b, lower=True)


def cholesky_solve(home: Home, factor: Array, b: Array) -> Array:
    """Return (L Lᵀ)⁻¹b, for b of shape (m,) or (m, k)."""
    if home.is_numpy:
        return scipy.linalg.cho_solve((factor, True), b, check_finite=False)
    half = _solve_triangular(home, factor, b, lower=True)
    return _solve_triangular(home, factor.T, half, lower=False)


def inverse(home: Home, a: Array) -> Array:
    """Return the inverse of a symmetric positive definite matrix, symmetric to the last bit."""
    full = home.xp.linalg.inv(a)
    return (full + full.T) / 2


def add_rank_two(home: Home, a: Array, p: Array, signs: tuple[float, float]) -> Array:
    """Add p diag(signs) pᵀ to a, in place, for p of shape (m, 2) and signs ±1; return a."""
    scaled = p * home.receive(np.asarray(signs))
    if not home.is_numpy:
        a += scaled @ p.T
        return a
    transposed = np.ascontiguousarray(p.T)
    for start in range(0, len(a), UPDATE_ROWS):
        a[start : start + UPDATE_ROWS] += scaled[start : start + UPDATE_ROWS] @ transposed
    return a


def _solve_triangular(home: Home, a: Array, b: Array, *, lower: bool) -> Array:
    xp: Any = home.xp
    if home.is_numpy:
        return scipy.linalg.solve_triangular(a, b, lower=lower, check_finite=False)
    if is_cupy_namespace(xp):
        import cupyx.scipy.linalg

        return cupyx.scipy.linalg.solve_triangular(a, b, lower=lower, check_finite=False)
    if is_torch_namespace(xp):
        columns = b if b.ndim == 2 else b[:, None]
        solution = sys.modules["torch"].linalg.solve_triangular(a, columns, upper=not lower)
        return solution if b.ndim == 2 else solution[:, 0]
    return xp.linalg.solve(a, b)
