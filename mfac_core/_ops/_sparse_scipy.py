"""The passes over the entries of NumPy's rows: SciPy's sparse matrices, a few blocks at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy

from mfac_core._ops._entries import Entries, flat, passes

NDArray = np.ndarray[Any, Any]


def _passes(entries: Entries) -> Iterator[tuple[slice, slice]]:
    n, _, k = entries.values.shape
    return passes((n, entries.m, k), entries.d, entries.width)


def _matrix(entries: Entries, blocks: slice) -> Any:
    """Return some blocks as a float64 CSR matrix (blocks·m, blocks·width), one below the other."""
    indices, values = entries.within(blocks)
    count, m, k = values.shape
    places = flat(indices, entries.width)
    ends = np.arange(0, values.size + 1, k, dtype=places.dtype)
    shape = (count * m, count * entries.width)
    return scipy.sparse.csr_array((values.astype(np.float64).ravel(), places, ends), shape=shape)


def project(entries: Entries, x: NDArray) -> NDArray:
    """See :func:`mfac_core._ops.sparse.project`."""
    total = np.zeros((entries.m, *x.shape[1:]))
    for blocks, columns in _passes(entries):
        matrix = _matrix(entries, blocks)
        piece = np.zeros((matrix.shape[1], *x.shape[1:]))
        piece[: columns.stop - columns.start] = x[columns]
        count = blocks.stop - blocks.start
        total += (matrix @ piece).reshape(count, *total.shape).sum(axis=0)
    return total


def combine(entries: Entries, c: NDArray, base: NDArray | None, alpha: float, out: Any) -> NDArray:
    """See :func:`mfac_core._ops.sparse.combine`; the result is of the dtype ``out``."""
    result = np.empty((entries.d, *c.shape[1:]), out)
    for blocks, columns in _passes(entries):
        matrix = _matrix(entries, blocks)
        weights = np.concatenate([c] * (blocks.stop - blocks.start))
        part = (matrix.T @ weights)[: columns.stop - columns.start]
        if base is not None:
            part += alpha * base[columns].astype(np.float64, copy=False)
        result[columns] = part
    return result
