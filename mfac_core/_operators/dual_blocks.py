"""Diagonal blocks longer than the rows are many, by their duals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mfac_core._arrays import Array, Home, to_numpy
from mfac_core._operators.base import Indices
from mfac_core._operators.digits import warn_few_digits
from mfac_core._operators.stacks import BlockStacks, Stacks, by_group, finite
from mfac_core._ops import blocks as ops
from mfac_core._rows.base import Rows
from mfac_core._rows.plan import Batch, indices, read, scattered

PAIR_BYTES = 1 << 24
"""Size of the matrices that are gathered at a time for single elements."""


class DualBlocks(BlockStacks):
    """Blocks α·I ± G_bᵀRᵀRG_b, longer than the rows are many, from R (m, m) each and the rows.

    Parameters
    ----------
    rows : Rows
        The gradients of these blocks.
    plan : sequence of Batch
        The blocks.
    stacks : list of list of array
        Their R, (n, m, m) for each length of each batch.
    alpha, sign : float
        See above.
    damping, exponent : float
        λ, and the p of F^p that they are.
    """

    def __init__(
        self,
        rows: Rows,
        plan: Sequence[Batch],
        stacks: Stacks,
        alpha: float,
        sign: float,
        damping: float,
        exponent: float,
    ) -> None:
        super().__init__(plan, stacks, rows.like)
        self._rows, self._alpha, self._sign = rows, alpha, sign
        self._damping, self._exponent = damping, exponent

    def _logdet(self) -> float:
        values = [np.log1p(s / (self._rows.shape[0] * self._damping)) for s in self._spectra()]
        d = self.shape[0]
        total = d * math.log(self._damping) + sum(float(v.sum()) for v in values)
        return self._exponent * total

    def _power(self, p: float) -> DualBlocks:
        p *= self._exponent
        return dual_blocks(self._rows, self._plan, self._damping, p)

    def _spectra(self) -> list[np.ndarray[Any, Any]]:
        def values(batch: Batch, known: Sequence[Any]) -> list[Any]:
            grams = [ops.square(self._home, g) for g, _ in known]
            return [to_numpy(self._home.xp.linalg.eigvalsh(gram)).clip(0.0) for gram in grams]

        return [s for some in self._visit(values) for s in some]

    def _visit(self, work: Callable[[Batch, Sequence[Any]], Any]) -> list[Any]:
        def with_columns(item: tuple[tuple[Batch, Array], list[Array]]) -> Any:
            (batch, block), factors = item
            known = [
                (ops.split(self._home, block, size, positions), factor)
                for (size, positions), factor in zip(batch.groups, factors, strict=True)
            ]
            return work(batch, known)

        items = zip(read(self._rows, self._plan, self._home), self._stacks, strict=True)
        return ops.each(self._home, items, with_columns)

    def _times(self, known: Any, x: Array) -> Array:
        g, factor = known
        half = ops.multiply(self._home, factor, ops.multiply(self._home, g, x))
        middle = ops.multiply(self._home, ops.transposed(factor), half)
        return self._alpha * x + self._sign * ops.multiply(self._home, ops.transposed(g), middle)

    def _diagonal(self) -> Array:
        def diagonal(batch: Batch, known: Sequence[Any]) -> tuple[Array, float]:
            values, least = zip(*(self._clamped(*group) for group in known), strict=True)
            return scattered(self._home, batch, values), min(least)

        pieces, least = zip(*self._visit(diagonal), strict=True)
        if self._exponent == -1.0 and min(least) < self._alpha * ops.SMALLEST_PIVOT:
            warn_few_digits("The diagonal of F⁻¹", self._damping)
        return self._home.xp.concat(pieces, axis=0)

    def _clamped(self, g: Array, factor: Array) -> tuple[Array, float]:
        """Return the diagonals of a group's blocks, within their bounds, and the least before."""
        xp = self._home.xp
        white = ops.multiply(self._home, factor, g)
        values = self._alpha + self._sign * ops.dot(self._home, white, white)
        least = float(xp.min(values))
        if self._exponent == -1.0:
            fisher = self._damping + ops.dot(self._home, g, g) / self._rows.shape[0]
            values = xp.clip(values, 1.0 / fisher, self._alpha)
        return values, least

    def _entries(self, rows: Indices, cols: Indices) -> Array:
        first, second = self._owners(rows), self._owners(cols)
        values = self._alpha * (rows == cols)
        same = np.flatnonzero((first[:3] == second[:3]).all(axis=0))
        left = self._white(rows[same], first[:, same])
        right = self._white(cols[same], second[:, same])
        values[same] += self._sign * np.sum(left * right, axis=0)
        return values

    def _submatrix(self, indices: Indices) -> Array:
        owners = self._owners(indices)
        white = self._white(indices, owners)
        same = (owners[:3, :, None] == owners[:3, None, :]).all(axis=0)
        return self._sign * same * (white.T @ white) + self._alpha * (indices[:, None] == indices)

    def _white(self, columns: Indices, owners: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return Rg for columns g, each with the R of its block, (m, k)."""
        m = self._rows.shape[0]
        white = np.empty((m, len(columns)))
        step = max(PAIR_BYTES // (8 * m * m), 1)
        for start in range(0, len(columns), step):
            some = np.arange(start, min(start + step, len(columns)))
            g = ops.received(self._home, self._rows.take(columns[some]))
            for batch, group, here in by_group(owners, some):
                at = indices(self._home, owners[2, here])
                factors = self._home.xp.take(self._stacks[batch][group], at, axis=0)
                own = self._home.xp.take(g, indices(self._home, here - start), axis=1)
                product = ops.multiply(self._home, factors, ops.transposed(own)[:, :, None])
                white[:, here] = to_numpy(product)[:, :, 0].T
        return white


def dual_blocks(rows: Rows, plan: Sequence[Batch], damping: float, p: float) -> DualBlocks:
    """Return F_b^p of each block from its dual, in O(d·m² + blocks·m³).

    Parameters
    ----------
    rows : Rows
        The gradients of these blocks.
    plan : sequence of Batch
        The blocks.
    damping : float
        λ.
    p : float
        Any real number.

    Returns
    -------
    DualBlocks
        The operator.
    """
    home, m = ops.home(rows.like), rows.shape[0]

    def factors(item: tuple[Batch, Array]) -> tuple[list[Array], bool]:
        results, doubtful = [], False
        for size, positions in item[0].groups:
            gram = ops.square(home, ops.split(home, item[1], size, positions))
            if p == -1.0:
                dual = ops.shifted(home, gram, m * damping)
                factor, doubt = ops.inverse_factor(home, dual, m * damping)
                results.append(factor / math.sqrt(damping))
                doubtful |= doubt
            else:
                results.append(_root(home, gram, damping, m, p))
        return results, doubtful

    with finite(rows):
        done = ops.each(home, read(rows, plan, home), factors)
    stacks, doubts = zip(*done, strict=True)
    if any(doubts):
        warn_few_digits("A block of F⁻¹", damping)
    sign = -1.0 if p < 0.0 else 1.0
    return DualBlocks(rows, plan, list(stacks), damping**p, sign, damping, p)


def _root(home: Home, grams: Array, damping: float, m: int, p: float) -> Array:
    """Return R with ±RᵀR = Q diag(((λ + s/m)ᵖ − λᵖ)/s) Qᵀ, for Grams Q diag(s) Qᵀ."""
    values, vectors = (to_numpy(x) for x in home.xp.linalg.eigh(grams))
    s = values.clip(0.0)
    ratio = s / (m * damping)
    small = ratio < 2.0**-52
    powers = np.expm1(p * np.log1p(ratio)) / np.where(small, 1.0, ratio)
    scaled = np.abs(np.where(small, p, powers)) * damping ** (p - 1.0) / m
    return home.receive(np.sqrt(scaled)[:, :, None] * vectors.transpose(0, 2, 1))
