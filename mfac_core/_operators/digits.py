"""Operators by the dual, which see to it that enough digits are left of what they subtract."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy

from mfac_core._arrays import Array, itemsize, promote, to_numpy
from mfac_core._dual import Dual
from mfac_core._operators.guard import uninterrupted
from mfac_core._operators.lowrank import LowRankOperator
from mfac_core._rows.base import FLOAT32_ROUNDING, FLOAT32_UNDERFLOW, SMALLEST_FLOAT32_REST

LARGEST_DIAGONAL_ROUNDING = 1e-5
"""Rounding of the Gram relative to 1 − t, above which the diagonal asks for float64 products."""

SMALLEST_REST = 2.0**-44
"""What 1 − t, and ‖x − Gᵀc‖ / ‖x‖, must leave in float64 for three right digits."""

LARGEST_REFINED_ERROR = 2.0**-6
"""Estimated relative error of a refined product from which on a warning is due."""


class DualOperator(LowRankOperator):
    """A low-rank operator by the dual A = nλI + GGᵀ.

    Results are what a subtraction leaves. Where that is too little for products in float32, they
    run in float64, and the Gram is formed anew; where it is too little for float64, it warns.
    """

    _largest_rounding: float
    """Error of solutions due to float32 products above which products run in float64."""

    _dual: Dual
    _checked: bool
    """Whether the Gram is known to be accurate enough for the dual's condition."""

    def _settle(self) -> None:
        """Make the Gram as accurate as the dual's condition asks for."""
        if self._checked:
            return
        if self._rows.rounding and not self._solution_error() <= self._largest_rounding:
            self._recompute_gram()
        self._checked = True

    def _solution_error(self) -> float:
        """Estimate the relative error of solutions when products of rows run in float32."""
        gram_error = (
            FLOAT32_ROUNDING * self._dual.largest_square_norm()
            + FLOAT32_UNDERFLOW * self._rows.total_columns
        )
        return gram_error * self._dual.inverse_norm()

    def _recompute_gram(self) -> None:
        gram = self._rows.gram(exact=True)
        with uninterrupted():
            self._rows.exact = True
            self._dual.set_gram(gram)

    def _is_exact(self, x: Array) -> bool:
        """Whether products with x run in float64."""
        return self._rows.exact or itemsize(promote(x, self.dtype)) == 8

    def _cancels(self, x: Any, y: Any, smallest: float) -> bool:
        """Whether x − Gᵀc = λy is shorter than ``smallest`` of x, for some column.

        On a device that would mean to wait, and its products are in float64 anyway.
        """
        if not self._rows.home.is_host:
            return False
        # It is no shorter than λ/(λ + ‖G‖²/n) of x, and wrong by ε √cond(A) of x.
        if self._dual.norm() / self._dual.shift < smallest ** (-2 / 3):
            return False
        smallest *= math.sqrt(max(self._dual.condition(), 1.0))
        whole, rest = self._rows.square_norms(x), self._rows.square_norms(y)
        left = (rest * self._damping**2 >= whole * smallest**2) & np.isfinite(rest)
        return not bool(np.all(left))

    def _with_digits(self, what: str, x: Any, product: Callable[[], Any]) -> Any:
        """Return the product with x, after an exact Gram if it cancels, or with a warning."""
        y = product()
        first = x[0] if isinstance(x, list) else x
        if not self._is_exact(first) and self._cancels(x, y, SMALLEST_FLOAT32_REST):
            self._recompute_gram()
            y = product()
        if self._is_exact(first) and self._cancels(x, y, SMALLEST_REST):
            self._warn(what)
        return y

    def _with_rest(
        self, what: str, smallest: float, subtract: Callable[[], tuple[Any, ...]]
    ) -> Array:
        """Return a result, after an exact Gram if its subtractions ask for it, or with a warning.

        ``subtract`` returns the result, what subtractions left in it, what they began with, and
        what their rounding is relative to. Less than ``smallest`` left asks for an exact Gram.
        """
        result, rest, whole, noise = subtract()
        if smallest and self._rows.anywhere(bool(np.any(rest < whole * smallest))):
            self._recompute_gram()
            result, rest, whole, noise = subtract()
        if np.any(rest < np.maximum(whole, noise) * SMALLEST_REST):
            self._warn(what)
        return result

    def _smallest_rest(self, *, alone: bool = False) -> float:
        """Return the 1 − t of a diagonal element to which t's rounding is too much.

        ``alone`` where each rank asks for elements of its own: a new Gram would take all of them.
        """
        if alone and self._rows.reduce is not None:
            return 0.0
        return self._rows.rounding / LARGEST_DIAGONAL_ROUNDING

    def _noise(self, c: Array) -> Array:
        """Return ‖A‖ ‖c‖²/λ, which the rounding of bᵀA⁻¹b/λ is relative to, for c = A⁻¹b.

        A solution is exact for a matrix as far from A as rounding is from ‖A‖.
        """
        squares = to_numpy(self._rows.home.xp.sum(c * c, axis=0))
        return squares * self._dual.norm() / self._damping

    def _is_settled(self, before: Any, y: Any) -> bool:
        """Whether a step of refinement from ``before`` to y left an error that is small beside y.

        A step leaves of the error before it, which is the step's length, what solutions with the
        dual have as their relative error.
        """
        if not self._rows.home.is_host:
            return True
        rounding = self._solution_error() if self._rows.rounding else 0.0
        left = self._dual.condition() * 2.0**-52 + rounding
        pairs = zip(y, before, strict=True) if isinstance(y, list) else [(y, before)]
        step = self._rows.square_norms([new - old for new, old in pairs])
        limit = self._rows.square_norms(y) * LARGEST_REFINED_ERROR**2
        return bool(np.all(step * left**2 <= limit))

    def _warn(self, what: str) -> None:
        warnings.warn(
            f"{what} has few right digits: damping {self._damping:g} is too small beside the "
            "gradients' squared norms for float64; raise it",
            scipy.linalg.LinAlgWarning,
            stacklevel=2,
        )
