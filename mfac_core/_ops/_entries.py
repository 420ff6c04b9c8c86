"""Rows of which each block of columns holds some entries, by index and value."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from mfac_core._arrays import Array, array_namespace, device, is_jax_array, to_numpy
from mfac_core._ops._blocks import column_slices, wide_columns

PASS_ENTRIES = 1 << 19
"""Entries multiplied at a time, so that the part of a vector they point into stays in cache."""


@dataclass(frozen=True)
class Entries:
    """G, (m, d), by the entries its rows hold.

    The d columns are cut into n blocks of ``width``, but for the last, which may be shorter. A row
    has k entries in each block, at different indices relative to the block's start. Entries past
    the end of the last block are zero.
    """

    indices: Array
    """int16, (n, capacity, k)."""

    values: Array
    """(n, capacity, k)."""

    m: int
    """How many of the rows there is room for are in use."""

    d: int
    width: int

    @property
    def rows(self) -> int:
        """How many rows are read: those in use, but for JAX, which compiles for each number anew.

        What the others hold is of no account to the caller.
        """
        return int(self.indices.shape[1]) if is_jax_array(self.indices) else self.m

    def dense_blocks(self) -> Iterator[tuple[slice, slice]]:
        """Yield as many blocks as fit a bounded dense buffer, with the columns they cover."""
        count = wide_columns(self.rows) // self.width
        return _slices(self.indices.shape[0], count, self.d, self.width)

    def within(self, blocks: slice) -> tuple[Array, Array]:
        """Return the indices and values of the rows that are read, within some blocks."""
        return self.indices[blocks, : self.rows, :], self.values[blocks, : self.rows, :]

    def on_host(self) -> Entries:
        """Return the same entries in NumPy's arrays."""
        indices, values = map(to_numpy, (self.indices, self.values))
        return dataclasses.replace(self, indices=indices, values=values)


def passes(shape: tuple[int, ...], d: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of entries of this shape, as many as are multiplied at a time; and columns."""
    n, m, k = shape
    return _slices(n, PASS_ENTRIES // max(m * k, 1), d, width)


def _slices(n: int, count: int, d: int, width: int) -> Iterator[tuple[slice, slice]]:
    for blocks in column_slices(n, max(count, 1)):
        yield blocks, slice(blocks.start * width, min(blocks.stop * width, d))


def flat(indices: Array, width: int) -> Array:
    """Return indices relative to their blocks, (blocks, ...), as relative to the first block."""
    xp, n = array_namespace(indices), indices.shape[0]
    integer = xp.int32 if n * width < 2**31 else xp.int64
    starts = xp.arange(n, dtype=integer, device=device(indices)) * width
    starts = xp.reshape(starts, (n, *[1] * (indices.ndim - 1)))
    return xp.reshape(indices + starts, (-1,))
