"""The kept weights of a batch of small diagonal blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from mfac_core._arrays import Array, Home, to_numpy
from mfac_core._operators.primal import fisher_blocks
from mfac_core._ops import blocks as ops
from mfac_core._rows.plan import Batch, Positions, gathered, indices, scattered
from mfac_core.pruning._groups import Labels, Rises, by_size, half
from mfac_core.pruning._inverses import (
    Dual,
    Explicit,
    Inverses,
    Primal,
    chosen_columns,
    chosen_pairs,
)

WORTH_GATHERING = 0.75
"""Share of a block's weights up to which the kept ones are gathered to work on them alone."""

GATHERED = 8
"""What the number of gathered weights is rounded up to."""


class BlockPart:
    """A batch of blocks; acts on float64 vectors of its length in the home.

    Parameters
    ----------
    groups : sequence of StackPart
        One for each length of blocks in the batch.
    """

    def __init__(self, home: Home, batch: Batch, groups: Sequence[StackPart]) -> None:
        self._home, self._batch, self._groups = home, batch, groups

    @property
    def doubtful(self) -> bool:
        """Whether some results have few digits."""
        return any(group.doubtful for group in self._groups)

    def diagonal(self) -> Array:
        """See :class:`Part`."""
        return scattered(self._home, self._batch, [group.diagonal() for group in self._groups])

    def apply(self, x: Array) -> Array:
        """See :class:`Part`."""
        return self._each("apply", x)

    def joint(self, weights: Array) -> Array:
        """See :class:`Part`."""
        return self._each("joint", weights)

    def quadratic(self, x: Array) -> float:
        """See :class:`Part`."""
        pairs = zip(self._groups, self._split(x), strict=True)
        return sum(group.quadratic(piece) for group, piece in pairs)

    def rises(self, weights: Array, labels: Labels) -> list[Rises]:
        """See :class:`Part`; a group is as many independent ones as it has weights in blocks."""
        rises = []
        pieces = zip(self._groups, self._batch.groups, self._split(weights), strict=True)
        for group, (size, positions), own in pieces:
            inside = labels if positions is None else labels[positions.ravel()]
            rises += group.rises(own, inside.reshape(-1, size))
        return rises

    def _split(self, x: Array) -> list[Array]:
        return [gathered(self._home, x, *group) for group in self._batch.groups]

    def _each(self, act: str, x: Array) -> Array:
        pairs = zip(self._groups, self._split(x), strict=True)
        return scattered(self._home, self._batch, [getattr(g, act)(piece) for g, piece in pairs])


class StackPart(ABC):
    """n blocks of B weights: what the rows and the Fisher matrices of all of them share.

    Vectors are (n, B); removed weights are zero in what is returned.
    """

    def __init__(self, home: Home, kept: Array, damping: float) -> None:
        self._home, self._kept, self._damping = home, kept, damping
        self._all = bool(home.xp.all(kept))
        self._inside: Array = None
        if home.is_numpy and not self._all:
            self._gather()
        self._known: Inverses | None = None
        self._doubted = False

    def _gather(self) -> None:
        """Choose which weights to work on, where that is few of them: those kept, and padding."""
        size = self._kept.shape[1]
        width = -(-max(int(self._kept.sum(axis=1).max()), 1) // GATHERED) * GATHERED
        if width <= WORTH_GATHERING * size:
            order = np.argsort(~self._kept, axis=1, kind="stable")
            self._inside = order[:, :width]

    @property
    def doubtful(self) -> bool:
        """See :class:`BlockPart`."""
        return self._doubted or (self._known is not None and self._known.doubtful)

    @property
    def _inverses(self) -> Inverses:
        if self._known is None:
            self._known = self._invert()
        return self._known

    @abstractmethod
    def _invert(self) -> Inverses:
        """Return the inverses of the kept weights' matrices."""

    @abstractmethod
    def _some(self, blocks: Labels) -> StackPart:
        """Return some of the blocks, on the host."""

    def _few(self, needed: Array) -> Labels | None:
        """Return where ``needed`` (n,) is, on the host, if it pays to work on these alone."""
        if not self._home.is_numpy or self._known is not None:
            return None
        blocks = np.flatnonzero(needed)
        return blocks if len(blocks) <= WORTH_GATHERING * len(needed) else None

    def _narrow(self, x: Array) -> Array:
        """Return what of x (n, B) is worked on, zero where not kept."""
        x = self._home.xp.where(self._kept, x, 0.0)
        return x if self._inside is None else np.take_along_axis(x, self._inside, axis=1)

    def _widen(self, x: Array, other: float) -> Array:
        """Return it at its place in (n, B), with ``other`` where not kept."""
        if self._inside is not None:
            wide = np.zeros(self._kept.shape)
            np.put_along_axis(wide, self._inside, x, axis=1)
            x = wide
        return self._home.xp.where(self._kept, x, other)

    def diagonal(self) -> Array:
        """See :class:`Part`."""
        return self._widen(self._inverses.diagonal(), np.inf)

    def apply(self, x: Array) -> Array:
        """See :class:`Part`."""
        return self._widen(self._inverses.apply(self._narrow(x)), 0.0)

    def joint(self, weights: Array) -> Array:
        """See :class:`Part`."""
        if self._all:
            return weights
        kept = self._home.xp.where(self._kept, weights, 0.0)
        xp = self._home.xp
        mixed = self._few(xp.any(self._kept, axis=1) & ~xp.all(self._kept, axis=1))
        if mixed is None:
            removed = self._home.xp.where(self._kept, 0.0, weights)
            return kept + self._spread(removed)
        if len(mixed):  # in the others nothing was removed, or nothing is left to be changed
            some = self._some(mixed)
            kept[mixed] = some.joint(weights[mixed])
            self._doubted |= some.doubtful
        return kept

    @abstractmethod
    def _spread(self, removed: Array) -> Array:
        """Return F_RR⁻¹F_RS w_S."""

    @abstractmethod
    def _sharp(self, pieces: tuple[Any, Any], values: Array) -> Array:
        """Return xᵀFx for x of these values at these members, and zero elsewhere; (p,)."""

    @abstractmethod
    def _forms(self, x: Array) -> Array:
        """Return xᵀFx for each block, (n,)."""

    def quadratic(self, x: Array) -> float:
        """See :class:`Part`."""
        return float(self._home.xp.sum(self._forms(x)))

    def rises(self, weights: Array, labels: Labels) -> list[Rises]:
        """See :class:`Part`; O(k³) for each piece of k weights.

        Pieces that are all that a block keeps need no inverse: ([F_RR⁻¹]_RR)⁻¹ = F_RR.
        """
        xp = self._home.xp
        left = to_numpy(xp.sum(xp.astype(self._kept, xp.int64), axis=1))
        one = labels.max(axis=1)
        alone = (one >= 0) & (np.sum(labels == one[:, None], axis=1) == left)
        found: list[Rises] = []
        if alone.any():
            forms = self._forms(xp.where(self._kept, weights, 0.0))
            there = indices(self._home, np.flatnonzero(alone))
            found.append((one[alone], xp.take(forms, there) / 2.0))
        divided = (one >= 0) & ~alone
        blocks = self._few(divided)
        if blocks is None:
            return found + self._rises_of_pieces(weights, np.where(divided[:, None], labels, -1))
        if len(blocks):
            some = self._some(blocks)
            found += some._rises_of_pieces(weights[blocks], labels[blocks])
            self._doubted |= some.doubtful
        return found

    def _rises_of_pieces(self, weights: Array, labels: Labels) -> list[Rises]:
        """Return the rises of pieces by the inverse."""
        n, size = labels.shape
        count = int(labels.max(initial=-1)) + 1
        keys = np.where(labels >= 0, np.arange(n)[:, None] * count + labels, -1)
        return [
            (pieces % count, self._rises_of(weights, members))
            for pieces, members in by_size(keys.ravel(), size)
        ]

    def _rises_of(self, weights: Array, members: Labels) -> Array:
        """Return the rises of members (p, k)."""
        xp, size = self._home.xp, self._kept.shape[1]
        blocks, at = members[:, :1] // size, members % size
        there = indices(self._home, blocks), indices(self._home, at)
        flat_at = xp.reshape(there[0] * size + there[1], (-1,))
        values = xp.reshape(xp.take(xp.reshape(weights, (-1,)), flat_at), at.shape)
        flat = self._damping * xp.sum(values * values, axis=1)
        sharp = flat + self._sharp(there, values)
        if self._inside is not None:  # gathered weights stand where so many before them are kept
            at = (np.cumsum(self._kept, axis=1) - 1)[blocks, at]
        forms = self._inverses.inner_forms((there[0], indices(self._home, at)), values)
        return half(self._home, forms, flat, sharp)


class RowsPart(StackPart):
    """Blocks known by their gradients; by their duals, or what is kept of them where that is less.

    Parameters
    ----------
    block : array, shape (m, width)
        Columns as they are stored.
    size, positions
        Which of them; see :class:`~mfac_core._rows.plan.Batch`.
    """

    def __init__(
        self,
        home: Home,
        block: Array,
        size: int,
        positions: Positions | None,
        kept: Array,
        damping: float,
    ) -> None:
        super().__init__(home, kept, damping)
        self._block, self._size, self._positions = block, size, positions
        self._whole: Array = None
        self._own: Array = None

    def _some(self, blocks: Labels) -> StackPart:
        if self._positions is None:
            positions = blocks[:, None] * self._size + np.arange(self._size)
        else:
            positions = self._positions[blocks]
        own = self._block, self._size, positions, self._kept[blocks], self._damping
        return RowsPart(self._home, *own)

    def _invert(self) -> Inverses:
        if self._positions is None:
            masked = self._masked_block()
            fused = ops.inverses(self._home, masked, self._size, self._damping)
            if fused is not None:
                return Explicit(self._home, fused)
        g = self._narrow_rows()
        m, width = int(g.shape[1]), int(g.shape[2])
        if width > m:
            return Dual(self._home, g, self._damping)
        return Primal(self._home, fisher_blocks(self._home, g, self._damping), self._damping)

    def _masked_block(self) -> Array:
        """Return the columns as they are stored, with zeros for the removed; for kernels alone."""
        if self._all or self._home.is_numpy:
            return self._block
        kept = self._home.xp.reshape(self._kept, (-1,))
        return self._block * self._home.xp.astype(kept, self._block.dtype)

    def _rows(self) -> Array:
        """Return the gradients of all weights, (n, m, B)."""
        if self._whole is None:
            self._whole = ops.split(self._home, self._block, self._size, self._positions)
        return self._whole

    def _narrow_rows(self) -> Array:
        """Return those of the weights that are worked on, zero where not kept."""
        if self._own is None:
            self._own = self._gathered_rows()
        return self._own

    def _gathered_rows(self) -> Array:
        if self._all:
            return self._rows()
        if self._inside is None:
            return self._home.xp.where(self._kept[:, None, :], self._rows(), 0.0)
        n, width = self._inside.shape
        first = np.arange(n) * self._size if self._positions is None else self._positions[:, 0]
        columns = first[:, None] + self._inside
        g = ops.split(self._home, self._block, width, columns)
        g *= np.take_along_axis(self._kept, self._inside, axis=1)[:, None, :]
        return g

    def _spread(self, removed: Array) -> Array:
        z = ops.multiply(self._home, self._rows(), removed[..., None])
        return self._widen(self._inverses.joint(self._narrow_rows(), z), 0.0)

    def _forms(self, x: Array) -> Array:
        xp, b = self._home.xp, ops.multiply(self._home, self._rows(), x[..., None])[..., 0]
        return self._damping * xp.sum(x * x, axis=1) + xp.sum(b * b, axis=1) / int(b.shape[1])

    def _sharp(self, pieces: tuple[Any, Any], values: Array) -> Array:
        g = chosen_columns(self._home, self._rows(), pieces)
        b = ops.multiply(self._home, ops.transposed(g), values[..., None])[..., 0]
        return self._home.xp.sum(b * b, axis=1) / int(b.shape[1])


class FisherPart(StackPart):
    """Blocks shorter than the rows are many, known by λI + GᵀG/m, (n, B, B)."""

    def __init__(self, home: Home, fisher: Array, kept: Array, damping: float) -> None:
        super().__init__(home, kept, damping)
        self._fisher = fisher

    def _some(self, blocks: Labels) -> StackPart:
        return FisherPart(self._home, self._fisher[blocks], self._kept[blocks], self._damping)

    def _invert(self) -> Inverses:
        kept, fisher = self._kept, self._fisher
        if self._inside is not None:
            kept = np.take_along_axis(kept, self._inside, axis=1)
            block = np.arange(len(kept))[:, None, None]
            fisher = fisher[block, self._inside[:, :, None], self._inside[:, None, :]]
        if not self._all:  # ones for the removed keep the matrix regular
            both = kept[:, :, None] & kept[:, None, :]
            fisher = self._home.xp.where(both, fisher, self._home.eye(int(kept.shape[1])))
        return Primal(self._home, fisher, self._damping)

    def _spread(self, removed: Array) -> Array:
        return self.apply(ops.multiply(self._home, self._fisher, removed[..., None])[..., 0])

    def _forms(self, x: Array) -> Array:
        product = ops.multiply(self._home, self._fisher, x[..., None])[..., 0]
        return self._home.xp.sum(x * product, axis=1)

    def _sharp(self, pieces: tuple[Any, Any], values: Array) -> Array:
        matrices = chosen_pairs(self._home, self._fisher, pieces)
        product = ops.multiply(self._home, matrices, values[..., None])[..., 0]
        flat = self._damping * self._home.xp.sum(values * values, axis=1)
        return self._home.xp.sum(values * product, axis=1) - flat
