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
from mfac_core._dual import Dual
from mfac_core._operators.primal import fisher_blocks
from mfac_core._operators.static import InverseFisher
from mfac_core._rows.base import Rows
from mfac_core._rows.selected import SelectedRows
from mfac_core.pruning._groups import BATCH_BYTES, Labels, by_size, half_squares

Vector: TypeAlias = np.ndarray[Any, Any]
"""NumPy, float64."""

Mask: TypeAlias = np.ndarray[Any, Any]
"""NumPy, bool: True where a weight is kept."""


LEAST_LEFT = 1 / 16
"""Part of a gradient's square norm that must be left of it for its Gram to be used on."""


class Stretch(Protocol):
    """What a stretch of parameters is asked."""

    def restrict(self, kept: Mask) -> None:
        """Let F_RR be that of the kept weights from now on."""

    def diagonal(self) -> Vector:
        """Return diag F_RR⁻¹; infinite at removed weights."""

    def rises(self, weights: Vector, labels: Labels, count: int) -> Vector:
        """Return ½ w_Qᵀ([F_RR⁻¹]_QQ)⁻¹w_Q for each of ``count`` groups Q of kept weights."""

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
        self._indices = np.arange(0)
        self._inverse: InverseFisher
        self._norms: Any = None

    def restrict(self, kept: Mask) -> None:
        """See :class:`Stretch`."""
        gram = self._smaller_gram(kept) if len(self._indices) else None
        self._indices = np.flatnonzero(kept)
        self._kept = kept
        if len(self._indices):
            selected = SelectedRows(self._rows, self._indices)
            self._inverse = InverseFisher._of_rows(selected, self._damping, gram)
            if gram is None:
                self._norms = self._square_norms(self._inverse._dual.gram)

    def _smaller_gram(self, kept: Mask) -> Any:
        """Return the Gram of fewer weights from that of more, or None where that does not do.

        The rounding errors of a Gram stay in it when parts of it are taken off. They are small
        beside what is left as long as no row has lost most of its length.
        """
        # Products that had to be exact once would have to be again.
        self._rows.exact = self._inverse._rows.exact
        removed = self._indices[~kept[self._indices]]
        left = len(self._indices) - len(removed)
        if self._rows.rounds or left != np.count_nonzero(kept) or len(removed) >= left:
            return None
        gram = self._inverse._dual.gram - SelectedRows(self._rows, removed).gram()
        lost = self._square_norms(gram) < LEAST_LEFT * self._norms
        return None if bool(self._rows.home.xp.any(lost)) else gram

    def _square_norms(self, gram: Any) -> Any:
        """Return a copy of the diagonal."""
        xp = self._rows.home.xp
        return xp.asarray(xp.linalg.diagonal(gram), copy=True)

    def diagonal(self) -> Vector:
        """See :class:`Stretch`."""
        diagonal = np.full(len(self._kept), np.inf)
        if len(self._indices):
            diagonal[self._indices] = to_numpy(self._inverse._diagonal())
        return diagonal

    def rises(self, weights: Vector, labels: Labels, count: int) -> Vector:
        """See :class:`Stretch`.

        r·m² multiplications for r weights in groups, and the lesser of k²·m and m³ a group of k.
        """
        rises = np.zeros(count)
        if not len(self._indices):
            return rises
        if self._inverse._rows.rounds:  # what follows subtracts from one
            self._inverse._digits.go_to_float64()
        m = self._rows.shape[0]
        for groups, members in by_size(labels, m):
            if 2 * members.shape[1] > m:
                rises[groups] = [self._rise_of_many(weights, group) for group in members]
            else:
                rises[groups] = self._rises_of_few(weights, members)
        return rises

    def _rises_of_few(self, weights: Vector, members: Labels) -> Vector:
        """Return the rises of groups of k weights from [F_RR⁻¹]_QQ = (I − W_QᵀW_Q)/λ, W = L⁻¹G."""
        k = members.shape[1]
        columns = self._rows.take(members.ravel())
        whitened = to_numpy(self._inverse._dual.whiten(columns, self._rows.home))
        split = whitened.reshape(len(whitened), -1, k).transpose(1, 2, 0)
        squares = (np.eye(k) - split @ split.transpose(0, 2, 1)) / self._damping
        values = weights[members]
        sums = np.sum(to_numpy(columns).reshape(len(whitened), -1, k) * values, axis=2)
        sharp = np.sum(sums * sums, axis=0) / len(whitened)
        flat = self._damping * np.sum(values * values, axis=1)
        return half_squares(squares, values, flat / 2.0, (flat + sharp) / 2.0)

    def _rise_of_many(self, weights: Vector, members: Labels) -> float:
        """Return ½ λ(‖w_Q‖² + zᵀB⁻¹z), z = G_Q w_Q, with B = A_R − G_Q G_Qᵀ that of the rest."""
        home, dual = self._rows.home, self._inverse._dual
        first, last = int(members[0]), int(members[-1]) + 1
        group = SelectedRows(self._rows.stretch(first, last), members - first)
        gram, z, values = dual.gram, home.zeros(len(dual)), weights[members]
        done = 0
        for _, columns in group.wide_blocks():
            block = home.receive(columns)
            gram = gram - block @ block.T
            z = z + block @ home.receive(values[done : done + block.shape[1]])
            done += block.shape[1]
        rest = Dual(gram, dual.shift, home)
        return self._damping / 2.0 * (float(values @ values) + float(z @ rest.solve(z)))

    def apply(self, x: Vector) -> Vector:
        """See :class:`Stretch`."""
        y = np.zeros(len(x))
        if len(self._indices):
            piece = send(x[self._indices], self._rows.like, self._rows.dtype)
            y[self._indices] = to_numpy(self._inverse._apply(piece))
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
        self._damping = damping
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

    def rises(self, weights: Vector, labels: Labels, count: int) -> Vector:
        """See :class:`Stretch`; a group is as many independent groups as it has weights in blocks.

        O(k³) for each of these, of k weights.
        """
        size = self._fisher.shape[1]
        block = np.arange(len(labels)) // size
        rises = np.zeros(count)
        for pieces, members in by_size(np.where(labels < 0, -1, block * count + labels), size):
            at, position, values = members[:, :1] // size, members % size, weights[members]
            where = at[:, :, None], position[:, :, None], position[:, None, :]
            flat = self._damping * np.sum(values * values, axis=1)
            fisher = np.einsum("gi,gij,gj->g", values, self._fisher[where], values)
            own = half_squares(self._inverse[where], values, flat / 2.0, fisher / 2.0)
            np.add.at(rises, pieces % count, own)
        return rises

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
        self._kept = kept
        for stretch, part in self._parts(kept):
            stretch.restrict(part)

    def diagonal(self) -> Vector:
        """See :class:`Stretch`."""
        return np.concatenate([stretch.diagonal() for stretch in self._stretches])

    def rises(self, weights: Vector, labels: Labels, count: int) -> Vector:
        """See :class:`Stretch`; stretches are independent, and their rises add up."""
        total = np.zeros(count)
        labels = np.where(self._kept, labels, -1)
        for (stretch, part), (_, own) in zip(
            self._parts(weights), self._parts(labels), strict=True
        ):
            total += stretch.rises(part, own, count)
        return total

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
