"""Gradients read by slices from a file, a store, or anything else with shape, dtype and slicing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from mfac_core._arrays import Array, itemsize
from mfac_core._ops import rows as ops
from mfac_core._progress import track
from mfac_core._rows.base import Columns, Reduce, Rows, first_of

PART_BYTES = 1 << 25
"""What is read at a time, and the stride of a progress bar."""

STRETCH_COLUMNS = 1024
"""Columns that are read for one of them, or a chunk's where these are more."""

LONG_BYTES = 1 << 23
"""The same of chunks that are longer: a store may hold several copies of what it is asked for."""

HELD_BYTES = 1 << 26
"""Rows that are held while the others pass by them, where a row is longer than a part."""

COMBINED_COLUMNS = 1 << 16
"""Columns of the sums of such rows that are added up at a time."""

NDArray = np.ndarray[Any, Any]


class Source:
    """What can be sliced, read by whole chunks where it is stored in chunks.

    The last few columns read are kept: who asks for some of a chunk often asks for others next.

    Parameters
    ----------
    array : sliceable
        Has ``shape``, ``dtype`` and ``[a:b, c:d]``, and perhaps ``chunks``: one size for each
        axis, or as Dask has it all of them.
    """

    def __init__(self, array: Any) -> None:
        self._array = array
        self.m, self.d = (int(n) for n in array.shape)
        self.dtype = np.dtype(array.dtype)
        chunks = getattr(array, "chunks", None)
        rows, columns = (self.m, 1) if chunks is None else (int(np.max(n)) for n in chunks)
        width = max(PART_BYTES // (self.m * self.dtype.itemsize), 1)
        self.width = min(max(width // columns, 1) * columns, self.d)
        """Columns that are read at a time."""
        self.is_long = columns > max(width, 1)
        """Whether a chunk's columns in all rows are more than is read at a time."""
        per_row = self.width * self.dtype.itemsize
        bound = LONG_BYTES if self.is_long else PART_BYTES
        self.height = max(bound // (rows * per_row), 1) * rows
        """Rows that are read at a time, of those columns."""
        self._stretch = max(STRETCH_COLUMNS // columns, 1) * columns
        self._is_chunked = chunks is not None
        self._kept: tuple[slice, NDArray] = slice(0, 0), np.empty((self.m, 0), self.dtype)

    def read(self, rows: slice, columns: slice) -> NDArray:
        """Return rows and columns as they are stored."""
        whole = rows == slice(0, self.m)
        part = np.asarray(self._array[slice(None) if whole else rows, columns])
        expected = (rows.stop - rows.start, columns.stop - columns.start)
        if part.shape != expected:
            which = ":" if whole else f"{rows.start}:{rows.stop}"
            msg = (
                f"gradients[{which}, {columns.start}:{columns.stop}] must have shape {expected}, "
                f"got {part.shape}; is the file complete?"
            )
            raise ValueError(msg)
        return part

    def columns(self, columns: slice) -> NDArray:
        """Return columns of all rows."""
        rows = slice(0, self.m)
        return self.block(rows, columns) if self.is_long else self.read(rows, columns)

    def block(self, rows: slice, columns: slice) -> NDArray:
        """Return rows and columns, few rows of which are read at a time."""
        part = np.empty((rows.stop - rows.start, columns.stop - columns.start), self.dtype)
        for some in ops.column_slices(rows.stop, self.height, rows.start):
            part[some.start - rows.start : some.stop - rows.start] = self.read(some, columns)
        return part

    def few_columns(self, columns: slice) -> NDArray:
        """Return columns of all rows, and keep what else is in their chunks for the next call."""
        first = columns.start // self._stretch * self._stretch
        around = slice(first, min(first + self._stretch, self.d))
        if self.is_long or not self._is_chunked or columns.stop > around.stop:
            return self.columns(columns)
        if self._kept[0] != around:
            self._kept = around, self.columns(around)
        return self._kept[1][:, columns.start - first : columns.stop - first]

    def take(self, indices: NDArray, out: NDArray) -> None:
        """Write columns by index to ``out``, reading every stretch of them once."""
        order = np.argsort(indices, kind="stable")
        stretches = indices[order] // self._stretch
        for some in np.split(order, np.flatnonzero(np.diff(stretches)) + 1) if len(order) else ():
            here = indices[some]
            columns = slice(int(here[0]), int(here[-1]) + 1)
            height = self.height if self.is_long else self.m
            for rows in ops.column_slices(self.m, height):
                part = self.read(rows, columns) if self.is_long else self.few_columns(columns)
                out[rows, some] = part[:, here - columns.start]


class SlicedRows(Rows):
    """Columns of a source: in slices of all rows, none of which is more than is read at a time."""

    def __init__(
        self,
        source: Source,
        columns: slice | None = None,
        *,
        reduce: Reduce | None = None,
        progress: bool = False,
    ) -> None:
        self._source = source
        self._columns = slice(0, source.d) if columns is None else columns
        self._progress = progress
        width = self._columns.stop - self._columns.start
        super().__init__(np.empty((0, 0), dtype=source.dtype), (source.m, width), reduce)

    def parts(self) -> Iterable[tuple[slice, Array]]:
        """Read slices, of whole chunks where the source is stored in chunks."""
        first = self._columns.start
        cuts = self._cuts(self._source.width)
        for cut in track(cuts, "gradients") if self._progress else cuts:
            yield slice(cut.start - first, cut.stop - first), self._source.columns(cut)

    def take(self, indices: np.ndarray[Any, Any]) -> Array:
        """See :meth:`Rows.take`."""
        result = np.empty((self.used, len(indices)))
        self._source.take(indices + self._columns.start, result)
        return result

    def read(self, columns: slice) -> Array:
        """See :meth:`Rows.read`."""
        return self.home.receive(self._source.few_columns(self._shifted(columns)))

    def stretch(self, start: int, stop: int) -> SlicedRows:
        """See :meth:`Rows.stretch`."""
        columns = self._shifted(slice(start, stop))
        return type(self)(self._source, columns, progress=self._progress)

    def _cuts(self, width: int) -> list[slice]:
        """Cut the columns of the source into slices of a width, as its chunks lie."""
        start, stop = self._columns.start, self._columns.stop
        cuts = ops.column_slices(stop, width, start // width * width)
        return [slice(max(cut.start, start), cut.stop) for cut in cuts]

    def _shifted(self, columns: slice) -> slice:
        first = self._columns.start
        return slice(first + columns.start, first + columns.stop)


class LongRows(SlicedRows):
    """The same where chunks are longer than what is read at a time: the passes go by rows.

    A column of all rows would read all chunks; a range of rows reads its own. The Gram holds one
    range after another, and multiplies it by those that follow: each chunk is read about
    (1 + b / ``HELD_BYTES``)/2 times for b bytes of gradients, where the other passes read it once.
    """

    def parts(self) -> Iterable[tuple[slice, Array]]:
        """Read slices of a bounded size, each from all the chunks of its columns."""
        first = self._columns.start
        for cut in self._cuts(max(PART_BYTES // (itemsize(self.dtype) * self.used), 1)):
            yield slice(cut.start - first, cut.stop - first), self._source.columns(cut)

    def gram(self, *, float64: bool = False) -> Array:
        """See :meth:`Rows.gram`."""
        float64 = float64 or self.float64
        total = np.zeros((self.used, self.used))
        for panel in self._cuts(self._source.width):
            row = (panel.stop - panel.start) * itemsize(self.dtype)
            height = max(HELD_BYTES // row // self._source.height, 1) * self._source.height
            for held in ops.column_slices(self.used, height):
                block = self._source.block(held, panel)
                total[held, held] += ops.gram(block, float64=float64, home=self.home)
                for rows in ops.column_slices(self.used, self._source.height, held.stop):
                    other = self._source.read(rows, panel)
                    products = ops.cross_gram(block, other, float64=float64)
                    total[held, rows] += products
                    total[rows, held] += products.T
                    del other  # before the next is read
                del block
        return self.summed(total)

    def _project(self, x: Any, float64: bool) -> Array:
        total = self.home.zeros((self.used, *first_of(x).shape[1:]))
        for rows, columns, block in self._blocks():
            total[rows, ...] += ops.project(block, x[columns, ...], float64=float64, home=self.home)
        return self.summed(total)

    def _combine(self, c: Array, base: Any, alpha: float, dtype: Any, float64: bool) -> Columns:
        out = np.zeros((self.shape[1], *c.shape[1:]))
        for rows, columns, block in self._blocks():
            for some in ops.column_slices(block.shape[1], COMBINED_COLUMNS):
                out[columns][some] += ops.combine(
                    block[:, some], c[rows, ...], None, 1.0, dtype=np.float64, float64=True
                )
            del block  # before the next is read
        if base is not None:
            out += alpha * base
        return out if dtype is None else out.astype(dtype)

    def nonfinite(self) -> list[int]:
        """See :meth:`Rows.nonfinite`."""
        found = np.zeros(self.used)
        for rows, _, block in self._blocks():
            found[rows] += ~np.all(np.isfinite(block), axis=1)
        return self._found(found)

    def _blocks(self) -> Iterator[tuple[slice, slice, NDArray]]:
        """Yield all there is in blocks of whole chunks, with the rows and columns they cover."""
        first = self._columns.start
        cuts = [
            (rows, panel)
            for panel in self._cuts(self._source.width)
            for rows in ops.column_slices(self.used, self._source.height)
        ]
        for rows, panel in track(cuts, "gradients") if self._progress else cuts:
            columns = slice(panel.start - first, panel.stop - first)
            yield rows, columns, self._source.read(rows, panel)


def sliced_rows(array: Any, *, reduce: Reduce | None, progress: bool) -> SlicedRows:
    """Return the rows of what can be sliced, read by columns or by rows as its chunks lie."""
    source = Source(array)
    kind = LongRows if source.is_long else SlicedRows
    return kind(source, reduce=reduce, progress=progress)
