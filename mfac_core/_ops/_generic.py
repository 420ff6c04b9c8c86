"""The passes over the gradients for any array-API library."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from mfac_core._arrays import (
    Array,
    Home,
    array_namespace,
    device,
    is_jax_array,
    is_numpy_array,
    is_torch_array,
    itemsize,
    send,
    to_numpy,
    widen,
)
from mfac_core._ops._blocks import column_slices, gram_columns
from mfac_core._ops._precision import full_float32

EVERYTHING = slice(None)

BUFFERED_COLUMNS = 2048
"""Columns widened at a time on the host: long enough to be read ahead, and still in cache."""


def _matmul(a: Array, b: Array) -> Array:
    if is_jax_array(a):  # the default on accelerators is a product of fewer bits
        return array_namespace(a).matmul(a, b, precision="highest")
    with full_float32(a):
        return a @ b


def _like(x: Array, wide: Array) -> Array:
    """Return ``x`` in the library and dtype of a widened block."""
    if is_numpy_array(wide) and not is_numpy_array(x):
        return to_numpy(x).astype(wide.dtype, copy=False)
    return array_namespace(x).astype(x, wide.dtype, copy=False)


def _wide(x: Array, float64: bool) -> Array:
    """Return ``x`` in the working dtype: float64 where asked, in NumPy where need be."""
    if float64 or itemsize(x.dtype) == 8:
        return widen(x)
    xp = array_namespace(x)
    return xp.astype(x, xp.float32, copy=False)


def _wide_blocks(g: Array, float64: bool, width: int) -> Iterator[tuple[slice, Array]]:
    """Yield widened blocks of columns; G itself, whole and unsliced, when it is wide enough.

    Slicing copies in libraries without views, so that a pass that needs no conversion avoids it.
    """
    if itemsize(g.dtype) == 8 or (itemsize(g.dtype) == 4 and not float64):
        yield EVERYTHING, g
        return
    if is_torch_array(g) and device(g).type == "cpu":
        yield from _buffered(g, float64, min(width, BUFFERED_COLUMNS))
        return
    for columns in column_slices(g.shape[1], width):
        yield columns, _wide(g[:, columns], float64)


def _buffered(g: Array, float64: bool, width: int) -> Iterator[tuple[slice, Array]]:
    """Yield widened blocks of a tensor on the host in one buffer, which stays in cache."""
    torch = sys.modules["torch"]
    width = min(width, g.shape[1])
    work = torch.float64 if float64 or g.dtype == torch.float64 else torch.float32
    buffer = torch.empty((g.shape[0], width), dtype=work)
    # PyTorch takes two steps from 16 bits to float64 for one element, and one by one.
    narrow = torch.empty_like(buffer, dtype=torch.float32) if _is_two_steps(g, work) else None
    for columns in column_slices(g.shape[1], width):
        block, wide = g[:, columns], buffer[:, : columns.stop - columns.start]
        if narrow is not None:
            block = narrow[:, : wide.shape[1]].copy_(block)
        yield columns, wide.copy_(block)


def _is_two_steps(g: Array, work: Any) -> bool:
    return itemsize(g.dtype) == 2 and itemsize(work) == 8


def gram(g: Array, *, float64: bool, width: int, home: Home) -> Array:
    """See :func:`mfac_core._ops.rows.gram`."""
    total = home.zeros((g.shape[0], g.shape[0]))
    for columns in column_slices(g.shape[1], gram_columns(g.shape[1], width)):
        block = _wide(g[:, columns], float64)
        total += home.receive(_matmul(block, block.T))
    return total


def project(g: Array, x: Array, *, float64: bool, width: int, home: Home) -> Array:
    """See :func:`mfac_core._ops.rows.project`."""
    total = home.zeros((g.shape[0], *x.shape[1:]))
    for columns, block in _wide_blocks(g, float64, width):
        total += home.receive(_matmul(block, _like(x[columns, ...], block)))
    return total


def combine(
    g: Array, c: Array, base: Array | None, alpha: float, *, dtype: Any, float64: bool, width: int
) -> Array:
    """See :func:`mfac_core._ops.rows.combine`."""
    parts = []
    for columns, block in _wide_blocks(g, float64, width):
        part = _matmul(block.T, send(c, block, block.dtype))
        if base is not None:
            part = part + alpha * _like(base[columns, ...], block)
        parts.append(part if dtype is None else send(part, g, dtype))
    return parts[0] if len(parts) == 1 else array_namespace(parts[0]).concat(parts, axis=0)


def write(g: Array, i: int, row: Array, axis: int) -> Array:
    """See :func:`mfac_core._ops.rows.write`."""
    if is_jax_array(g):
        return _donating_write(axis)(g, row, i)
    g[(slice(None),) * axis + (i, ...)] = row
    return g


@functools.cache
def _donating_write(axis: int) -> Callable[[Array, Array, int], Array]:
    """Compile a row write that reuses JAX's buffer instead of copying it."""
    jax = sys.modules["jax"]
    return jax.jit(  # type: ignore[no-any-return]
        lambda g, row, i: jax.lax.dynamic_update_index_in_dim(g, row, i, axis=axis),
        donate_argnums=0,
    )
