"""What the static and the sliding inverse share: products and diagonal from rows and dual."""

from __future__ import annotations

from typing import Any

from mfac_core import _traced
from mfac_core._arrays import Array, is_traced, promote, send, widen
from mfac_core._dual import Dual
from mfac_core._operator import SymmetricOperator
from mfac_core._ops import dense
from mfac_core._rows import FLOAT32_ROUNDING, FLOAT32_UNDERFLOW, Rows

LARGEST_DIAGONAL_ROUNDING = 1e-5
"""Rounding of the Gram relative to 1 − t, above which the diagonal asks for float64 products."""


class DampedInverse(SymmetricOperator):
    """F⁻¹ for F = λI + GᵀG/n, from the rows G and the dual A = nλI + GGᵀ."""

    _largest_rounding: float
    """Error of solutions due to float32 products above which products run in float64."""

    _rows: Rows
    _dual: Dual
    _damping: float
    _checked: bool
    """Whether the Gram is known to be accurate enough for the dual's condition."""

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
        """The device of the gradients."""
        return self._rows.device

    @property
    def damping(self) -> float:
        """λ."""
        return self._damping

    @property
    def _divisor(self) -> int:
        """The n of F = λI + GᵀG/n."""
        return self._rows.shape[0]

    def _like(self) -> Array:
        return self._rows.array

    def matvec(self, x: Array, *, refine: int = 0) -> Array:
        """Return F⁻¹x = (x − Gᵀ A⁻¹ G x) / λ.

        Parameters
        ----------
        x : array, shape (d,)
            Real floating, of the gradients' library and device.
        refine : int, default 0
            Steps of refinement in float64. Worth it for λ far below the gradients' mean square
            and x in their span, where the subtraction cancels; float32 passes alone then lose
            about F's condition number times 6e-8.

        Returns
        -------
        array, shape (d,)
            In the promoted dtype of ``x`` and the gradients.

        Raises
        ------
        TypeError
            If ``x`` is not a real floating array of the gradients' library.
        ValueError
            If its shape or device is another, or ``refine`` is negative.

        Notes
        -----
        Two passes over G and O(m²); each step of refinement costs two more passes, in float64.
        """
        return self._product(x, "x", (1,), refine)

    def matmat(self, x: Array, *, refine: int = 0) -> Array:
        """Return F⁻¹X for a matrix of columns, at the speed of matrix products.

        Parameters
        ----------
        x : array, shape (d, k)
            Real floating, of the gradients' library and device.
        refine : int, default 0
            See :meth:`matvec`.

        Returns
        -------
        array, shape (d, k)
            In the promoted dtype of ``x`` and the gradients.
        """
        return self._product(x, "x", (2,), refine)

    def diagonal(self) -> Array:
        """Return diag F⁻¹ = (1 − Σₖ Wₖᵢ²) / λ with W = L⁻¹G, A = L Lᵀ.

        Returns
        -------
        array, shape (d,)
            In the gradients' dtype, each element within [1/Fᵢᵢ, 1/λ] and so positive.

        Notes
        -----
        d·m² multiplications in float64, streaming over blocks of columns: nothing of size m × d
        is stored.
        """
        diagonal, smallest = self._diagonal()
        # 1 − t has lost what t's rounding is to it.
        if self._rows.rounding > LARGEST_DIAGONAL_ROUNDING * smallest:
            self._recompute_gram()
            diagonal, _ = self._diagonal()
        return send(diagonal, self._like(), self.dtype)

    def _diagonal(self) -> tuple[Array, float]:
        """Return the diagonal in the home and the smallest 1 − t it was computed from."""
        self._settle()
        xp, damping = self._rows.home.xp, self._damping
        parts, smallest = [], 1.0
        for _, block in self._rows.wide_blocks():
            whitened = self._dual.whiten(block)
            diagonal, rest = dense.clamped_diagonal(
                self._rows.home, whitened, block, damping, self._divisor
            )
            smallest = min(smallest, float(xp.min(rest)))
            parts.append(diagonal)
        return xp.concat(parts), max(smallest, 0.0)

    def _apply(self, x: Array, refine: int) -> Array:
        dtype = promote(x, self.dtype)
        self._settle()
        if is_traced(x):
            return _traced.apply(self._like(), x, self._damping, self._solve_traced)
        if refine:
            return send(self._refined(widen(x), refine), self._like(), dtype)
        c = self._dual.solve(self._rows.project(x))
        return self._rows.combine(-c / self._damping, x, 1.0 / self._damping, dtype=dtype)

    def _refined(self, x: Array, steps: int) -> Array:
        """F⁻¹x in float64, with residuals taken through G instead of through its Gram.

        For y = (x − Gᵀc)/λ the residual x − Fy is Gᵀe with e = c − Gy/n, and F⁻¹Gᵀe = n GᵀA⁻¹e:
        a step is one projection and one combination, and subtracts nothing large.
        """
        n, damping = self._divisor, self._damping
        c = self._dual.solve(self._rows.project(x))
        y = self._rows.combine_wide(-c / damping, x, 1.0 / damping)
        for _ in range(steps):
            change = n * self._dual.solve(c - self._rows.project(y) / n)
            y = self._rows.combine_wide(change, y, 1.0)
            c = c - damping * change
        return y

    def _solve_traced(self, b: Any) -> Any:
        home = self._rows.home
        return self._dual.solve(home.receive(b)).astype(b.dtype)

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
            + FLOAT32_UNDERFLOW * self._rows.shape[1]
        )
        return gram_error * self._dual.inverse_norm()

    def _recompute_gram(self) -> None:
        self._rows.exact = True
        self._dual.set_gram(self._rows.gram())
