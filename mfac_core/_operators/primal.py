"""Short diagonal blocks, each as the B × B matrix that it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mfac_core._arrays import Array, Home, to_numpy
from mfac_core._operators.base import Indices
from mfac_core._operators.digits import warn_few_digits
from mfac_core._operators.stacks import (
    BlockStacks,
    by_group,
    finite,
)
from mfac_core._ops import blocks as ops
from mfac_core._rows.base import Rows
from mfac_core._rows.plan import Batch, indices, read, scattered


class PrimalBlocks(BlockStacks):
    """Blocks of B parameters as the B × B matrices that they are."""

    def _logdet(self) -> float:
        xp = self._home.xp

        def logdet(batch: Batch, known: Sequence[Any]) -> float:
            return sum(float(xp.sum(xp.linalg.slogdet(k)[1])) for k in known)

        return float(sum(self._visit(logdet)))

    def _power(self, p: float) -> PrimalBlocks:

        def power(batch: Batch, known: Sequence[Any]) -> list[Array]:
            powers = []
            for matrices in known:
                values, vectors = self._home.xp.linalg.eigh(matrices)
                scaled = vectors * (values**p)[:, None, :]
                powers.append(ops.multiply(self._home, scaled, ops.transposed(vectors)))
            return powers

        return PrimalBlocks(self._plan, self._visit(power), self._array)

    def _visit(self, work: Callable[[Batch, Sequence[Any]], Any]) -> list[Any]:
        items = zip(self._plan, self._stacks, strict=True)
        return ops.each(self._home, items, lambda item: work(*item))

    def _times(self, known: Any, x: Array) -> Array:
        return ops.multiply(self._home, known, x)

    def _diagonal(self) -> Array:
        def diagonal(batch: Batch, known: Sequence[Any]) -> Array:
            return scattered(self._home, batch, [self._home.xp.linalg.diagonal(k) for k in known])

        return self._home.xp.concat(self._visit(diagonal), axis=0)

    def _part_product(self, batch: Batch, known: Sequence[Any], x: Array, dtype: Any) -> Array:
        if len(known) == 1:
            product = ops.product(self._home, known[0], x, dtype)
            if product is not None:
                return product
        return super()._part_product(batch, known, x, dtype)

    def _entries(self, rows: Indices, cols: Indices) -> Array:
        first, second = self._owners(rows), self._owners(cols)
        values = np.zeros(len(rows))
        same = (first[:3] == second[:3]).all(axis=0)
        for batch, group, here in by_group(first, np.flatnonzero(same)):
            at = first[2, here], first[3, here], second[3, here]
            stack = self._stacks[batch][group]
            values[here] = to_numpy(stack[tuple(indices(self._home, i) for i in at)])
        return values

    def _submatrix(self, indices: Indices) -> Array:
        rows, cols = np.broadcast_arrays(indices[:, None], indices)
        return self._entries(rows.ravel(), cols.ravel()).reshape(rows.shape)


def inverse_primal(rows: Rows, plan: Sequence[Batch], damping: float) -> PrimalBlocks:
    """Return the inverses of λI + G_bᵀG_b/m, in O(d·B·(m + B)); d·B numbers are kept."""
    home = ops.home(rows.like)

    def invert(item: tuple[Batch, Array]) -> tuple[list[Array], bool]:
        batch, block = item
        if len(batch.groups) == 1:
            fused = ops.inverses(home, block, batch.groups[0][0], damping)
            if fused is not None:
                return [fused], False
        results, doubtful = [], False
        for size, positions in batch.groups:
            fisher = fisher_blocks(home, ops.split(home, block, size, positions), damping)
            inverse, doubt = inverses(home, fisher, damping)
            results.append(inverse)
            doubtful |= doubt
        return results, doubtful

    with finite(rows):
        done = ops.each(home, read(rows, plan, home), invert)
    stacks, doubts = zip(*done, strict=True)
    if any(doubts):
        warn_few_digits("A block of F⁻¹", damping)
    return PrimalBlocks(plan, list(stacks), rows.like)


def inverses(home: Home, matrices: Array, lowest: float) -> tuple[Array, bool]:
    """Return inverses, symmetric to the last bit, and whether some have few digits."""
    factor, doubtful = ops.inverse_factor(home, matrices, lowest)
    return ops.square(home, ops.transposed(factor)), doubtful


def fisher_blocks(home: Home, g: Array, damping: float) -> Array:
    """Return λI + GᵀG/m for each of (n, m, B)."""
    m = g.shape[1]
    return ops.shifted(home, ops.square(home, ops.transposed(g)) / m, damping)
