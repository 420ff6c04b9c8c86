"""The gradients of a sliding window: an array written row by row, and the age of its rows."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from mfac_core._arrays import Array
from mfac_core._ops import rows as ops
from mfac_core._rows import Reduce
from mfac_core._storage import ArrayRows


class Ring(ArrayRows):
    """The rows of an array, none of them in use yet; an empty one among those in use is zero.

    So it adds nothing to any product.

    Parameters
    ----------
    array : array, shape (m, d)
        Taken over, and written in place where its library can.
    reduce : callable, optional
        Sum over ranks.
    """

    slots: list[int]
    """The rows that hold gradients, oldest first."""

    always_exact: bool
    """Whether products run in float64 whatever is asked."""

    def __init__(self, array: Array, reduce: Reduce | None = None) -> None:
        super().__init__(array, used=0, reduce=reduce)
        self.slots = []
        self.always_exact = self.exact = ops.always_exact(array)

    @classmethod
    def zeros(
        cls, xp: Any, shape: tuple[int, int], dtype: Any, device: Any, reduce: Reduce | None
    ) -> Self:
        """Make the array; None for dtype or device is the library's default."""
        return cls(xp.zeros(shape, dtype=dtype, **_on(device)), reduce)

    def held(self) -> Array:
        """Return the gradients, oldest first: a copy."""
        if not self.slots:
            return self.array[:0, :]
        slots = self.xp.asarray(self.slots, **_on(self.device))
        return self.xp.take(self.array, slots, axis=0)

    def copy(self) -> ArrayRows:
        """Return the rows in use, such that later changes do not reach them."""
        copy = self.xp.asarray(self.array[: self.used, :], copy=True)
        return ArrayRows(copy, reduce=self.reduce)

    def free_slot(self) -> int:
        """Return the first row that holds no gradient."""
        held = set(self.slots)
        return next(slot for slot in range(self.array.shape[0]) if slot not in held)

    def write(self, i: int, row: Array) -> None:
        """Set row i, and use it from now on."""
        self.used = max(self.used, i + 1)
        self.array = ops.write(self.array, i, row)
        self.like = self.array

    def exchange(self, i: int, row: Array, norm2: float) -> Array:
        """Set row i to a finite row of square norm ``norm2`` and return the Gram's row of it."""
        if self.exchanges(row):
            return self.exchange_unseen(i, row)[0]
        with np.errstate(over="ignore", invalid="ignore"):
            products = self.project(row)
        if not bool(self.home.xp.all(self.home.xp.isfinite(products))):
            self.exact = True  # finite rows whose products overflow float32
            products = self.project(row)
        used = self.used
        self.write(i, row)
        of_gram = self.home.zeros(self.used)
        of_gram[:used] = products
        of_gram[i] = norm2
        return of_gram

    def exchanges(self, row: Array) -> bool:
        """Whether :meth:`exchange_unseen` takes a row; over ranks its sums would have to wait."""
        on_device = self.reduce is None and not self.home.is_numpy
        return on_device and ops.exchanges(self.array, row)

    def exchange_unseen(self, i: int, row: Array) -> tuple[Array, Array]:
        """Do as :meth:`exchange` on a device, without waiting; also return ‖row‖², shape (1,).

        Where that is not finite, the row that was there stays, and is exchanged for itself.
        """
        self.used = max(self.used, i + 1)
        return ops.exchange(self.array[: self.used, :], i, row, self.home)


def _on(device: Any) -> dict[str, Any]:
    return {} if device is None else {"device": device}
