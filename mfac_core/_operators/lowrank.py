"""Operators α·I + Gᵀ M G: what F, its inverse and its powers have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import numpy as np

from mfac_core._arrays import Array, promote, to_numpy
from mfac_core._operators import digits
from mfac_core._operators.base import Indices, SymmetricOperator
from mfac_core._rows.base import Rows, first_of
from mfac_core._typing import ArrayT

LARGEST_POWER = 1e300
"""Of λ, and its inverse."""


class LowRankOperator(SymmetricOperator[ArrayT]):
    """α·I + Gᵀ M G with the gradients G (m, d) and a symmetric M (m, m), a function of F.

    Every query is columns of G, something m-sized, and α on the diagonal.
    """

    _rows: Rows
    _damping: float

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
    @abstractmethod
    def _exponent(self) -> float:
        """The p of F^p."""

    @abstractmethod
    def _frozen(self) -> tuple[Rows, Array]:
        """Return the rows and GGᵀ, such that later changes of this operator do not reach them."""

    def _like(self) -> Array:
        return self._rows.like

    def _checked(self, x: Any, name: str, ndim: tuple[int, ...]) -> Any:
        return self._rows.columns_argument(x, name, ndim)

    def _of_what(self) -> str:
        return f" of {self._rows.shape[0]} gradients, damping {self._damping:g},"

    def _product_dtype(self, x: Any) -> Any:
        """Return the dtype of the product with x."""
        return promote(first_of(x), self._rows.like.dtype)

    def _fisher_logdet(self, log_ratios: Any) -> float:
        """Return log det F = d log λ + Σ log (eigenvalue/λ), d over all ranks."""
        return self._rows.total_columns * math.log(self._damping) + float(log_ratios)

    def _fisher_sample(self, n: int, rng: np.random.Generator) -> Array:
        """Draws from N(0, F): √λ z₁ + Gᵀz₂/√n with standard normal z₁ (d,) and z₂ (m,)."""
        m = self._rows.shape[0]
        z = self._rows.shared_normal(rng.standard_normal((m, n)))
        return self._rows.combine(
            self._rows.home.receive(z) / math.sqrt(self._divisor),
            self._normal(n, rng),
            math.sqrt(self._damping),
            dtype=self._rows.like.dtype,
        )

    def _columns_known(self) -> None:
        """Refuse to give a column where each rank knows a part of it."""
        if self._rows.reduce is not None:
            msg = "column(j) is not known on all ranks; multiply a unit vector with matvec instead"
            raise ValueError(msg)

    def power(self, p: float) -> SymmetricOperator[ArrayT]:
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
        return super().power(p)

    def _power(self, p: float) -> FisherPower[ArrayT]:
        if abs(p * math.log(self._damping)) > math.log(LARGEST_POWER):
            msg = f"p must leave λᵖ within float64, got {p:g} for a damping of {self._damping:g}"
            raise ValueError(msg)
        rows, gram = self._frozen()
        return FisherPower(rows, gram, self._damping, self._divisor, p * self._exponent)


class FisherFunction(LowRankOperator[ArrayT]):
    """α·I + Gᵀ M G with M known in closed form: F itself, and its powers."""

    @property
    @abstractmethod
    def _alpha(self) -> float:
        """The number on the diagonal."""

    @abstractmethod
    def _middle(self, b: Array) -> Array:
        """M b for b of shape (m,) or (m, k), in the home."""

    def _apply(self, x: Any) -> Any:
        c = self._middle(self._rows.project(x))
        return self._rows.combine(c, x, self._alpha, dtype=self._product_dtype(x))

    def _diagonal(self) -> Array:
        parts = []
        for home, block in self._rows.wide_blocks():
            middle = home.receive(self._middle(self._rows.home.receive(block)))
            parts.append(to_numpy(self._alpha + home.xp.sum(block * middle, axis=0)))
        return np.concatenate(parts)

    def _entries(self, rows: Indices, cols: Indices) -> Array:
        return self._rows.bilinear(rows, cols, self._middle) + self._alpha * (rows == cols)

    def _submatrix(self, indices: Indices) -> Array:
        columns = self._rows.take(indices)
        dense = to_numpy(columns.T @ self._middle(columns))
        return (dense + dense.T) / 2 + self._alpha * (indices[:, None] == indices)

    def _column(self, j: int) -> Array:
        self._columns_known()
        c = self._middle(self._rows.take(np.array([j]))[:, 0])
        return self._rows.combine(c, self._unit(j), self._alpha, dtype=self._rows.like.dtype)

    def _quadratic(self, x: Any) -> Array:
        b = self._rows.project(x)
        middle = to_numpy(self._rows.home.xp.sum(b * self._middle(b), axis=0))
        return self._alpha * self._rows.square_norms(x) + middle

    def _sample(self, n: int, rng: np.random.Generator) -> Array:
        return self._power(0.5)._apply(self._normal(n, rng))


class FisherPower(FisherFunction[ArrayT]):
    """F^p for F = λI + GᵀG/n, from the eigenvalues of GGᵀ.

    Parameters
    ----------
    rows : Rows
        G, shape (m, d).
    gram : array, shape (m, m)
        GGᵀ, float64 in the home of the rows.
    damping : float
        λ.
    divisor : int
        n.
    exponent : float
        p.
    """

    def __init__(
        self, rows: Rows, gram: Array, damping: float, divisor: int, exponent: float
    ) -> None:
        xp = rows.home.xp
        self._damping = damping
        self._n = divisor
        self._p = exponent
        s, self._vectors = xp.linalg.eigh(gram)
        largest = float(s[-1]) if s.shape[0] else 0.0
        if digits.power_cancels(rows, 1.0 + largest / (divisor * damping), exponent):
            rows = rows.in_float64()
            s, self._vectors = xp.linalg.eigh(rows.gram())
        self._rows = rows
        s = xp.clip(s, 0.0, None)
        self._logs = xp.log1p(s / (divisor * damping))  # log of F's eigenvalues over λ
        # ((λ + s/n)ᵖ − λᵖ)/s without cancellation for small s, where it is p λᵖ⁻¹/n.
        tiny = s <= divisor * damping * 2.0**-52
        safe = xp.where(tiny, xp.ones_like(s), s)
        slopes = xp.expm1(exponent * self._logs) / safe
        limit = exponent / (divisor * damping)
        self._weights = self._alpha * xp.where(tiny, xp.full_like(s, limit), slopes)

    @property
    def _alpha(self) -> float:
        return float(self._damping**self._p)

    @property
    def _divisor(self) -> int:
        return self._n

    @property
    def _exponent(self) -> float:
        return self._p

    def _frozen(self) -> tuple[Rows, Array]:
        s = self._n * self._damping * self._rows.home.xp.expm1(self._logs)
        return self._rows, (self._vectors * s) @ self._vectors.T

    def _middle(self, b: Array) -> Array:
        weights = self._weights if b.ndim == 1 else self._weights[:, None]
        return self._vectors @ (weights * (self._vectors.T @ b))

    def logdet(self) -> float:
        """Return log det F^p = p log det F.

        Returns
        -------
        float
            The logarithm of the determinant.
        """
        return super().logdet()

    def _logdet(self) -> float:
        return self._p * self._fisher_logdet(self._rows.home.xp.sum(self._logs))
