"""The kept weights of one large matrix F: the whole of it, or one long block."""

from __future__ import annotations

from typing import Any

import numpy as np

from mfac_core._arrays import Array, Home, send
from mfac_core._operators.kept import KeptInverse
from mfac_core._operators.primal import fisher_blocks
from mfac_core._operators.stacks import finite
from mfac_core._ops import blocks as ops
from mfac_core._rows.base import Rows
from mfac_core._rows.masked import MaskedRows
from mfac_core._rows.plan import indices
from mfac_core._rows.selected import SelectedRows
from mfac_core.pruning._groups import Labels, Rises, by_size, form, half
from mfac_core.pruning._inverses import Primal


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
        self._small: Primal | None = None
        self._inverse: KeptInverse | None = None

    @property
    def doubtful(self) -> bool:
        """See :class:`Part`; an inverse by the dual warns by itself."""
        return self._small is not None and self._small.doubtful

    def restrict(self, kept: Array) -> None:
        """See :class:`KeptFisher`."""
        if not self._home.is_numpy:
            self._kept = kept
            self._inverse = KeptInverse(MaskedRows(self._rows, kept), self._damping)
            return
        before, indices = self._inverse, self._indices
        self._kept, self._indices = kept, np.flatnonzero(kept)
        self._inverse = self._small = None
        if self._rows.reduce is None and len(self._indices) <= self._rows.shape[0]:
            self._invert_primal()
            return
        if before is not None:
            self._rows.float64 = before.float64
        rows = SelectedRows(self._rows, self._indices)
        if before is None or self._anew(indices, kept):
            self._inverse = KeptInverse(rows, self._damping)
        else:
            removed = SelectedRows(self._rows, indices[~kept[indices]])
            self._inverse = before.without(rows, removed)

    def _anew(self, indices: Labels, kept: Array) -> bool:
        """Whether the columns were not among those before, or are fewer than what is removed."""
        left = int(np.count_nonzero(kept[indices]))
        return self._rows.anywhere(left < len(self._indices) or 2 * left <= len(indices))

    def _invert_primal(self) -> None:
        """Invert the matrix of no more weights than there are rows."""
        if not len(self._indices):
            return
        g = ops.received(self._home, self._rows.take(self._indices))
        with finite(self._rows):
            self._small = Primal(
                self._home, fisher_blocks(self._home, g[None], self._damping), self._damping
            )

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
        return self._placed(ops.received(self._home, self._inverse.diagonal()), np.inf)

    def apply(self, x: Array) -> Array:
        """See :class:`Part`."""
        x = self._worked_on(x)
        if self._small is not None:
            return self._placed(self._small.apply(x[None])[0], 0.0)
        if self._inverse is None:
            return self._placed(x, 0.0)
        product = self._inverse.product(self._beside(x))
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
            spread = ops.received(self._home, self._inverse.spread(z))
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
        n = len(members)
        columns = self._rows.take(members.ravel())
        values = self._chosen(weights, members)
        sums = xp.sum(self._grouped(columns, n) * values[:, None, :], axis=2)
        flat = self._damping * xp.sum(values * values, axis=1)
        sharp = xp.sum(sums * sums, axis=1) / self._rows.shape[0]
        if self._small is not None:
            at = np.searchsorted(self._indices, members)
            pieces = np.zeros((n, 1), np.int64), at
            forms = self._small.inner_forms(pieces, values)
        else:
            assert self._inverse is not None
            forms = form(self._home, self._inverse.squares(columns, n), values)
        return half(self._home, forms, flat, flat + sharp)

    def _chosen(self, x: Array, members: Labels) -> Array:
        """Return elements of a vector by index, in the indices' shape."""
        taken = self._home.xp.take(x, indices(self._home, members.ravel()))
        return self._home.xp.reshape(taken, members.shape)

    def _grouped(self, columns: Any, n: int) -> Array:
        """Return columns (m, n·k) of n groups as (n, m, k)."""
        return ops.split(self._home, columns, int(columns.shape[1]) // n)

    def _rise_of_many(self, inverse: KeptInverse, weights: Array, members: Labels) -> float:
        """Return ½ λ(‖w_Q‖² + zᵀB⁻¹z), z = G_Q w_Q, with B = A_R − G_Q G_Qᵀ that of the rest."""
        home, m = self._rows.home, self._rows.shape[0]
        first, last = int(members[0]), int(members[-1]) + 1
        group = SelectedRows(self._rows.stretch(first, last), members - first)
        gram, z = home.zeros((m, m)), home.zeros(m)
        values = home.receive(self._chosen(weights, members))
        done = 0
        for _, columns in group.wide_blocks():
            block = home.receive(columns)
            gram = gram + block @ block.T
            z = z + block @ values[done : done + block.shape[1]]
            done += int(block.shape[1])
        return self._damping / 2.0 * (float(values @ values) + inverse.without_form(gram, z))
