"""The gradients of a sliding window: rows that are written one at a time, and their age."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from mfac_core._arrays import Array, send
from mfac_core._ops import rows as ops
from mfac_core._rows.base import Reduce, Rows
from mfac_core._rows.storage import ArrayRows


class Ring(Rows):
    """Room for ``capacity`` rows, of which the first ``used`` have been written.

    What a row is when it is written is the ring's own affair; ``vector`` is what it stands for. An
    empty row among those in use is zero, and so adds nothing to any product.
    """

    stored: ClassVar[str]
    """The entry of a state that has the ring's library and dtype."""

    slots: list[int]
    """The rows that hold gradients, oldest first."""

    @property
    @abstractmethod
    def capacity(self) -> int:
        """How many rows there is room for."""

    @abstractmethod
    def vector(self, row: Any) -> Array:
        """Return the gradient that a row stands for, shape (d,)."""

    @abstractmethod
    def blank(self, i: int) -> Any:
        """Return a zero row to take the place of row i."""

    @abstractmethod
    def write(self, i: int, row: Any) -> None:
        """Set row i, and use it from now on."""

    @abstractmethod
    def held(self) -> Array:
        """Return the gradients, oldest first, as an array (len(slots), d): a copy."""

    @abstractmethod
    def emptied(self) -> Ring:
        """Return a ring in the same memory with no rows in use."""

    @abstractmethod
    def copy(self) -> Rows:
        """Return the rows in use, such that later changes do not reach them."""

    @abstractmethod
    def shapes(self, used: int) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the arrays that a state with this many rows has."""

    @abstractmethod
    def state(self) -> dict[str, Array]:
        """Return copies of the rows in use."""

    @abstractmethod
    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a state of the right forms."""

    def free_slot(self) -> int:
        """Return the first row that holds no gradient."""
        held = set(self.slots)
        return next(slot for slot in range(self.capacity) if slot not in held)

    def row_of_gram(self, i: int, products: Array, norm2: float) -> Array:
        """Return the row that the Gram has once a row of these products and square is row i."""
        of_gram = self.home.zeros(max(self.used, i + 1))
        of_gram[: self.used] = products
        of_gram[i] = norm2
        return of_gram

    def exchanges(self, row: Any) -> bool:
        """Whether :meth:`exchange_unseen` takes a row."""
        return False

    def exchange_unseen(self, i: int, row: Any) -> tuple[Array, Array]:
        """Set row i on a device, without waiting; return the Gram's row of it, and ‖row‖², (1,).

        Where that is not finite, the row that was there stays, and is exchanged for itself.
        """
        raise NotImplementedError


class ArrayRing(ArrayRows, Ring):
    """One array, none of its rows in use yet.

    Parameters
    ----------
    array : array, shape (m, d)
        Taken over, and written in place where its library can.
    reduce : callable, optional
        Sum over ranks.
    """

    stored = "gradients"

    def __init__(self, array: Array, reduce: Reduce | None = None) -> None:
        super().__init__(array, used=0, reduce=reduce)
        self.slots = []
        self.float64 = self.always_float64 = ops.always_float64(array)

    @property
    def capacity(self) -> int:
        """See :class:`Ring`."""
        return int(self.array.shape[0])

    def vector(self, row: Array) -> Array:
        """See :class:`Ring`."""
        return row

    def blank(self, i: int) -> Array:
        """See :class:`Ring`."""
        return self.array[i, :] * 0

    def row(self, i: int, dtype: Any) -> Array:
        """Return row i as ``dtype``."""
        return self.xp.astype(self.array[i, :], dtype)

    def write(self, i: int, row: Array) -> None:
        """See :class:`Ring`."""
        self.used = max(self.used, i + 1)
        self.array = ops.write(self.array, i, row)
        self.like = self.array

    def held(self) -> Array:
        """See :class:`Ring`."""
        if not self.slots:
            return self.array[:0, :]
        slots = self.xp.asarray(self.slots, device=self.device)
        return self.xp.take(self.array, slots, axis=0)

    def emptied(self) -> ArrayRing:
        """See :class:`Ring`."""
        return ArrayRing(self.array, self.reduce)

    def copy(self) -> ArrayRows:
        """See :class:`Ring`."""
        return ArrayRows(self.state()[self.stored], reduce=self.reduce)

    def shapes(self, used: int) -> dict[str, tuple[int, ...]]:
        """See :class:`Ring`."""
        return {self.stored: (used, self.shape[1])}

    def state(self) -> dict[str, Array]:
        """See :class:`Ring`."""
        return {self.stored: self.xp.asarray(self.array[: self.used, :], copy=True)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See :class:`Ring`."""
        gradients = state[self.stored]
        for i in range(gradients.shape[0]):
            self.write(i, send(gradients[i, :], self.array, self.dtype))

    def exchanges(self, row: Array) -> bool:
        """See :class:`Ring`; over ranks its sums would have to wait."""
        on_device = self.reduce is None and not self.home.is_numpy
        return on_device and ops.exchanges(self.array, row)

    def exchange_unseen(self, i: int, row: Array) -> tuple[Array, Array]:
        """See :class:`Ring`."""
        self.used = max(self.used, i + 1)
        return ops.exchange(self.array[: self.used, :], i, row, self.home)
