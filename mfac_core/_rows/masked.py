"""Gradients with zeros in the place of some columns, part by part as they are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mfac_core._arrays import Array, array_namespace, device, to_device
from mfac_core._ops import rows as ops
from mfac_core._rows.base import Rows


class MaskedRows(Rows):
    """Other rows, with zeros where a mask says so; they are never copied all at once.

    What :class:`SelectedRows` is on the host this is on a device, from where no indices come.
    """

    def __init__(self, rows: Rows, mask: Array) -> None:
        self._rows, self._mask = rows, mask
        super().__init__(rows.like, rows.shape, rows.reduce)
        self.float64 = rows.float64

    def parts(self) -> Iterator[tuple[slice, Array]]:
        """Yield blocks of columns."""
        for columns, part in self._rows.parts():
            first = columns.start or 0
            for block in ops.column_slices(part.shape[1], ops.wide_columns(part.shape[0])):
                here = slice(first + block.start, first + block.stop)
                mask = to_device(self._mask[here], device(part))
                yield here, part[:, block] * array_namespace(part).astype(mask, part.dtype)

    def take(self, indices: np.ndarray[Any, Any]) -> Array:
        """See :meth:`Rows.take`."""
        taken = self._rows.take(indices)
        at = self.home.xp.asarray(indices, device=device(self._mask))
        return taken * self.home.receive(self.home.xp.take(self._mask, at))

    def read(self, columns: slice) -> Array:
        """See :meth:`Rows.read`."""
        return self._rows.read(columns) * self.home.receive(self._mask[columns])

    def stretch(self, start: int, stop: int) -> MaskedRows:
        """See :meth:`Rows.stretch`."""
        return MaskedRows(self._rows.stretch(start, stop), self._mask[start:stop])
