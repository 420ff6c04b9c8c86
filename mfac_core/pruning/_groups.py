"""Groups of weights that are removed together: many small dense problems, batched by size."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from array_api_compat import is_torch_namespace

from mfac_core._arrays import Array, Home, to_numpy

Labels: TypeAlias = np.ndarray[Any, Any]
"""NumPy, integer, one for each weight: the number of its group, or −1 for none."""

Rises: TypeAlias = tuple[Labels, Array]
"""Groups, and what the loss rises by for the part of them that was looked at."""

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


def form(home: Home, matrices: Array, x: Array) -> Array:
    """Return xᵀM⁻¹x for (n, k, k) and (n, k)."""
    if matrices.shape[1] == 1:
        return x[:, 0] * x[:, 0] / matrices[:, 0, 0]
    return home.xp.sum(x * _solved(home, matrices, x), axis=1)


def half(home: Home, forms: Array, lowest: Array, highest: Array) -> Array:
    """Return half of what rounding may have left its bounds, held to them."""
    xp = home.xp
    forms = xp.where(xp.isfinite(forms), forms, highest)
    forms = xp.where(forms < highest, forms, highest)
    return xp.where(forms > lowest, forms, lowest) / 2.0


def _solved(home: Home, matrices: Array, x: Array) -> Array:
    xp = home.xp
    try:
        return xp.linalg.solve(matrices, x[..., None])[..., 0]
    except Exception as error:  # to rounding, at least one has no inverse
        if "LinAlgError" not in type(error).__name__:
            raise
    values, vectors = xp.linalg.eigh(matrices)
    largest = xp.max(xp.abs(values), axis=-1, keepdims=True)
    regular = xp.abs(values) > 1e-15 * matrices.shape[1] * largest
    inverse = xp.where(regular, 1.0 / xp.where(regular, values, 1.0), 0.0)
    turned = xp.sum(vectors * x[..., None], axis=1) * inverse
    return xp.sum(vectors * turned[:, None, :], axis=-1)


def add_rises(home: Home, total: Array, rises: Rises) -> None:
    """Add to each group's number what its parts rise by."""
    groups, values = rises
    if home.is_numpy:
        np.add.at(total, groups, values)
    elif is_torch_namespace(home.xp):
        torch = sys.modules["torch"]
        total.index_add_(0, torch.asarray(groups, device=total.device), values)
    else:
        sums = np.bincount(groups, to_numpy(values), minlength=int(total.shape[0]))
        total += home.receive(sums)
