"""Operators α·I + Gᵀ M G: what F, its inverse and its powers have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array, promote, to_numpy
from mfac_core._operators.base import Indices, SymmetricOperator
from mfac_core._operators.guard import serialised
from mfac_core._rows.base import Rows


class LowRankOperator(SymmetricOperator):
    """α·I + Gᵀ M G with the gradients G (m, d) and a symmetric M (m, m).

    Subclasses give α and the product with M. Every query is then columns of G, M on what is
    m-sized, and α on the diagonal.
    """

    _rows: Rows
    _damping: float

    _lock: AbstractContextManager[Any] = nullcontext()
    """What its queries hold; nothing where they change nothing."""

    @property
    @abstractmethod
    def _alpha(self) -> float:
        """The number on the diagonal."""

    @abstractmethod
    def _middle(self, b: Array) -> Array:
        """M b for b of shape (m,) or (m, k), in the home."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return (self._rows.shape[1],) * 2

    @property
    def dtype(self) -> Any:
        """The dtype of the gradients."""
        return self._rows.dtype

    @property
    def device(self) -> Any:
        """The device of the gradients, of their first part where they are on several."""
        return self._rows.device

    @property
    def _divisor(self) -> int:
        """The n of F = λI + GᵀG/n."""
        return self._rows.shape[0]

    @property
    def _fisher_logdet_scale(self) -> float:
        """The d log λ of log det F, over all ranks."""
        return self._rows.total_columns * math.log(self._damping)

    def _like(self) -> Array:
        return self._rows.like

    def _checked_columns(self, x: Any, name: str, ndim: tuple[int, ...]) -> Any:
        return self._rows.columns_argument(x, name, ndim)

    def _apply(self, x: Any, refine: int) -> Any:
        first = x[0] if isinstance(x, list) else x
        c = self._middle(self._rows.project(x))
        return self._rows.combine(c, x, self._alpha, dtype=promote(first, self.dtype))

    def _diagonal(self) -> Array:
        parts = []
        for home, block in self._rows.wide_blocks():
            middle = home.receive(self._middle(self._rows.home.receive(block)))
            parts.append(to_numpy(self._alpha + home.xp.sum(block * middle, axis=0)))
        return np.concatenate(parts)

    @serialised
    def _entries(self, rows: Indices, cols: Indices) -> Array:
        return self._rows.bilinear(rows, cols, self._middle) + self._alpha * (rows == cols)

    @serialised
    def _submatrix(self, indices: Indices) -> Array:
        columns = self._rows.take(indices)
        dense = to_numpy(columns.T @ self._middle(columns))
        return (dense + dense.T) / 2 + self._alpha * (indices[:, None] == indices)

    @serialised
    def _column(self, j: int) -> Array:
        if self._rows.reduce is not None:
            msg = "column(j) is not known on all ranks; multiply a unit vector with matvec instead"
            raise ValueError(msg)
        c = self._middle(self._rows.take(np.array([j]))[:, 0])
        return self._rows.combine(c, self._unit(j), self._alpha, dtype=self.dtype)

    def _quadratic(self, x: Any) -> Array:
        b = self._rows.project(x)
        middle = to_numpy(self._rows.home.xp.sum(b * self._middle(b), axis=0))
        return self._alpha * self._rows.square_norms(x) + middle

    def _sample(self, n: int, rng: np.random.Generator) -> Array:
        return self.power(0.5)._apply(self._normal(n, rng), 0)

    def _fisher_sample(self, n: int, rng: np.random.Generator) -> Array:
        """Draws from N(0, F): √λ z₁ + Gᵀz₂/√n with standard normal z₁ (d,) and z₂ (m,)."""
        m = self._rows.shape[0]
        z = self._rows.shared_normal(rng.standard_normal((m, n)))
        return self._rows.combine(
            self._rows.home.receive(z) / math.sqrt(self._divisor),
            self._normal(n, rng),
            math.sqrt(self._damping),
            dtype=self.dtype,
        )

    @serialised
    def power(self, p: float) -> SymmetricOperator:
        """Return a real power of this operator, as an operator.

        Parameters
        ----------
        p : float
            Any real number. Relative to this operator: ``InverseFisher(...).power(0.5)`` is F^-½.

        Returns
        -------
        FisherPower
            With the same queries; it refers to the same gradients.

        Raises
        ------
        TypeError, ValueError
            If ``p`` is not a finite number.

        Notes
        -----
        F^p = λᵖI + Gᵀ Q diag(((λ + sᵢ/n)ᵖ − λᵖ)/sᵢ) Qᵀ G with GGᵀ = Q diag(s) Qᵀ: one eigenvalue
        problem of size m, O(m³), and products as of the operator itself; in float64 where float32
        would lose digits of a negative power of F.
        """
        from mfac_core._operators.power import FisherPower

        exponent = check.finite_number(p, "p") * self._exponent
        rows, gram = self._frozen()
        return FisherPower(rows, gram, self._damping, self._divisor, exponent)

    @property
    @abstractmethod
    def _exponent(self) -> float:
        """The p of F^p."""

    @abstractmethod
    def _frozen(self) -> tuple[Rows, Array]:
        """Return the rows and GGᵀ, such that later changes of this operator do not reach them."""
