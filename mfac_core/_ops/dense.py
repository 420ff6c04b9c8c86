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

from mfac_core._arrays import Array, Home, is_numpy_array
from mfac_core._ops import _block_host
from mfac_core._ops.cuda import passes as cuda_passes
from mfac_core._ops.cuda import queries as cuda_queries

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


def inverse_lower(home: Home, factor: Array) -> Array:
    """Return L⁻¹ of a lower triangle; in NumPy from products."""
    if home.is_numpy:
        return _block_host.inverse_triangles(factor[None])[0]
    return solve_lower(home, factor, home.eye(int(factor.shape[0])))


def cholesky_solve(home: Home, factor: Array, b: Array) -> Array:
    """Return (L Lᵀ)⁻¹b, for b of shape (m,) or (m, k)."""
    if home.is_numpy:
        # As Lᵀ, which LAPACK's order of columns reads in place: of L it would take a copy.
        return scipy.linalg.cho_solve((factor.T, False), b, check_finite=False)
    half = _solve_triangular(home, factor, b, lower=True)
    return _solve_triangular(home, factor.T, half, lower=False)


def inverse(home: Home, a: Array) -> Array:
    """Return the inverse of a symmetric positive definite matrix, symmetric to the last bit."""
    full = home.xp.linalg.inv(a)
    full = (full + full.T) / 2
    return full if cuda_passes.is_contiguous(full) else full.T  # the same, as the kernels read it


def add_rank_two(home: Home, a: Array, p: Array, signs: tuple[float, float]) -> Array:
    """Add p diag(signs) pᵀ to a, in place, for p of shape (m, 2) and signs ±1; return a."""
    scaled = p * home.receive(np.asarray(signs))
    if is_torch_namespace(home.xp):
        return a.addmm_(scaled, p.T)
    if not home.is_numpy:
        a += scaled @ p.T
        return a
    transposed = np.ascontiguousarray(p.T)
    for start in range(0, len(a), UPDATE_ROWS):
        a[start : start + UPDATE_ROWS] += scaled[start : start + UPDATE_ROWS] @ transposed
    return a


def replace(inverse: Array, gram: Array, i: int, row: Array, shift: float) -> Array | None:
    """Exchange row and column i of the Gram, and of (shift·I + Gram)⁻¹, in place, on a device.

    Returns an int32 array there: [0], or [1] where rounding forbade it and the inverse stayed.
    Where no kernel takes these matrices nothing is done, and None returned.
    """
    if is_numpy_array(inverse) or not cuda_passes.serves(inverse, gram, row):
        return None
    return cuda_passes.replace(inverse, gram, i, row, shift)


def clamped_diagonal(
    home: Home, whitened: Array, columns: Array, damping: float, divisor: float
) -> tuple[Array, Array]:
    """Return (1 − Σ W²)/λ, held to [1/Fᵢᵢ, 1/λ], and 1 − Σ W², for W = L⁻¹G, column by column.

    F_ii is λ + Σ G²/divisor.
    """
    if cuda_queries.serves_diagonal(whitened, columns):
        return cuda_queries.clamped_diagonal(whitened, columns, damping, divisor)
    xp = home.xp
    rest = 1.0 - xp.sum(whitened * whitened, axis=0)
    fisher = damping + xp.sum(columns * columns, axis=0) / divisor
    return xp.clip(rest / damping, 1.0 / fisher, 1.0 / damping), rest


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
