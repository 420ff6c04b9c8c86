"""Passes over the gradients G, shape (m, d): Gram, project, combine.

Products of float32 and 16-bit rows run in float32, block of columns by block of columns, and are
summed in float64; with ``float64=True`` they run in float64 as a whole. NumPy arrays take the BLAS
path, which works through one buffer; arrays on a CUDA device within CuPy's reach take the kernels,
whose products are always float64, or nearly so on devices that have little of it; all others take
the array-API path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mfac_core._arrays import (
    Array,
    Home,
    array_namespace,
    device,
    has_float64,
    home_of,
    is_jax_array,
    is_numpy_array,
    send,
    to_numpy,
)
from mfac_core._ops import _blas, _generic, _int8_gram, _widened
from mfac_core._ops._blocks import column_slices as column_slices
from mfac_core._ops._blocks import wide_columns as wide_columns
from mfac_core._ops.cuda import passes as cuda_passes
from mfac_core._ops.cuda import queries as cuda_queries


def gram(g: Array, *, float64: bool, home: Home) -> Array:
    """G Gᵀ as float64 in ``home``, shape (m, m); d·m² multiplications."""
    width = wide_columns(g.shape[0])
    if is_numpy_array(g):
        return _blas.gram(g, float64=float64, width=width)
    if not float64 and _int8_gram.serves(g):
        return _int8_gram.gram(g, home)[0]
    return _generic.gram(g, float64=float64, width=width, home=home)


def cross_gram(g: Array, h: Array, *, float64: bool) -> Array:
    """G Hᵀ as float64, for two NumPy arrays of as many columns."""
    return _blas.cross_gram(g, h, float64=float64, width=wide_columns(g.shape[0] + h.shape[0]))


def project(g: Array, x: Array, *, float64: bool, home: Home) -> Array:
    """G x as float64 in ``home``, for x of shape (d,) or (d, k); one read of G."""
    if is_numpy_array(g):
        return _blas.project(g, x, float64=float64)
    if cuda_passes.serves_product(g, x):
        return cuda_passes.project(g, x, home, float64=float64)
    if _widened.serves(g, x, float64=float64):
        work = np.float64 if float64 else np.float32
        return home.receive(_widened.project(_widened.bits(g), to_numpy(x), work))
    return _generic.project(g, x, float64=float64, width=wide_columns(g.shape[0]), home=home)


def combine(
    g: Array, c: Array, base: Array | None, alpha: float, *, dtype: Any, float64: bool
) -> Array:
    """Return alpha·base + Gᵀc, for c (m,) or (m, k) in the home; one read of G.

    With a ``dtype``, an array of the gradients' library; with None, as computed.
    """
    if is_numpy_array(g):
        return _blas.combine(g, c, base, alpha, dtype=dtype, float64=float64)
    if cuda_passes.serves_combination(g, c, base) and (dtype is not None or has_float64(g)):
        return cuda_passes.combine(g, c, base, alpha, dtype=dtype, float64=float64)
    if _widened.serves(g, c, float64=float64):
        weights = to_numpy(c).astype(np.float64 if float64 else np.float32, copy=False)
        added = None if base is None else to_numpy(base)
        out = _widened.combine(_widened.bits(g), weights, added, alpha)
        return send(out, g, home_of(g).xp.float64 if dtype is None else dtype)
    width = wide_columns(g.shape[0])
    return _generic.combine(g, c, base, alpha, dtype=dtype, float64=float64, width=width)


def take(g: Array, columns: np.ndarray[Any, Any], home: Home) -> Array:
    """Columns of G by index as float64 in ``home``, shape (m, len(columns))."""
    if len(columns) and cuda_queries.serves_columns(g):
        return cuda_queries.take(g, columns, home)
    return home.receive(gathered(g, columns))


def gathered(g: Array, columns: np.ndarray[Any, Any]) -> Array:
    """Columns of G by index, in its own dtype and on its own device."""
    xp = array_namespace(g)
    if is_jax_array(g):
        return xp.take(g, columns, axis=1)
    return xp.take(g, xp.asarray(columns, device=device(g)), axis=1)


def pair_products(g: Array, columns: np.ndarray[Any, Any], right: Array, home: Home) -> Array:
    """Σᵣ G[r, columns[p]] right[r, p] as float64 in ``home``, shape (len(columns),).

    ``right`` is in the home, of as many rows as G has in use.
    """
    if cuda_queries.serves_pairs(g, right):
        return cuda_queries.pair_products(g, columns, right, home)
    return home.xp.sum(take(g, columns, home)[: right.shape[0], :] * right, axis=0)


def wide_blocks(g: Array, home: Home) -> Iterator[tuple[slice, Array]]:
    """Yield the columns of G block by block as float64 in ``home``."""
    for columns in column_slices(g.shape[1], wide_columns(g.shape[0])):
        yield columns, home.receive(g[:, columns])


def square_norms(x: Array) -> np.ndarray[Any, Any]:
    """‖x‖² of a vector (d,) or of each column of (d, k), summed in float64; one read of x.

    Not finite when x is not.
    """
    if x.ndim == 1 and not is_numpy_array(x) and cuda_passes.serves(x[None, :]):
        there = Home(array_namespace(x), device(x))
        return to_numpy(cuda_passes.project(x[None, :], x, there, float64=True)[0])
    home = home_of(x)
    total = home.zeros(x.shape[1:])
    with np.errstate(over="ignore", invalid="ignore"):
        for part in column_slices(x.shape[0], wide_columns(math.prod(x.shape[1:]))):
            block = home.receive(x[part, ...])
            total = total + (block @ block if x.ndim == 1 else home.xp.sum(block * block, axis=0))
    return to_numpy(total)


def always_float64(g: Array) -> bool:
    """Whether products with G run in float64 whatever ``float64`` says: those of the kernels do."""
    return not is_jax_array(g) and cuda_passes.serves(g)


def exchanges(g: Array, row: Array) -> bool:
    """Whether :func:`exchange` takes G and the new row."""
    return g.dtype == row.dtype and cuda_passes.serves_product(g, row) and not is_jax_array(g)


def exchange(g: Array, i: int, row: Array, home: Home) -> tuple[Array, Array]:
    """Set G[i] = row in place and return G row, with the new row in G, and ‖row‖², shape (1,).

    One read of G, on a device, without waiting for it. Where ‖row‖² is not finite G stays as it is,
    and the product is with the row that stays.
    """
    return cuda_passes.exchange(g, i, row, home)


def write(g: Array, i: int, row: Array, *, axis: int = 0) -> Array:
    """Set what has index i along an axis, in place where the library can, and return G."""
    return _generic.write(g, i, row, axis)


def later(x: Array) -> Callable[[], Any]:
    """Start copying a small array from a device; calling what is returned waits for it."""
    return cuda_passes.later(x)
