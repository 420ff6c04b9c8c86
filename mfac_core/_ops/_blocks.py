"""Cutting the d columns of the gradients into blocks."""

from __future__ import annotations

from collections.abc import Iterator

GRAM_COLUMNS = 4096
"""Columns a float32 partial Gram sums over: as fast as one product, and more accurate."""

WIDE_BYTES = 1 << 24
"""Size of the float64 copy of a block of columns."""

SHORTEST_GRAM_COLUMNS = 256
"""The same for few columns, which are cut all the same: float64 sums of sums in float32."""


def gram_columns(d: int, most: int) -> int:
    """Columns of a partial Gram: a sixteenth of all, as far as blocks of that size are fast."""
    return min(max(-(-d // 16), SHORTEST_GRAM_COLUMNS), GRAM_COLUMNS, most)


def wide_columns(m: int) -> int:
    """Columns whose float64 copy is a bounded buffer and still a worthwhile matrix product."""
    return max(64, WIDE_BYTES // (8 * max(m, 1)))


def column_slices(d: int, width: int, start: int = 0) -> Iterator[slice]:
    """Yield slices that cover ``range(start, d)``, each of ``width`` but perhaps the last."""
    for first in range(start, d, width):
        yield slice(first, min(first + width, d))
