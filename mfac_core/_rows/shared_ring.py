"""A ring whose columns are partly on other ranks as well: each is counted once."""

from __future__ import annotations

from typing import Any

import numpy as np

from mfac_core._arrays import Array
from mfac_core._ops import rows as ops
from mfac_core._rows.base import Reduce
from mfac_core._rows.ring import ArrayRing


class SharedRing(ArrayRing):
    """A ring over ranks of which some hold the same columns.

    Parameters
    ----------
    array : array, shape (m, d)
        Taken over, and written in place where its library can.
    counted : int
        How many columns, the first ones, this rank adds to sums over ranks. Another rank adds the
        others, which are written and combined here, too.
    reduce : callable, optional
        Sum over ranks.
    """

    def __init__(self, array: Array, counted: int, reduce: Reduce | None) -> None:
        self._counted = counted
        super().__init__(array, reduce)

    def gram(self, *, float64: bool = False) -> Array:
        """See :class:`Rows`."""
        counted = self.array[: self.used, : self._counted]
        return self.summed(ops.gram(counted, float64=float64 or self.float64, home=self.home))

    def _project(self, x: Any, float64: bool) -> Array:
        counted = self.array[: self.used, : self._counted]
        return self.summed(
            ops.project(counted, x[: self._counted, ...], float64=float64, home=self.home)
        )

    def square_norms(self, x: Array) -> np.ndarray[Any, Any]:
        """See :class:`Rows`."""
        return super().square_norms(x[: self._counted, ...])

    def emptied(self) -> SharedRing:
        """See :class:`Ring`."""
        return SharedRing(self.array, self._counted, self.reduce)
