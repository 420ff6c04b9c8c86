"""Some columns of gradients, gathered part by part as they are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mfac_core._arrays import Array
from mfac_core._ops import rows as ops
from mfac_core._rows.base import Rows


class SelectedRows(Rows):
    """Columns of other rows, by increasing index; they are never copied all at once.

    A pass over them reads all the gradients, gathers a bounded block of what is selected at a
    time, and multiplies that alone.
    """

    def __init__(self, rows: Rows, indices: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        self._rows = rows
        self._indices = indices
        super().__init__(rows.like, (rows.shape[0], len(indices)), rows.reduce)
        self.float64 = rows.float64

    def parts(self) -> Iterator[tuple[slice, Array]]:
        """Yield blocks of selected columns, with the positions they cover among the selected."""
        done = 0
        for start, block in self._blocks():
            width = int(block.shape[1])
            here = self._indices[done:]
            here = here[: np.searchsorted(here, start + width)] - start
            if len(here):
                yield slice(done, done + len(here)), ops.gathered(block, here)
            done += len(here)

    def take(self, indices: np.ndarray[Any, Any]) -> Array:
        """See :meth:`Rows.take`."""
        return self._rows.take(self._indices[indices])

    def read(self, columns: slice) -> Array:
        """See :meth:`Rows.read`."""
        return self._rows.take(self._indices[columns])

    def stretch(self, start: int, stop: int) -> SelectedRows:
        """See :meth:`Rows.stretch`."""
        inside = self._indices[start:stop]
        first, last = int(inside[0]), int(inside[-1]) + 1
        return SelectedRows(self._rows.stretch(first, last), inside - first)

    def _blocks(self) -> Iterator[tuple[int, Array]]:
        """Yield blocks of all columns with where each starts."""
        for columns, part in self._rows.parts():
            first = columns.start or 0
            for block in ops.column_slices(part.shape[1], ops.wide_columns(part.shape[0])):
                yield first + block.start, part[:, block]
