"""Short diagonal blocks, each as the B × B matrix that it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mfac_core._arrays import Array, Home, to_numpy
from mfac_core._operators.base import Indices
from mfac_core._operators.digits import warn_few_digits
from mfac_core._operators.stacks import BlockStacks, by_group, finite
from mfac_core._ops import blocks as ops
from mfac_core._rows.base import Rows
from mfac_core._rows.plan import Batch, indices, read, scattered

STACK_BYTES = 1 << 24
"""Size of the stacks of matrices that products go through."""


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
        return ops.stream(self._home, known, x)

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


class Found:
    """Where the inverses of blocks are put as they are found.

    Blocks of one length from the first on are put into a few large stacks, which products go
    through in as few steps; what follows stays as it comes.

    Parameters
    ----------
    home : Home
        Where they are.
    plan : sequence of Batch
        The blocks, in the batches that they come in; the first begins at column 0.
    """

    def __init__(self, home: Home, plan: Sequence[Batch]) -> None:
        self._rest = list(plan)
        self._stacks: list[Array] = []
        self._stop = 0  # of the columns whose blocks are in the stacks
        self._size = plan[0].groups[0][0]
        if not home.is_numpy:  # batches are large there, and arrays not written to
            return
        alike = [(self._size, None)]
        equal = next((k for k, b in enumerate(plan) if b.groups != alike), len(plan))
        self._rest = list(plan[equal:])
        self._stop = plan[equal - 1].columns.stop if equal else 0
        blocks = self._stop // self._size
        self._step = max(STACK_BYTES // (8 * self._size**2), 1)
        self._stacks = [
            np.empty((min(self._step, blocks - first), self._size, self._size))
            for first in range(0, blocks, self._step)
        ]

    def put(self, batch: Batch, inverses: list[Array]) -> list[Array]:
        """Take those of a batch, and return those that are to be kept by themselves."""
        if batch.columns.start >= self._stop:
            return inverses
        first, done = batch.columns.start // self._size, 0
        while done < len(inverses[0]):
            stack, at = divmod(first + done, self._step)
            some = inverses[0][done : done + self._step - at]
            self._stacks[stack][at : at + len(some)] = some
            done += len(some)
        return []

    def blocks(self, kept: Sequence[list[Array]], like: Array) -> PrimalBlocks:
        """Return the operator, from what ``put`` returned in order too."""
        stops = np.cumsum([len(stack) * self._size for stack in self._stacks], dtype=np.int64)
        plan = [
            Batch(slice(int(stop) - len(stack) * self._size, int(stop)), [(self._size, None)])
            for stack, stop in zip(self._stacks, stops, strict=True)
        ]
        stacks = [[stack] for stack in self._stacks] + [some for some in kept if some]
        return PrimalBlocks(plan + self._rest, stacks, like)


def inverse_primal(rows: Rows, plan: Sequence[Batch], damping: float) -> PrimalBlocks:
    """Return the inverses of λI + G_bᵀG_b/m, in O(d·B·(m + B)); d·B numbers are kept."""
    home = ops.home(rows.like)
    found = Found(home, plan)

    def invert(item: tuple[Batch, Array]) -> tuple[list[Array], bool]:
        batch, block = item
        if len(batch.groups) == 1:
            fused = ops.inverses(home, block, batch.groups[0][0], damping)
            if fused is not None:
                return found.put(batch, [fused]), False
        fishers = [
            fisher_blocks(home, ops.split(home, block, size, positions), damping)
            for size, positions in batch.groups
        ]
        results, doubtful = all_inverses(home, fishers, damping)
        return found.put(batch, results), doubtful

    with finite(rows):
        done = ops.each(home, read(rows, plan, home), invert)
    kept, doubts = zip(*done, strict=True)
    if any(doubts):
        warn_few_digits("A block of F⁻¹", damping)
    return found.blocks(kept, rows.like)


def all_inverses(home: Home, stacks: Sequence[Array], lowest: float) -> tuple[list[Array], bool]:
    """Return the inverses of several stacks, and whether some have few digits."""
    pairs = [inverses(home, matrices, lowest) for matrices in stacks]
    return [inverse for inverse, _ in pairs], any(doubt for _, doubt in pairs)


def inverses(home: Home, matrices: Array, lowest: float) -> tuple[Array, bool]:
    """Return inverses, symmetric to the last bit, and whether some have few digits."""
    factor, doubtful = ops.inverse_factor(home, matrices, lowest)
    return ops.square(home, ops.transposed(factor)), doubtful


def fisher_blocks(home: Home, g: Array, damping: float) -> Array:
    """Return λI + GᵀG/m for each of (n, m, B)."""
    m = g.shape[1]
    return ops.shifted(home, ops.square(home, ops.transposed(g)) / m, damping)
