"""Cutting d parameters into diagonal blocks, and the blocks into batches that are read at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mfac_core._arrays import Array, Home
from mfac_core._ops import blocks as ops
from mfac_core._rows.base import Rows, joined

WIDE_BYTES = 1 << 24
"""Size of a block's gradients in float64 from which on it is worked through by itself."""

Positions = np.ndarray[Any, Any]
"""NumPy, int64, (blocks, B): where the parameters of each block are within their batch."""


@dataclass(frozen=True)
class Batch:
    """Consecutive blocks that are worked on at a time.

    Attributes
    ----------
    columns : slice
        The parameters they cover.
    groups : list of (int, array or None)
        Each length B that occurs, with the positions of its blocks; None where they are all.
    """

    columns: slice
    groups: list[tuple[int, Positions | None]]


def batches(sizes: Sequence[int], m: int, limit: int, start: int = 0) -> list[Batch]:
    """Cut blocks of these lengths into batches of about ``limit`` bytes in float64.

    That is the size of their gradients, (m, width). Blocks of one length are together, whatever
    lies between them.
    """
    lengths = np.asarray(sizes, np.int64)
    stops = np.cumsum(lengths)
    number = np.cumsum(8 * lengths * m) // limit
    cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(lengths)]
    result = []
    for first, last in pairwise(cuts):
        begin = int(stops[first] - lengths[first])
        inside = lengths[first:last]
        starts = stops[first:last] - inside - begin
        columns = slice(start + begin, start + int(stops[last - 1]))
        if (inside == inside[0]).all():
            result.append(Batch(columns, [(int(inside[0]), None)]))
            continue
        groups = [
            (int(size), starts[inside == size][:, None] + np.arange(size))
            for size in np.unique(inside)
        ]
        result.append(Batch(columns, groups))
    return result


def read(rows: Rows, plan: Sequence[Batch], where: Home) -> Iterator[tuple[Batch, Array]]:
    """Yield batches in order with their columns of G, (m, width), as they are stored.

    One pass over the gradients, whatever their parts and wherever they end.
    """
    first = plan[0].columns.start
    parts = iter((rows.stretch(first, rows.shape[1]) if first else rows).parts())
    held: list[tuple[int, Array]] = []  # with the column each begins at
    reached = first
    for batch in plan:
        start, stop = batch.columns.start, batch.columns.stop
        while reached < stop:
            columns, part = next(parts)
            begin = first + (columns.start or 0)
            held.append((begin, ops.view(where, part)))
            reached = begin + int(part.shape[1])
        held = [(at, part) for at, part in held if at + int(part.shape[1]) > start]
        pieces = [
            part[: rows.used, max(start - at, 0) : min(stop - at, int(part.shape[1]))]
            for at, part in held
            if at < stop
        ]
        yield batch, pieces[0] if len(pieces) == 1 else joined([p.T for p in pieces]).T
    for _ in parts:  # lets a progress bar end
        pass


def gathered(home: Home, x: Array, size: int, positions: Positions | None) -> Array:
    """Return the rows of x (width, k) that belong to the blocks of a group, (n, size, k)."""
    if positions is not None:
        x = home.xp.take(x, indices(home, positions.ravel()), axis=0)
    return home.xp.reshape(x, (-1, size, *x.shape[1:]))


def scattered(home: Home, batch: Batch, pieces: Sequence[Array]) -> Array:
    """Return pieces (n, size, …), of one a group, in the order of the parameters."""
    flat = [home.xp.reshape(piece, (-1, *piece.shape[2:])) for piece in pieces]
    if batch.groups[0][1] is None:
        return flat[0]
    places = [positions.ravel() for _, positions in batch.groups if positions is not None]
    order = np.argsort(np.concatenate(places))
    return home.xp.take(home.xp.concat(flat, axis=0), indices(home, order), axis=0)


def indices(home: Home, i: np.ndarray[Any, Any]) -> Array:
    """Bring indices to the home."""
    return i if home.is_numpy else home.xp.asarray(i, device=home.device)
