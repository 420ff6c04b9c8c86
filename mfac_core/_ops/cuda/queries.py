"""Columns of G by index, elements and the diagonal on CUDA devices: ``entries.cu, diagonal.cu``."""

from __future__ import annotations

from typing import Any

import numpy as np

from mfac_core._arrays import Array, Home, is_jax_array
from mfac_core._ops.cuda import machine as cuda_machine
from mfac_core._ops.cuda.machine import STORAGE, dtype_name, launch
from mfac_core._ops.cuda.passes import LARGEST_GRID_Y, LARGEST_ROWS, is_contiguous, serves


def serves_columns(g: Array) -> bool:
    """Whether kernels read columns of G by index."""
    return g.shape[0] < LARGEST_ROWS and serves(g)


def serves_pairs(g: Array, right: Array) -> bool:
    """Whether kernels take G and what its columns are multiplied by, in either order."""
    here = is_jax_array(g) or serves(right) or serves(right.T)  # JAX's home is NumPy
    return here and 0 not in right.shape and serves_columns(g)


def take(g: Array, columns: np.ndarray[Any, Any], home: Home) -> Array:
    """Columns of G by index as float64 in ``home``, shape (m, len(columns))."""
    m, d = g.shape
    with cuda_machine.current.at(g):
        taken = cuda_machine.current.empty((m, len(columns)), "float64", g)
        launch(
            "entries.cu",
            "take_columns",
            {"G_T": STORAGE[dtype_name(g.dtype)]},
            (-(-len(columns) // 32), min(-(-m // 16), LARGEST_GRID_Y)),
            (32, 16),
            cuda_machine.current.borrow(g),
            cuda_machine.current.receive(columns),
            cuda_machine.current.borrow(taken),
            np.int32(m),
            np.int64(d),
            np.int64(len(columns)),
        )
        return home.receive(taken)


def pair_products(g: Array, columns: np.ndarray[Any, Any], right: Array, home: Home) -> Array:
    """Σᵣ G[r, columns[p]] right[r, p]; see :func:`mfac_core._ops.rows.pair_products`."""
    m, count = right.shape
    with cuda_machine.current.at(g):
        products = cuda_machine.current.empty((count,), "float64", g)
        lent, row_step, column_step = _in_either_order(right)
        launch(
            "entries.cu",
            "pair_products",
            {"G_T": STORAGE[dtype_name(g.dtype)]},
            (-(-count // 32),),
            (32, 16),
            cuda_machine.current.borrow(g),
            cuda_machine.current.receive(columns),
            lent,
            cuda_machine.current.borrow(products),
            np.int32(m),
            np.int64(g.shape[1]),
            np.int64(count),
            row_step,
            column_step,
        )
        return home.receive(products)


def serves_diagonal(whitened: Array, columns: Array) -> bool:
    """Whether kernels take a block of columns, and the whitened block in either order."""
    return serves(columns) and (serves(whitened) or serves(whitened.T))


def clamped_diagonal(
    whitened: Array, columns: Array, damping: float, divisor: float
) -> tuple[Array, Array]:
    """See :func:`mfac_core._ops.dense.clamped_diagonal`."""
    m, width = whitened.shape
    with cuda_machine.current.at(columns):
        lent, row_step, column_step = _in_either_order(whitened)
        diagonal = cuda_machine.current.empty((width,), "float64", columns)
        rest = cuda_machine.current.empty((width,), "float64", columns)
        launch(
            "diagonal.cu",
            "clamped_diagonal",
            {},
            (-(-width // 32),),
            (32, 8),
            lent,
            *map(cuda_machine.current.borrow, (columns, diagonal, rest)),
            np.int32(m),
            np.int32(width),
            row_step,
            column_step,
            np.float64(damping),
            np.float64(divisor),
        )
        return diagonal, rest


def _in_either_order(a: Array) -> tuple[Any, np.int64, np.int64]:
    """View a matrix in C or Fortran order as CuPy's, with its steps along a column and a row."""
    m, width = a.shape
    if is_contiguous(a.T) and not is_contiguous(a):
        return cuda_machine.current.receive(a.T), np.int64(1), np.int64(m)
    return cuda_machine.current.receive(a), np.int64(width), np.int64(1)
