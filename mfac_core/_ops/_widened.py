"""Passes over gradients in memory narrower than the products with them, widened block by block.

A block is widened into a buffer that stays in cache, so that memory is read once, in the
gradients' own dtype. Widening takes as long as the product. Both therefore run in as many threads
as BLAS is allowed to have, each on columns of its own. Products are then cut so small that BLAS
adds no threads to these, which would wait for one another where other processes hold the cores.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from mfac_core._arrays import Array, is_torch_array, itemsize
from mfac_core._ops import _threads
from mfac_core._ops._blocks import column_slices

NDArray = np.ndarray[Any, Any]

BLOCK_COLUMNS = 2048
"""Columns that are widened at a time: long enough to be read ahead, and still in cache."""

STACKED_ROWS = 4
"""Rows of a product of one thread among several; BLAS takes more from 9,216 elements on."""

THREADED_ELEMENTS = 1 << 21
"""Gradients of fewer elements are not worth a second thread."""

FLOAT16_BIAS = np.float32(2.0**112)
"""What float16 bits moved to the places of a float32 have to be multiplied by."""


def serves(g: Array, x: Array, *, float64: bool) -> bool:
    """Whether the functions here take a product of PyTorch's G."""
    if not is_torch_array(g) or g.device.type != "cpu":
        return False
    return itemsize(g.dtype) < (8 if float64 else 4)


def bits(g: Array) -> NDArray:
    """View PyTorch's gradients as a NumPy array; bfloat16, which NumPy does not have, as int16."""
    torch = sys.modules["torch"]
    return (g.view(torch.int16) if g.dtype == torch.bfloat16 else g).numpy()  # type: ignore[no-any-return]


def project(g: NDArray, x: NDArray, work: Any) -> NDArray:
    """G x as float64, for x of shape (d,) or (d, k), by products in the dtype ``work``."""
    x = x.astype(work, copy=False)
    threads = _workers(g, x)

    def some(columns: slice) -> NDArray:
        block = _Block(g, work, threads)
        total = np.zeros((block.rows, *x.shape[1:]))
        for here in column_slices(columns.stop, BLOCK_COLUMNS, columns.start):
            total += np.matmul(block.stacked(here), x[here]).reshape(total.shape)
        return total[: len(g)]

    return np.sum(_in_threads(threads, g.shape[1], some), axis=0)  # type: ignore[no-any-return]


def combine(g: NDArray, c: NDArray, base: NDArray | None, alpha: float) -> NDArray:
    """alpha·base + Gᵀc, shape (d,) or (d, k), for c (m,) or (m, k) and by products in its dtype."""
    out = np.empty((g.shape[1], *c.shape[1:]), c.dtype)
    work = c.dtype.type
    threads = _workers(g, c)

    def some(columns: slice) -> None:
        block = _Block(g, work, threads)
        for here in column_slices(columns.stop, BLOCK_COLUMNS, columns.start):
            wide = block.widened(here)
            # NumPy's own loop is not split over threads, and for this product nearly as fast.
            part = wide.T @ c if threads == 1 else np.einsum("i,ij->j", c, wide)
            if base is not None:
                part += work(alpha) * base[here].astype(work, copy=False)
            out[here] = part

    _in_threads(threads, g.shape[1], some)
    return out


def widen(block: NDArray, out: NDArray) -> None:
    """Copy ``block``, where int16 stands for bfloat16, to ``out``, of a wider dtype.

    NumPy widens float16 one element at a time; moving its bits is several times as fast.
    """
    if block.dtype.itemsize > 2:
        np.copyto(out, block)
        return
    narrow = out if out.dtype == np.float32 else np.empty(out.shape, np.float32)
    moved = narrow.view(np.int32)
    np.copyto(moved, block.view(np.int16))  # the sign fills the upper half
    if block.dtype == np.int16:
        np.left_shift(moved, 16, out=moved)
    else:
        np.left_shift(moved, 13, out=moved)
        np.bitwise_and(moved, np.int32(-0x70002000), out=moved)  # one sign, and the 15 other bits
        np.multiply(narrow, FLOAT16_BIAS, out=narrow)
        if not -65536.0 < narrow.min(initial=0.0) <= narrow.max(initial=0.0) < 65536.0:
            np.copyto(narrow, block)  # a NaN or an infinity has another place in float32
    if narrow is not out:
        np.copyto(out, narrow)


class _Block:
    """One buffer for all rows of a block of columns, in stacks of as many rows as go together."""

    def __init__(self, g: NDArray, work: Any, threads: int) -> None:
        self._g = g
        self.stack = max(len(g), 1) if threads == 1 else STACKED_ROWS
        self.rows = -(-len(g) // self.stack) * self.stack  # the last ones may be zero
        self._buffer = np.zeros((self.rows, min(BLOCK_COLUMNS, g.shape[1])), work)
        self._stacks = self._buffer.reshape(
            self.rows // self.stack, self.stack, self._buffer.shape[1]
        )

    def widened(self, columns: slice) -> NDArray:
        """Return these columns, widened."""
        block = self._buffer[: len(self._g), : columns.stop - columns.start]
        widen(self._g[:, columns], block)
        return block

    def stacked(self, columns: slice) -> NDArray:
        """Return these columns, widened, shape (stacks, stack, len(columns))."""
        self.widened(columns)
        return self._stacks[:, :, : columns.stop - columns.start]


def _workers(g: NDArray, x: NDArray) -> int:
    """Return how many threads to take; one for matrices, with which BLAS has enough to share."""
    if x.ndim == 2 or g.size < THREADED_ELEMENTS:
        return 1
    return int(min(blas_threads(), g.shape[1] // BLOCK_COLUMNS))


def _in_threads(workers: int, d: int, act: Callable[[slice], Any]) -> list[Any]:
    """Return what ``act`` returns for shares of d columns, each in a thread of its own."""
    if workers < 2:
        return [act(slice(0, d))]
    shares = column_slices(d, -(-d // workers))
    return list(_threads.pool("widened", workers).map(act, shares))


def blas_threads() -> int:
    """Return how many threads BLAS may have now."""
    return min((library.num_threads for library in _blas_libraries()), default=os.cpu_count() or 1)


@functools.cache
def _blas_libraries() -> list[Any]:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas").lib_controllers  # type: ignore[no-any-return]
