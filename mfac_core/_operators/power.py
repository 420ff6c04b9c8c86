"""Real powers of the damped empirical Fisher matrix."""

from __future__ import annotations

import copy

from mfac_core._arrays import Array
from mfac_core._operators.lowrank import LowRankOperator
from mfac_core._rows.base import SMALLEST_FLOAT32_REST, Rows


class FisherPower(LowRankOperator):
    """F^p for F = λI + GᵀG/n, from the eigenvalues of GGᵀ."""

    def __init__(
        self, rows: Rows, gram: Array, damping: float, divisor: int, exponent: float
    ) -> None:
        xp = rows.home.xp
        self._damping = damping
        self._n = divisor
        self._p = exponent
        s, self._vectors = xp.linalg.eigh(gram)
        if self._cancels(rows, s):
            rows = copy.copy(rows)
            rows.exact = True
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

    def _cancels(self, rows: Rows, s: Array) -> bool:
        """Whether λᵖx less Gᵀ(...)Gx can be too small beside its terms for products in float32."""
        if not rows.rounding or self._p >= 0.0 or not s.shape[0]:
            return False
        largest = 1.0 + float(s[-1]) / (self._n * self._damping)
        return not largest**self._p >= SMALLEST_FLOAT32_REST

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
        total = float(self._rows.home.xp.sum(self._logs))
        return self._p * (self._fisher_logdet_scale + total)
