"""Consecutive diagonal blocks, batch by batch, as stacks of small matrices."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array, array_namespace, promote, send, to_numpy
from mfac_core._operators.base import Indices, SymmetricOperator
from mfac_core._ops import blocks as ops
from mfac_core._rows.base import Rows
from mfac_core._rows.plan import Batch, gathered, scattered

Stacks = list[list[Array]]
"""One array (n, ·, ·) for each group of each batch."""


class BlockStacks(SymmetricOperator):
    """op = diag(M₁, M₂, …) of symmetric Mₖ, batch by batch, in float64.

    Parameters
    ----------
    plan : sequence of Batch
        The blocks, the first of which begins at column 0.
    stacks : list of list of array
        What is kept of them, in the home.
    like : array
        Any array of the gradients' library, dtype and device.
    """

    def __init__(self, plan: Sequence[Batch], stacks: Stacks, like: Array) -> None:
        self._plan = list(plan)
        self._stacks = stacks
        self._array = like
        self._home = ops.home(like)

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return (self._plan[-1].columns.stop,) * 2

    @property
    def dtype(self) -> Any:
        """The dtype of the gradients."""
        return self._array.dtype

    @property
    def device(self) -> Any:
        """The device of the gradients."""
        return self._array.device

    def _like(self) -> Array:
        return self._array

    @abstractmethod
    def _visit(self, work: Callable[[Batch, Sequence[Any]], Any]) -> list[Any]:
        """Return ``work`` of each batch, and of what each of its groups is known by."""

    @abstractmethod
    def _times(self, known: Any, x: Array) -> Array:
        """Return the products of a group's blocks with x, (n, size, k)."""

    def _apply(self, x: Any) -> Array:
        dtype = promote(x, self.dtype)

        def multiply(batch: Batch, known: Sequence[Any]) -> Array:
            return self._part_product(batch, known, x[batch.columns, ...], dtype)

        pieces = self._visit(multiply)
        return pieces[0] if len(pieces) == 1 else array_namespace(x).concat(pieces, axis=0)

    def _part_product(self, batch: Batch, known: Sequence[Any], x: Array, dtype: Any) -> Array:
        return send(self._batch_product(batch, known, self._home.receive(x)), x, dtype)

    def _batch_product(self, batch: Batch, known: Sequence[Any], x: Array) -> Array:
        """Return the product of a batch's blocks with their part of x, (width,) or (width, k)."""
        columns = self._home.xp.reshape(x, (x.shape[0], -1))
        products = [
            self._times(k, gathered(self._home, columns, size, positions))
            for (size, positions), k in zip(batch.groups, known, strict=True)
        ]
        result = scattered(self._home, batch, products)
        return self._home.xp.reshape(result, tuple(x.shape))

    def _quadratic(self, x: Any) -> Array:
        def quadratic(batch: Batch, known: Sequence[Any]) -> Array:
            part = self._home.receive(x[batch.columns, ...])
            product = self._batch_product(batch, known, part)
            return to_numpy(self._home.xp.sum(part * product, axis=0))

        return np.asarray(sum(self._visit(quadratic)))

    def _sample(self, n: int, rng: np.random.Generator) -> Array:
        return self._power(0.5)._apply(self._normal(n, rng))

    def _owners(self, indices: Indices) -> np.ndarray[Any, Any]:
        """Return (batch, group, block within it, position within that) of each index."""
        stops = np.array([batch.columns.stop for batch in self._plan])
        batches = np.searchsorted(stops, indices, side="right")
        owners = np.zeros((4, len(indices)), np.int64)
        for number in np.unique(batches):
            batch, here = self._plan[number], np.flatnonzero(batches == number)
            inside = indices[here] - batch.columns.start
            for group, (size, positions) in enumerate(batch.groups):
                if positions is None:
                    block, at = inside // size, inside % size
                    found = np.ones(len(here), np.bool_)
                else:
                    block = np.searchsorted(positions[:, 0], inside, side="right") - 1
                    at = inside - positions[np.maximum(block, 0), 0]
                    found = (block >= 0) & (at < size)
                owners[0, here], owners[1, here[found]] = number, group
                owners[2, here[found]], owners[3, here[found]] = block[found], at[found]
        return owners


@contextmanager
def finite(rows: Rows) -> Iterator[None]:
    """Say which rows are not finite, where a matrix of theirs is not.

    Parameters
    ----------
    rows : Rows
        The gradients.
    """
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            yield
    except ops.NotFinite:
        raise ValueError(check.nonfinite_message(rows.nonfinite(), rows.shape[0])) from None


def by_group(owners: np.ndarray[Any, Any], some: Indices) -> Iterator[tuple[int, int, Indices]]:
    """Yield batch, group and which of ``some`` indices they own.

    Parameters
    ----------
    owners : array, shape (4, k)
        As ``BlockStacks._owners`` returns them.
    some : array of int
        Which of the k.

    Yields
    ------
    tuple of int, int, array of int
        Batch, group, and those of ``some`` within them.
    """
    keys = owners[:2, some]
    for batch, group in np.unique(keys, axis=1).T:
        yield int(batch), int(group), some[(keys[0] == batch) & (keys[1] == group)]
