"""The kept weights of one large matrix F: the whole of it, or one long block."""

from __future__ import annotations

from typing import Any

import numpy as np

from mfac_core._arrays import Array, Home, send
from mfac_core._dual import Dual
from mfac_core._operators.primal import fisher_blocks
from mfac_core._operators.stacks import finite
from mfac_core._operators.static import InverseFisher
from mfac_core._ops import blocks as ops
from mfac_core._rows.base import Rows
from mfac_core._rows.masked import MaskedRows
from mfac_core._rows.plan import indices
from mfac_core._rows.selected import SelectedRows
from mfac_core.pruning._groups import Labels, Rises, by_size, half_squares
from mfac_core.pruning._inverses import Primal

LEAST_LEFT = 1 / 16
"""Part of a gradient's square norm that must be left of it for its Gram to be used on."""


class FullPart:
    """One full Fisher matrix; O(m²) per kept weight to restrict, and for the diagonal.

    Acts on float64 vectors of its length in the home of blocks. On the host it works on the
    columns that are kept alone; on a device, from where their indices would have to come, on all
    of them with zeros for the removed.
    """

    def __init__(self, rows: Rows, damping: float) -> None:
        self._rows, self._damping = rows, damping
        self._home: Home = ops.home(rows.like)
        self.length = rows.shape[1]
        self._kept: Array = None
        self._indices = np.arange(0)
        self._norms: Any = None
        self._small: Primal | None = None
        self._inverse: InverseFisher | None = None

    doubtful = False
    """Its inverse warns by itself."""

    def restrict(self, kept: Array) -> None:
        """See :class:`KeptFisher`."""
        if not self._home.is_numpy:
            self._kept = kept
            selected: Rows = MaskedRows(self._rows, kept)
            self._inverse = InverseFisher._of_rows(selected, self._damping)
            return
        gram = None if self._inverse is None else self._smaller_gram(self._inverse, kept)
        self._kept, self._indices = kept, np.flatnonzero(kept)
        self._inverse = self._small = None
        m = self._rows.shape[0]
        if self._rows.reduce is None and len(self._indices) <= m:
            self._invert_primal()
            return
        if len(self._indices) or self._rows.reduce is not None:
            selected = SelectedRows(self._rows, self._indices)
            self._inverse = InverseFisher._of_rows(selected, self._damping, gram)
            if gram is None:
                self._norms = self._square_norms(self._inverse._dual.gram)

    def _invert_primal(self) -> None:
        """Invert the matrix of no more weights than there are rows."""
        if not len(self._indices):
            return
        g = ops.received(self._home, self._rows.take(self._indices))
        with finite(self._rows):
            self._small = Primal(
                self._home, fisher_blocks(self._home, g[None], self._damping), self._damping
            )
        self.doubtful = self._small.doubtful

    def _smaller_gram(self, inverse: InverseFisher, kept: Array) -> Any:
        """Return the Gram of fewer weights from that of more, or None where that does not do.

        The rounding errors of a Gram stay in it when parts of it are taken off. They are small
        beside what is left as long as no row has lost most of its length.
        """
        # Products that had to be exact once would have to be again.
        self._rows.exact = inverse._rows.exact
        removed = self._indices[~kept[self._indices]]
        left = len(self._indices) - len(removed)
        grown = left != np.count_nonzero(kept)
        if self._rows.rounds or self._rows.anywhere(grown or len(removed) >= left):
            return None
        gram = inverse._dual.gram - SelectedRows(self._rows, removed).gram()
        lost = self._square_norms(gram) < LEAST_LEFT * self._norms
        return None if bool(self._rows.home.xp.any(lost)) else gram

    def _square_norms(self, gram: Any) -> Any:
        """Return a copy of the diagonal."""
        xp = self._rows.home.xp
        return xp.asarray(xp.linalg.diagonal(gram), copy=True)

    def _worked_on(self, x: Array) -> Array:
        """Return what of x belongs to the columns that are worked on, zero where not kept."""
        if self._home.is_numpy:
            return x[self._indices]
        return self._home.xp.where(self._kept, x, 0.0)

    def _placed(self, x: Array, other: float) -> Array:
        """Return it in its place, with ``other`` where not kept."""
        if not self._home.is_numpy:
            return self._home.xp.where(self._kept, x, other)
        wide = np.full(len(self._kept), other)
        wide[self._indices] = x
        return wide

    def diagonal(self) -> Array:
        """See :class:`Part`."""
        if self._small is not None:
            return self._placed(self._small.diagonal()[0], np.inf)
        if self._inverse is None:
            return self._placed(np.zeros(0), np.inf)
        diagonal = self._inverse._ask(self._inverse._diagonal)
        return self._placed(ops.received(self._home, diagonal), np.inf)

    def apply(self, x: Array) -> Array:
        """See :class:`Part`."""
        x = self._worked_on(x)
        if self._small is not None:
            return self._placed(self._small.apply(x[None])[0], 0.0)
        if self._inverse is None:
            return self._placed(x, 0.0)
        product = self._inverse._ask(self._inverse._apply, self._beside(x))
        return self._placed(ops.received(self._home, product), 0.0)

    def joint(self, weights: Array) -> Array:
        """See :class:`Part`."""
        xp = self._home.xp
        kept = xp.where(self._kept, weights, 0.0)
        z = self._project(xp.where(self._kept, 0.0, weights))
        if self._small is not None:
            spread = self._small_spread(z)
        elif self._inverse is None:
            return kept
        else:
            spread = ops.received(self._home, self._inverse._ask(self._inverse._spread, z))
        return kept + self._placed(spread, 0.0)

    def _small_spread(self, z: Any) -> Array:
        """Return F_RR⁻¹G_Rᵀz/m, for no more weights than there are rows."""
        g = ops.received(self._home, self._rows.take(self._indices))
        assert self._small is not None
        return self._small.joint(g[None], ops.received(self._home, z)[None, :, None])[0]

    def quadratic(self, x: Array) -> float:
        """See :class:`Part`; this rank's share of it."""
        b = self._project(x)
        ranks = self._rows.summed_numbers(1.0)[0]
        return self._damping * float(x @ x) + float(b @ b) / (self._rows.shape[0] * ranks)

    def _project(self, x: Array) -> Any:
        return self._rows.project(self._beside(x))

    def _beside(self, x: Array) -> Array:
        return send(x, self._rows.like, self._rows.like.dtype)

    def rises(self, weights: Array, labels: Labels) -> list[Rises]:
        """See :class:`Part`.

        r·m² multiplications for r weights in groups, and the lesser of k²·m and m³ a group of k.
        """
        inverse = self._inverse
        if inverse is None and self._small is None:
            return []
        if inverse is not None and inverse._rows.rounds:  # what follows subtracts from one
            inverse._digits.go_to_float64()
        m, found = self._rows.shape[0], []
        for groups, members in by_size(labels, m):
            if inverse is None or 2 * members.shape[1] <= m:
                values = self._rises_of_few(weights, members)
            else:
                many = [self._rise_of_many(inverse, weights, group) for group in members]
                values = self._home.receive(np.array(many))
            found.append((groups, values))
        return found

    def _rises_of_few(self, weights: Array, members: Labels) -> Array:
        """Return the rises of groups of k weights from [F_RR⁻¹]_QQ."""
        xp = self._home.xp
        n, k = members.shape
        columns = self._rows.take(members.ravel())
        values = self._chosen(weights, members)
        sums = xp.sum(self._grouped(columns, n) * values[:, None, :], axis=2)
        flat = self._damping * xp.sum(values * values, axis=1)
        sharp = xp.sum(sums * sums, axis=1) / self._rows.shape[0]
        if self._small is not None:
            at = np.searchsorted(self._indices, members)
            pieces = np.zeros((n, 1), np.int64), at
            squares = self._small.submatrices(pieces)
        else:
            assert self._inverse is not None
            white = self._inverse._dual.whiten(columns, self._rows.home)
            split = self._grouped(white, n)
            products = ops.square(self._home, ops.transposed(split))
            squares = (self._home.eye(k) - products) / self._damping
        return half_squares(self._home, squares, values, flat / 2.0, (flat + sharp) / 2.0)

    def _chosen(self, x: Array, members: Labels) -> Array:
        """Return elements of a vector by index, in the indices' shape."""
        taken = self._home.xp.take(x, indices(self._home, members.ravel()))
        return self._home.xp.reshape(taken, members.shape)

    def _grouped(self, columns: Any, n: int) -> Array:
        """Return columns (m, n·k) of n groups as (n, m, k)."""
        return ops.split(self._home, columns, int(columns.shape[1]) // n)

    def _rise_of_many(self, inverse: InverseFisher, weights: Array, members: Labels) -> float:
        """Return ½ λ(‖w_Q‖² + zᵀB⁻¹z), z = G_Q w_Q, with B = A_R − G_Q G_Qᵀ that of the rest."""
        home, dual = self._rows.home, inverse._dual
        first, last = int(members[0]), int(members[-1]) + 1
        group = SelectedRows(self._rows.stretch(first, last), members - first)
        gram, z = dual.gram, home.zeros(len(dual))
        values = home.receive(self._chosen(weights, members))
        done = 0
        for _, columns in group.wide_blocks():
            block = home.receive(columns)
            gram = gram - block @ block.T
            z = z + block @ values[done : done + block.shape[1]]
            done += int(block.shape[1])
        rest = Dual(gram, dual.shift, home)
        return self._damping / 2.0 * (float(values @ values) + float(z @ rest.solve(z)))
