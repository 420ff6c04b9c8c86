"""Fewer parameters than gradients: F⁻¹ as the d × d matrix that it then is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mfac_core._arrays import Array, is_traced
from mfac_core._operators.base import Indices, SymmetricOperator
from mfac_core._operators.inverse import DampedInverse
from mfac_core._operators.primal import PrimalBlocks
from mfac_core._operators.stacks import finite
from mfac_core._ops import blocks as ops
from mfac_core._rows.base import Rows, first_of
from mfac_core._rows.plan import batches, read
from mfac_core._rows.storage import SplitRows
from mfac_core._typing import ArrayT

LARGEST_CONDITION = 2.0**34
"""Of F, above which what is left of float64 is for the dual to find out."""


class PrimalOrDual(DampedInverse[ArrayT]):
    """F⁻¹ by the matrix itself where that is known, and by rows and dual elsewhere.

    The matrix λI + GᵀG/n is the smaller one where d < n; and nothing is subtracted, so that no
    digits are lost to a small λ as long as the gradients span all parameters.
    """

    _primal: PrimalBlocks | None = None

    def _invert(self, rows: Rows) -> bool:
        """Form and invert the matrix, O(d²·m + d³), and say whether that left enough digits."""
        home, (m, d) = ops.home(rows.like), rows.shape
        plan, xp = batches([d], m, ops.batch_bytes(home)), home.xp
        with finite(rows):
            ((_, block),) = read(rows, plan, home)
            wide = home.receive(block)
            fisher = wide.T @ wide / self._divisor + self._damping * home.eye(d)
            if not bool(xp.all(xp.isfinite(xp.linalg.diagonal(fisher)))):
                raise ops.NotFinite
        try:
            inverse = xp.linalg.inv(fisher)
        except Exception as error:  # each library has its own LinAlgError
            if "LinAlgError" in type(error).__name__:
                return False
            raise
        inverse = (inverse + inverse.T) / 2
        norms = (xp.max(xp.sum(xp.abs(matrix), axis=1)) for matrix in (fisher, inverse))
        if not float(math.prod(float(norm) for norm in norms)) <= LARGEST_CONDITION:
            return False
        self._primal = PrimalBlocks(plan, [[inverse[None, ...]]], rows.like)
        return True

    def _by_dual(self) -> None:
        """Make what answers by the dual, for what the matrix does not know."""
        raise NotImplementedError

    def _settle(self) -> None:
        if self._primal is None:
            super()._settle()

    def _apply(self, x: Any) -> Any:
        if self._primal is None:
            return super()._apply(x)
        if is_traced(first_of(x)):
            self._by_dual()
            return super()._apply(x)
        return self._primal._apply(x)

    def _refined(self, x: Any, steps: int) -> Any:
        return super()._refined(x, steps) if self._primal is None else self._primal._apply(x)

    def _column(self, j: int) -> Array:
        primal = self._primal
        return super()._column(j) if primal is None else primal._column(j)

    def _diagonal(self) -> Array:
        return super()._diagonal() if self._primal is None else self._primal._diagonal()

    def _entries(self, rows: Indices, cols: Indices) -> Array:
        primal = self._primal
        return super()._entries(rows, cols) if primal is None else primal._entries(rows, cols)

    def _submatrix(self, indices: Indices) -> Array:
        primal = self._primal
        return super()._submatrix(indices) if primal is None else primal._submatrix(indices)

    def _quadratic(self, x: Any) -> Array:
        return super()._quadratic(x) if self._primal is None else self._primal._quadratic(x)

    def _sample(self, n: int, rng: np.random.Generator) -> Array:
        return super()._sample(n, rng) if self._primal is None else self._primal._sample(n, rng)

    def _logdet(self) -> float:
        return super()._logdet() if self._primal is None else self._primal._logdet()

    def _power(self, p: float) -> SymmetricOperator:  # type: ignore[override]
        return super()._power(p) if self._primal is None else self._primal._power(p)


def has_fewer_columns(rows: Rows) -> bool:
    """Whether F itself is smaller than its dual, and all of it on this rank and in one part."""
    m, d = rows.shape
    here = rows.reduce is None and rows.reads_columns
    return d < m and here and not isinstance(rows, SplitRows)
