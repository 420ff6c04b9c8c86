"""The passes over NumPy gradients: BLAS on views, conversions through one buffer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mfac_core._ops import _widened
from mfac_core._ops._blocks import GRAM_COLUMNS, column_slices, gram_columns

NDArray = np.ndarray[Any, Any]

PROJECT_ELEMENTS = 1 << 22
"""Size of a float32 product Gx: large enough to be fast, and few enough columns to be accurate."""

COMBINE_COLUMNS = 16384
"""Columns of one product Gᵀc: the result's part stays in cache over all rows."""


def _work(g: NDArray, float64: bool) -> Any:
    return np.float64 if float64 or g.dtype == np.float64 else np.float32


def _blocks(g: NDArray, work: Any, width: int) -> Iterator[tuple[slice, NDArray]]:
    """Yield blocks of columns as ``work``: views, or one buffer filled again and again."""
    d = g.shape[1]
    width = min(width, d)
    buffer = None if g.dtype == work else np.empty((g.shape[0], width), work)
    for columns in column_slices(d, width):
        block = g[:, columns]
        if buffer is not None:
            wide = buffer[:, : block.shape[1]]
            _widened.widen(block, wide)
            block = wide
        yield columns, block


def gram(g: NDArray, *, float64: bool, width: int) -> NDArray:
    """See :func:`mfac_core._ops.rows.gram`."""
    work = _work(g, float64)
    total = np.zeros((g.shape[0], g.shape[0]))
    part = np.empty(total.shape, work)
    # Views need no buffer, and the sums of m² are not to be written more often than they must.
    most = GRAM_COLUMNS if g.dtype == work else width
    for _, block in _blocks(g, work, gram_columns(g.shape[1], most)):
        # NumPy recognises a product with its own transpose: half the work of a general one.
        total += np.matmul(block, block.T, out=part)
    return total


def cross_gram(g: NDArray, h: NDArray, *, float64: bool, width: int) -> NDArray:
    """See :func:`mfac_core._ops.rows.cross_gram`."""
    work, width = _work(g, float64), gram_columns(g.shape[1], width)
    total = np.zeros((g.shape[0], h.shape[0]))
    for (_, block), (_, other) in zip(
        _blocks(g, work, width), _blocks(h, work, width), strict=True
    ):
        total += block @ other.T
    return total


def project(g: NDArray, x: NDArray, *, float64: bool) -> NDArray:
    """See :func:`mfac_core._ops.rows.project`."""
    work = _work(g, float64)
    if g.dtype != work:
        return _widened.project(g, x, work)
    width = min(max(PROJECT_ELEMENTS // max(len(g), 1), 1024), 2 * GRAM_COLUMNS)
    total = np.zeros((g.shape[0], *x.shape[1:]))
    for columns in column_slices(g.shape[1], width):
        total += g[:, columns] @ x[columns].astype(work, copy=False)
    return total


def combine(
    g: NDArray, c: NDArray, base: NDArray | None, alpha: float, *, dtype: Any, float64: bool
) -> NDArray:
    """See :func:`mfac_core._ops.rows.combine`."""
    work = _work(g, float64)
    c = c.astype(work, copy=False)
    dtype = work if dtype is None else dtype
    if g.dtype != work:
        return _widened.combine(g, c, base, alpha).astype(dtype, copy=False)
    out = np.empty((g.shape[1], *c.shape[1:]), dtype)
    for columns in column_slices(g.shape[1], COMBINE_COLUMNS):
        part = g[:, columns].T @ c
        if base is not None:
            part += work(alpha) * base[columns].astype(work, copy=False)
        out[columns] = part
    return out
