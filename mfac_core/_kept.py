"""The Fisher matrix of the weights that are kept, F_RR, for pruning.

A *stretch* of consecutive parameters is one full Fisher matrix or many short diagonal blocks of
it. Both offer the same acts on NumPy float64 vectors of the stretch's length, where removed weights
are simply zero. With R the kept and S the removed weights, the best change of the kept ones is
δ_R = F_RR⁻¹ F_RS w_S: for the full Fisher δ_R = G_Rᵀ A_R⁻¹ G_S w_S with A_R = mλI + G_R G_Rᵀ.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Protocol, TypeAlias

import numpy as np

from mfac_core._arrays import send, to_numpy
from mfac_core._primal import fisher_blocks
from mfac_core._rows import Rows
from mfac_core._selected import SelectedRows
from mfac_core.static import InverseFisher

Vector: TypeAlias = np.ndarray[Any, Any]
"""NumPy, float64."""

Mask: TypeAlias = np.ndarray[Any, Any]
"""NumPy, bool: True where a weight is kept."""

BATCH_BYTES = 1 << 24
"""Size of the small float64 matrices that are worked on at a time."""


class Stretch(Protocol):
    """What a stretch of parameters is asked."""

    def restrict(self, kept: Mask) -> None:
        """Let F_RR be that of the kept weights from now on."""

    def diagonal(self) -> Vector:
        """Return diag F_RR⁻¹; infinite at removed weights."""

    def squares(self, groups: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return [F_RR⁻¹]_QQ, (groups, k, k), for groups Q of k weights; zero at removed ones."""

    def apply(self, x: Vector) -> Vector:
        """Return F_RR⁻¹x_R."""

    def joint(self, weights: Vector) -> Vector:
        """Return the best weights: w_R + F_RR⁻¹F_RS w_S, and zeros."""

    def quadratic(self, x: Vector) -> float:
        """Return xᵀFx."""


class FullStretch:
    """One full Fisher matrix; O(m²) per kept weight to restrict, and for the diagonal."""

    def __init__(self, rows: Rows, damping: float) -> None:
        self._rows = rows
        self._damping = damping

    def restrict(self, kept: Mask) -> None:
        """See :class:`Stretch`."""
        self._indices = np.flatnonzero(kept)
        self._kept = kept
        if len(self._indices):
            selected = SelectedRows(self._rows, self._indices)
            self._inverse = InverseFisher._of_rows(selected, self._damping)

    def diagonal(self) -> Vector:
        """See :class:`Stretch`."""
        diagonal = np.full(len(self._kept), np.inf)
        if len(self._indices):
            diagonal[self._indices] = to_numpy(self._inverse._diagonal())
        return diagonal

    def squares(self, groups: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """See :class:`Stretch`."""
        count, k = groups.shape
        result = np.empty((count, k, k))
        home, dual = self._rows.home, self._inverse._dual
        batch = max(BATCH_BYTES // (8 * k * self._rows.shape[0]), 1)
        for first in range(0, count, batch):
            some = groups[first : first + batch]
            whitened = to_numpy(dual.whiten(self._rows.take(some.ravel()), home))
            split = whitened.reshape(len(whitened), -1, k).transpose(1, 2, 0)
            inner = split @ split.transpose(0, 2, 1)
            result[first : first + batch] = (np.eye(k) - inner) / self._damping
        both = self._kept[groups][:, :, None] & self._kept[groups][:, None, :]
        return np.where(both, result, 0.0)

    def apply(self, x: Vector) -> Vector:
        """See :class:`Stretch`."""
        y = np.zeros(len(x))
        if len(self._indices):
            piece = send(x[self._indices], self._rows.like, self._rows.dtype)
            y[self._indices] = to_numpy(self._inverse._apply(piece, 0))
        return y

    def joint(self, weights: Vector) -> Vector:
        """See :class:`Stretch`."""
        best = np.where(self._kept, weights, 0.0)
        if len(self._indices):
            z = self._project(np.where(self._kept, 0.0, weights))
            best[self._indices] += to_numpy(self._inverse._spread(z))
        return best

    def quadratic(self, x: Vector) -> float:
        """See :class:`Stretch`."""
        b = to_numpy(self._project(x))
        return float(self._damping * (x @ x) + b @ b / self._rows.shape[0])

    def _project(self, x: Vector) -> Any:
        return self._rows.project(send(x, self._rows.like, self._rows.dtype))


class BlockStretch:
    """Diagonal blocks of B parameters, shorter than the rows are many: d·B numbers of float64."""

    def __init__(self, rows: Rows, start: int, size: int, blocks: int, damping: float) -> None:
        self._fisher = np.empty((blocks, size, size))
        for batch, fisher in fisher_blocks(rows, start, size, blocks, damping):
            self._fisher[batch] = to_numpy(fisher)

    def restrict(self, kept: Mask) -> None:
        """See :class:`Stretch`."""
        blocks, size, _ = self._fisher.shape
        self._kept = kept.reshape(blocks, size)
        self._inverse = np.empty_like(self._fisher)
        step = max(BATCH_BYTES // (8 * size * size), 1)
        for first in range(0, blocks, step):
            some = self._kept[first : first + step]
            both = some[:, :, None] & some[:, None, :]
            # Ones on the diagonal for the removed keep the matrix regular.
            matrix = np.where(both, self._fisher[first : first + step], np.eye(size))
            self._inverse[first : first + step] = np.where(both, np.linalg.inv(matrix), 0.0)

    def diagonal(self) -> Vector:
        """See :class:`Stretch`."""
        diagonal = np.diagonal(self._inverse, axis1=1, axis2=2)
        return np.where(self._kept, diagonal, np.inf).ravel()

    def squares(self, groups: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """See :class:`Stretch`."""
        size = self._fisher.shape[1]
        block, position = groups // size, groups % size
        same = block[:, :, None] == block[:, None, :]
        elements = self._inverse[block[:, :, None], position[:, :, None], position[:, None, :]]
        return np.where(same, elements, 0.0)

    def apply(self, x: Vector) -> Vector:
        """See :class:`Stretch`."""
        return (self._inverse @ x.reshape(*self._kept.shape, 1)).ravel()

    def joint(self, weights: Vector) -> Vector:
        """See :class:`Stretch`."""
        kept = self._kept.ravel()
        removed = np.where(kept, 0.0, weights).reshape(*self._kept.shape, 1)
        return np.where(kept, weights, 0.0) + (self._inverse @ (self._fisher @ removed)).ravel()

    def quadratic(self, x: Vector) -> float:
        """See :class:`Stretch`."""
        columns = x.reshape(*self._kept.shape, 1)
        return float(np.sum(columns * (self._fisher @ columns)))


class KeptFisher:
    """The Fisher matrix of the kept weights, over all stretches of the parameters."""

    def __init__(self, rows: Rows, damping: float, sizes: Sequence[int] | None) -> None:
        self._stretches: list[Stretch] = []
        self._bounds = [0]
        start = 0
        for size, group in groupby([rows.shape[1]] if sizes is None else sizes):
            blocks = len(list(group))
            if size < rows.shape[0] and sizes is not None:
                self._add(BlockStretch(rows, start, size, blocks, damping), size * blocks)
            else:
                for first in range(start, start + size * blocks, size):
                    whole = rows if size == rows.shape[1] else rows.stretch(first, first + size)
                    self._add(FullStretch(whole, damping), size)
            start += size * blocks

    def _add(self, stretch: Stretch, length: int) -> None:
        self._stretches.append(stretch)
        self._bounds.append(self._bounds[-1] + length)

    def restrict(self, kept: Mask) -> None:
        """See :class:`Stretch`."""
        for stretch, part in self._parts(kept):
            stretch.restrict(part)

    def diagonal(self) -> Vector:
        """See :class:`Stretch`."""
        return np.concatenate([stretch.diagonal() for stretch in self._stretches])

    def squares(self, groups: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """See :class:`Stretch`; a group may lie across stretches, which are independent."""
        count, k = groups.shape
        if len(self._stretches) == 1:
            return self._stretches[0].squares(groups)
        result = np.zeros((count, k, k))
        owner = np.searchsorted(self._bounds, groups, side="right") - 1
        for i in np.unique(owner):
            whole = np.flatnonzero((owner == i).all(axis=1))
            if len(whole):
                local = groups[whole] - self._bounds[i]
                result[whole] = self._stretches[i].squares(local)
            for g in np.flatnonzero((owner == i).any(axis=1) & ~(owner == i).all(axis=1)):
                here = np.flatnonzero(owner[g] == i)
                local = (groups[g, here] - self._bounds[i])[None]
                result[g][np.ix_(here, here)] = self._stretches[i].squares(local)[0]
        return result

    def apply(self, x: Vector) -> Vector:
        """See :class:`Stretch`."""
        return np.concatenate([stretch.apply(part) for stretch, part in self._parts(x)])

    def joint(self, weights: Vector) -> Vector:
        """See :class:`Stretch`."""
        return np.concatenate([stretch.joint(part) for stretch, part in self._parts(weights)])

    def quadratic(self, x: Vector) -> float:
        """See :class:`Stretch`."""
        return sum(stretch.quadratic(part) for stretch, part in self._parts(x))

    def _parts(self, x: Any) -> list[tuple[Stretch, Any]]:
        parts = np.split(x, self._bounds[1:-1])
        return list(zip(self._stretches, parts, strict=True))
