"""Queries in whatever form they come: their products with the gradients, some after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array, is_array_api_obj
from mfac_core._ops.rows import column_slices
from mfac_core._rows.base import Columns, Rows, widened
from mfac_core._rows.given import GivenRows, is_given

QUERY_BYTES = 1 << 27
"""Size of the float64 gradients of the queries, and of their scores, that are worked on at once."""


def products_of(queries: Any, rows: Rows) -> Iterator[Array]:
    """Yield the products of all rows with some queries after the other, (m, k) in their home."""
    if is_given(queries) and isinstance(rows, GivenRows):
        others = GivenRows(queries)
        if others.shape[1] != rows.shape[1]:
            msg = f"queries must have shape (q, {rows.shape[1]}), got {others.shape}"
            raise ValueError(msg)
        products = rows.cross(others)
        if products is not None:
            yield products
            return
    for columns in _chunks(queries, rows):
        # In float64 where that does not mean another model: queries are few beside the Gram.
        yield rows.project(columns if isinstance(rows, GivenRows) else widened(columns))


def _chunks(queries: Any, rows: Rows) -> Iterator[Columns]:
    """Yield some queries after the other, as columns (d, k)."""
    if isinstance(queries, Iterator):
        for array in queries:
            yield from _chunks(array, rows)
        return
    if getattr(queries, "ndim", 0) == 1:
        queries = queries[None, :]
    # As many on each rank: no number of this rank's own.
    height = max(QUERY_BYTES // (8 * max(rows.total_columns, rows.shape[0])), 1)
    if is_given(queries):
        for columns in _of_rows(GivenRows(queries), height):
            yield rows.columns_argument(columns, "queries.T", (2,))
        return
    parts = list(queries) if isinstance(queries, (list, tuple)) else [queries]
    for i, part in enumerate(parts):
        shape = tuple(getattr(part, "shape", ()))
        if len(shape) != 2 or shape[0] != parts[0].shape[0]:
            name = f"queries[{i}]" if len(parts) > 1 else "queries"
            msg = f"{name} must have shape (q, d), a gradient a row, got {shape or type(part)}"
            raise ValueError(msg)
    for some in column_slices(int(parts[0].shape[0]), height):
        columns = [_transposed(part[some, :]) for part in parts]
        pieces = columns if isinstance(queries, (list, tuple)) else columns[0]
        yield rows.columns_argument(pieces, "queries.T", (2,))


def _of_rows(queries: GivenRows, height: int) -> Iterator[Array]:
    """Yield rows that are only functions, by a product with unit vectors each."""
    for some in column_slices(queries.shape[0], height):
        units = queries.home.receive(np.eye(queries.shape[0])[:, some])
        yield queries.combine(units, None, 1.0, dtype=queries.like.dtype)


def _transposed(block: Any) -> Array:
    """Return rows as columns."""
    array = block if is_array_api_obj(block) else np.asarray(block)
    return check.array_argument(array, "queries").T
