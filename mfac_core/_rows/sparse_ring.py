"""A sliding window's rows, compressed: the largest entries of each block, and what is left out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from mfac_core._arrays import Array, array_namespace, device, itemsize, send
from mfac_core._ops import rows as ops
from mfac_core._ops import sparse
from mfac_core._ops.sparse import Entries
from mfac_core._rows.base import Columns, Reduce
from mfac_core._rows.ring import Ring
from mfac_core._rows.storage import ArrayRows

LARGEST_BLOCK = 4096
"""Most columns of a block: their float64 sums fit the shared memory of any CUDA device."""


class Format(NamedTuple):
    """How d columns are cut into n blocks of ``width``, of which k entries each are kept."""

    d: int
    n: int
    width: int
    k: int


def format_of(d: int, density: float) -> Format:
    """Cut d columns into equal blocks, but for the last; k = ⌈density · width⌉."""
    n = -(-d // LARGEST_BLOCK)
    width = -(-d // n)
    return Format(d, n, width, math.ceil(density * width))


class SparseRow(NamedTuple):
    """A gradient as it is stored, and what that leaves out of it."""

    indices: Array
    """int16, (n, k)."""

    values: Array
    """(n, k)."""

    kept: Array
    """The entries as a vector (d,)."""

    rest: Array
    """The gradient less what is kept, (d,), rounding errors included."""


def wide_dtype(xp: Any, dtype: Any) -> Any:
    """Return the dtype in which what is left out adds up: 16 bits would lose it."""
    return xp.float64 if itemsize(dtype) == 8 else xp.float32


class SparseRing(Ring):
    """Rows of k entries of each block, and the error that the next row makes up for.

    Parameters
    ----------
    indices, values : array, shape (n, capacity, k)
        The entries, int16 and of the gradients' dtype: all that a block of columns holds lies
        together, so that a pass keeps to one part of a vector at a time.
    error : array, shape (d,)
        What has been left out so far.
    format : Format
        The blocks.
    used : int
        How many rows are in use.
    reduce : callable, optional
        Sum over ranks.
    """

    stored = "values"

    def __init__(
        self,
        indices: Array,
        values: Array,
        error: Array,
        format: Format,
        used: int,
        reduce: Reduce | None,
    ) -> None:
        super().__init__(values[:0, :0, 0], (used, format.d), reduce)
        self.indices, self.values, self.error = indices, values, error
        self.format = format
        self.slots = []
        self.float64 = self.always_float64 = sparse.always_float64(values)

    @classmethod
    def empty(cls, like: Array, capacity: int, format: Format, reduce: Reduce | None) -> SparseRing:
        """Return a ring in the library, dtype and device of ``like``."""
        xp, there = array_namespace(like), device(like)
        shape = (format.n, capacity, format.k)
        return cls(
            xp.zeros(shape, dtype=xp.int16, device=there),
            xp.zeros(shape, dtype=like.dtype, device=there),
            xp.zeros(format.d, dtype=wide_dtype(xp, like.dtype), device=there),
            format,
            0,
            reduce,
        )

    @property
    def entries(self) -> Entries:
        """The rows in use."""
        return Entries(self.indices, self.values, self.used, self.format.d, self.format.width)

    # -- passes ----------------------------------------------------------------------------

    def parts(self) -> Iterator[tuple[slice, Array]]:
        """Yield columns as dense blocks, of bounded size."""
        for blocks, columns in self.entries.dense_blocks():
            yield columns, sparse.dense(self.entries, blocks)

    def take(self, indices: np.ndarray[Any, Any]) -> Array:
        """See :meth:`Rows.take`."""
        return sparse.take(self.entries, indices, self.home)

    def read(self, columns: slice) -> Array:
        """See :meth:`Rows.read`."""
        first = columns.start // self.format.width
        blocks = slice(first, -(-columns.stop // self.format.width))
        start = first * self.format.width
        within = slice(columns.start - start, columns.stop - start)
        return self.home.receive(sparse.dense(self.entries, blocks)[:, within])

    def stretch(self, start: int, stop: int) -> ArrayRows:
        """See :meth:`Rows.stretch`."""
        return ArrayRows(send(self.read(slice(start, stop)), self.like, self.dtype))

    def project(self, x: Array) -> Array:
        """See :meth:`Rows.project`; x is one array."""
        float64 = self.float64 or itemsize(x.dtype) == 8
        return self.summed(sparse.project(self.entries, x, float64=float64, home=self.home))

    def _combine(
        self, c: Array, base: Columns | None, alpha: float, dtype: Any, float64: bool
    ) -> Columns:
        return sparse.combine(self.entries, c, base, alpha, dtype=dtype, float64=float64)

    # -- the ring --------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """See :class:`Ring`."""
        return int(self.values.shape[1])

    def vector(self, row: SparseRow) -> Array:
        """See :class:`Ring`."""
        return row.kept

    def blank(self, i: int) -> SparseRow:
        """See :class:`Ring`."""
        indices, values = self.indices[:, i, :], self.values[:, i, :]
        return SparseRow(indices, values * 0, self.error * 0, self.error)

    def write(self, i: int, row: SparseRow) -> None:
        """See :class:`Ring`; what the row leaves out is carried over."""
        self.used = max(self.used, i + 1)
        self.indices = ops.write(self.indices, i, row.indices, axis=1)
        self.values = ops.write(self.values, i, row.values, axis=1)
        self.error = row.rest

    def held(self) -> Array:
        """See :class:`Ring`."""
        xp = self.xp
        chosen = xp.asarray(np.asarray(self.slots, dtype=np.int32), device=self.device)
        indices, values = (xp.take(a, chosen, axis=1) for a in (self.indices, self.values))
        entries = Entries(indices, values, len(self.slots), self.format.d, self.format.width)
        return sparse.dense(entries, slice(0, self.format.n))

    def emptied(self) -> SparseRing:
        """See :class:`Ring`."""
        error = self.error * 0
        return SparseRing(self.indices, self.values, error, self.format, 0, self.reduce)

    def copy(self) -> SparseRing:
        """See :class:`Ring`."""
        copy = self.state()
        arrays = copy["indices"], copy["values"], copy["error"]
        return SparseRing(*arrays, self.format, self.used, self.reduce)

    def shapes(self, used: int) -> dict[str, tuple[int, ...]]:
        """See :class:`Ring`."""
        shape = (self.format.n, used, self.format.k)
        return {"indices": shape, "values": shape, "error": (self.format.d,)}

    def state(self) -> dict[str, Array]:
        """See :class:`Ring`."""
        copy = self.xp.asarray
        indices, values = self.entries.within(slice(None))
        return {
            "indices": copy(indices, copy=True),
            "values": copy(values, copy=True),
            "error": copy(self.error, copy=True),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See :class:`Ring`."""
        error = send(state["error"], self.like, self.error.dtype)
        for i in range(state["values"].shape[1]):
            indices = send(state["indices"][:, i, :], self.like, self.indices.dtype)
            values = send(state["values"][:, i, :], self.like, self.dtype)
            self.write(i, SparseRow(indices, values, error, error))
        self.error = self.xp.asarray(error, copy=True)
