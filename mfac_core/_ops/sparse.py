"""Passes over rows that hold a few entries of each block of columns, and the choice of those.

NumPy arrays take SciPy's sparse matrices; arrays on a CUDA device within CuPy's reach, the kernels;
PyTorch's and JAX's, a gather and a scatter of their own. The standard has no scatter, so that
arrays of any other library are copied to the host. Products run in float64 where there is any.
"""

from __future__ import annotations

import sys
from typing import Any

import array_api_extra as xpx
import numpy as np

from mfac_core._arrays import (
    Array,
    Home,
    array_namespace,
    device,
    has_float64,
    is_cupy_array,
    is_jax_array,
    is_numpy_array,
    is_torch_array,
    send,
    to_numpy,
)
from mfac_core._ops import _sparse_generic, _sparse_scipy
from mfac_core._ops._blocks import WIDE_BYTES, column_slices
from mfac_core._ops._entries import Entries as Entries
from mfac_core._ops._entries import flat
from mfac_core._ops._sparse_generic import run
from mfac_core._ops.cuda import sparse as cuda_sparse


def compress(x: Array, k: int, width: int, dtype: Any) -> tuple[Array, Array, Array, Array]:
    """Keep the k entries of largest magnitude of each block of x, (d,), as ``dtype``.

    Returns their indices, int16 (n, k), ascending and relative to the start of the block; their
    values, (n, k); these as a vector; and x less that vector. Indices are past the end of the last
    block where that has fewer than k entries, which are then zero.
    """
    result: tuple[Array, Array, Array, Array] = run(_compress, x, k=k, width=width, dtype=dtype)
    return result


def _compress(x: Array, *, k: int, width: int, dtype: Any) -> tuple[Array, Array, Array, Array]:
    xp, d = array_namespace(x), x.shape[0]
    size = xp.abs(x)
    n = -(-d // width)
    if missing := n * width - d:
        size = xpx.pad(size, (0, missing), constant_values=-1.0, xp=xp)  # after every entry
    indices = _largest(xp.reshape(size, (n, width)), k)
    values = xp.take(_sparse_generic.padded(x, n * width), flat(indices, width), axis=0)
    with np.errstate(over="ignore"):  # seen by whoever looks at the norm
        values = xp.astype(xp.reshape(values, (n, k)), dtype)
    wide = xp.astype(values, x.dtype)[:, None, :]
    kept = _spread(indices[:, None, :], wide, width=width)[0, :d]
    return indices, values, kept, x - kept


def _largest(size: Array, k: int) -> Array:
    """Return the indices of the k largest elements of each row, int16, ascending."""
    xp, width = array_namespace(size), size.shape[1]
    if is_torch_array(size):
        chosen = xp.topk(size, k, dim=1, sorted=False).indices
    elif is_jax_array(size):
        chosen = sys.modules["jax"].lax.top_k(size, k)[1]
    elif is_numpy_array(size) or is_cupy_array(size):
        chosen = xp.argpartition(size, width - k, axis=1)[:, width - k :]
    else:
        chosen = xp.argsort(size, axis=1, descending=True)[:, :k]
    return xp.sort(xp.astype(chosen, xp.int16), axis=1)


def dense(entries: Entries, blocks: slice) -> Array:
    """Return the columns of some blocks as an array (m, columns) of the library and dtype."""
    columns = min(blocks.stop * entries.width, entries.d) - blocks.start * entries.width
    whole = run(_spread, *entries.within(blocks), width=entries.width)
    return whole[: entries.m, :columns]


def _spread(indices: Array, values: Array, *, width: int) -> Array:
    xp, there = array_namespace(values), device(values)
    if not _takes_index_arrays(values):
        host = _spread(to_numpy(indices), to_numpy(values), width=width)
        return xp.asarray(host, dtype=values.dtype, device=there)
    n, m, _ = values.shape
    result = xp.zeros((m, n, width), dtype=values.dtype, device=there)
    row = xp.arange(m, device=there)[None, :, None]
    block = xp.arange(n, device=there)[:, None, None]
    place = row, block, xp.astype(indices, row.dtype)
    if is_jax_array(values):
        result = result.at[place].set(values)
    else:
        result[place] = values
    return xp.reshape(result, (m, n * width))


def _takes_index_arrays(x: Array) -> bool:
    """Whether an array can be written to at places given by arrays, as the standard's cannot."""
    return is_numpy_array(x) or is_torch_array(x) or is_jax_array(x) or is_cupy_array(x)


def take(entries: Entries, columns: np.ndarray[Any, Any], home: Home) -> Array:
    """Return columns of G by index as float64 in ``home``, (m, len(columns))."""
    indices, values = entries.within(slice(None))
    xp, there = array_namespace(values), device(values)
    _, m, k = values.shape
    parts = [home.zeros((m, 0))]
    for some in column_slices(len(columns), max(WIDE_BYTES // (8 * max(m * k, 1)), 1)):
        block, offset = np.divmod(columns[some].astype(np.int32), entries.width)
        block = xp.asarray(block, device=there)
        offset = xp.asarray(offset.astype(np.int16), device=there)
        same, found = run(_blocks_of, indices, values, block, offset)
        parts.append(home.xp.sum(home.receive(found) * home.receive(same), axis=2).T)
    return home.xp.concat(parts, axis=1)[: entries.m, :]


def _blocks_of(indices: Array, values: Array, block: Array, offset: Array) -> tuple[Array, Array]:
    """Return blocks of entries, and 1 where an entry is at an offset."""
    xp = array_namespace(values)
    same = xp.take(indices, block, axis=0) == offset[:, None, None]
    return xp.astype(same, xp.float32), xp.take(values, block, axis=0)


def always_float64(values: Array) -> bool:
    """Whether products run in float64 whatever ``float64`` says."""
    return has_float64(values)


def project(entries: Entries, x: Array, *, float64: bool, home: Home) -> Array:
    """G x as float64 in ``home``, for x of shape (d,) or (d, k); one read of the entries."""
    values = entries.values
    if not entries.m:
        return home.zeros((0, *x.shape[1:]))
    if is_numpy_array(values):
        return _sparse_scipy.project(entries, to_numpy(x))
    if cuda_sparse.serves(entries, x):
        return cuda_sparse.project(entries, x, home)
    if not _sparse_generic.serves(values, float64) or 0 in x.shape:
        return home.receive(_sparse_scipy.project(entries.on_host(), to_numpy(x)))
    if x.ndim == 1:
        return _sparse_generic.project(entries, x, home)
    each = [_sparse_generic.project(entries, x[:, j], home) for j in range(x.shape[1])]
    return home.xp.stack(each, axis=1)


def combine(
    entries: Entries, c: Array, base: Array | None, alpha: float, *, dtype: Any, float64: bool
) -> Array:
    """Return alpha·base + Gᵀc, for c (m,) or (m, k) in the home; one read of the entries.

    With a ``dtype``, an array of the gradients' library; with None, as computed.
    """
    values = entries.values
    if is_numpy_array(values):
        out = np.float64 if dtype is None else dtype
        return _sparse_scipy.combine(entries, c, base, alpha, out)
    computed = dtype is not None or has_float64(values)
    if cuda_sparse.serves_combination(entries, c, base) and computed:
        return cuda_sparse.combine(entries, c, base, alpha, dtype)
    if not _sparse_generic.serves(values, float64) or 0 in c.shape:
        added = None if base is None else to_numpy(base)
        result = _sparse_scipy.combine(entries.on_host(), to_numpy(c), added, alpha, np.float64)
        if dtype is None and has_float64(values):
            dtype = array_namespace(values).float64
        return result if dtype is None else send(result, values, dtype)
    if c.ndim == 1:
        return _sparse_generic.combine(entries, c, base, alpha, dtype)
    columns = [(c[:, j], None if base is None else base[:, j]) for j in range(c.shape[1])]
    each = [_sparse_generic.combine(entries, cj, bj, alpha, dtype) for cj, bj in columns]
    return array_namespace(values).stack(each, axis=1)
