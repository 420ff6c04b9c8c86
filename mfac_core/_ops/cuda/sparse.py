"""The passes over sparse rows on CUDA devices: ``kernels/sparse.cu``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mfac_core._arrays import Array, Home, is_jax_array
from mfac_core._ops._entries import Entries
from mfac_core._ops.cuda import machine as cuda_machine
from mfac_core._ops.cuda import passes as cuda_passes
from mfac_core._ops.cuda.machine import STORAGE, dtype_name, launch

WIDEST = 4096
"""Most columns of a block, as the kernels have it."""

GRID_BLOCKS = 2048
"""Blocks of threads that keep a large device busy."""

SLICE_ROWS = 64
"""Least rows of a slice, so that what is kept of a slice is small beside its entries."""


def serves(entries: Entries, x: Array | None) -> bool:
    """Whether kernels take sparse rows and what is multiplied or added: a vector or columns."""
    held = entries.width <= WIDEST and cuda_passes.is_contiguous(entries.indices)
    return (
        held
        and cuda_passes.serves(entries.values)
        and (x is None or (_few(x) and cuda_passes.reaches(x)))
    )


def serves_combination(entries: Entries, c: Array, base: Array | None) -> bool:
    """Whether kernels take sparse rows, their weights, in the home, and what is added."""
    here = is_jax_array(entries.values) or cuda_passes.reaches(c)  # JAX's home is NumPy
    return here and _few(c) and serves(entries, base)


def _few(x: Array) -> bool:
    return bool(x.ndim == 1 or 0 < x.shape[1] <= cuda_passes.LARGEST_GRID_Y)


def project(entries: Entries, x: Array, home: Home) -> Array:
    """G x; see :func:`mfac_core._ops.sparse.project`."""
    values, m = entries.values, entries.m
    with cuda_machine.current.at(values):
        columns = math.prod(x.shape[1:])
        partial = cuda_machine.current.empty((values.shape[0], m * columns), "float64", values)
        slices, rows = _slices(entries)
        _launch(
            "sparse_project",
            {"X_T": STORAGE[dtype_name(x.dtype)], "OUT_T": "double"},
            entries,
            (slices, columns),
            rows,
            cuda_machine.current.receive(x),
            cuda_machine.current.borrow(partial),
        )
        product = cuda_passes.sum_parts(partial, None, 0.0, (m, *x.shape[1:]), "float64", values)
        return home.receive(product)


def combine(entries: Entries, c: Array, base: Array | None, alpha: float, dtype: Any) -> Array:
    """alpha·base + Gᵀc; see :func:`mfac_core._ops.sparse.combine`."""
    values, d = entries.values, entries.d
    name = "float64" if dtype is None else dtype_name(dtype)
    with cuda_machine.current.at(values):
        weights = cuda_machine.current.receive(c)
        added = weights if base is None else cuda_machine.current.receive(base)
        added_dtype = weights.dtype if base is None else base.dtype
        alpha = 0.0 if base is None else alpha
        columns, shape = math.prod(c.shape[1:]), (d, *c.shape[1:])
        slices, rows = _slices(entries)
        whole = slices == 1
        out = cuda_machine.current.empty(
            shape if whole else (slices, d * columns), name if whole else "float64", values
        )
        _launch(
            "sparse_combine",
            {
                "X_T": STORAGE[dtype_name(added_dtype)],
                "OUT_T": STORAGE[name if whole else "float64"],
            },
            entries,
            (slices, columns),
            rows,
            weights,
            added,
            np.float64(alpha if whole else 0.0),
            cuda_machine.current.borrow(out),
        )
        if not whole:
            out = cuda_passes.sum_parts(out, base, alpha, shape, name, values)
        return cuda_machine.current.give_back(out, values)


def _slices(entries: Entries) -> tuple[int, int]:
    """Into how many slices the rows are cut, and of how many rows."""
    wanted = GRID_BLOCKS // entries.values.shape[0]
    slices = max(1, min(wanted, entries.m // SLICE_ROWS))
    rows = -(-entries.m // slices)
    return -(-entries.m // rows), rows  # rounding up may have left none for the last


def _launch(
    name: str,
    macros: dict[str, Any],
    entries: Entries,
    grid: tuple[int, int],
    rows: int,
    *operands: Any,
) -> None:
    """Launch on all blocks of columns, by slices of ``rows`` rows."""
    blocks, capacity, k = entries.values.shape
    launch(
        "sparse.cu",
        name,
        {"V_T": STORAGE[dtype_name(entries.values.dtype)], **macros},
        (blocks, *grid),
        (128,),
        cuda_machine.current.borrow(entries.indices),
        cuda_machine.current.borrow(entries.values),
        *operands,
        np.int32(entries.m),
        np.int32(capacity),
        np.int32(k),
        np.int64(entries.d),
        np.int32(entries.width),
        np.int32(rows),
    )
