"""Groups of weights that are removed together: many small dense problems, batched by size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

Labels: TypeAlias = np.ndarray[Any, Any]
"""NumPy, int64, one for each weight: the number of its group, or −1 for none."""


BATCH_BYTES = 1 << 24
"""Size of the float64 arrays that are worked on at a time."""


def by_size(labels: Labels, numbers: int) -> Iterator[tuple[Labels, Labels]]:
    """Yield groups of equal size: their labels (n,), and their members (n, k), increasing.

    As many at a time as bounded memory allows, for work on ``numbers`` for each member.
    """
    order = np.argsort(labels, kind="stable")
    order = order[np.searchsorted(labels, 0, sorter=order) :]
    groups, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    for k in np.unique(sizes):
        same = np.flatnonzero(sizes == k)
        batch = max(BATCH_BYTES // (8 * k * numbers), 1)
        for first in range(0, len(same), batch):
            some = same[first : first + batch]
            yield groups[some], order[starts[some][:, None] + np.arange(k)]


def half_squares(
    matrices: np.ndarray[Any, Any],
    x: np.ndarray[Any, Any],
    lowest: np.ndarray[Any, Any],
    highest: np.ndarray[Any, Any],
) -> np.ndarray[Any, Any]:
    """Return ½ xᵀM⁻¹x for (n, k, k) and (n, k), held to bounds that rounding may have left."""
    try:
        solved = np.linalg.solve(matrices, x[:, :, None])[:, :, 0]
    except np.linalg.LinAlgError:  # to rounding, at least one has no inverse
        solved = (np.linalg.pinv(matrices, hermitian=True) @ x[:, :, None])[:, :, 0]
    half = np.sum(x * solved, axis=1) / 2.0
    return np.asarray(np.fmax(np.fmin(half, highest), lowest))
