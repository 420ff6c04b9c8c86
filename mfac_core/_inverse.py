"""What the static and the sliding inverse share: every query from rows and dual."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy

from mfac_core import _traced
from mfac_core._arrays import Array, is_traced, itemsize, promote, send, to_numpy, widen
from mfac_core._dual import Dual
from mfac_core._guard import serialised, uninterrupted
from mfac_core._lowrank import LowRankOperator
from mfac_core._operator import Indices
from mfac_core._ops import dense
from mfac_core._rows import FLOAT32_ROUNDING, FLOAT32_UNDERFLOW, SMALLEST_FLOAT32_REST

LARGEST_DIAGONAL_ROUNDING = 1e-5
"""Rounding of the Gram relative to 1 − t, above which the diagonal asks for float64 products."""

SMALLEST_REST = 2.0**-44
"""What 1 − t, and ‖x − Gᵀc‖ / ‖x‖, must leave in float64 for three right digits."""

LARGEST_REFINED_ERROR = 2.0**-6
"""Estimated relative error of a refined product from which on a warning is due."""


class DampedInverse(LowRankOperator):
    """F⁻¹ for F = λI + GᵀG/n, from the rows G and the dual A = nλI + GGᵀ."""

    _exponent = -1.0

    _largest_rounding: float
    """Error of solutions due to float32 products above which products run in float64."""

    _dual: Dual
    _checked: bool
    """Whether the Gram is known to be accurate enough for the dual's condition."""

    @property
    def damping(self) -> float:
        """λ."""
        return self._damping

    @property
    def _alpha(self) -> float:
        return 1.0 / self._damping

    def _middle(self, b: Array) -> Array:
        self._settle()
        return -self._dual.solve(b) / self._damping

    def matvec(self, x: Any, *, refine: int = 0) -> Any:
        """Return F⁻¹x = (x − Gᵀ A⁻¹ G x) / λ.

        Parameters
        ----------
        x : array, shape (d,)
            Real floating, of the gradients' library and device. For gradients in several parts
            also a list of pieces, one beside each part.
        refine : int, default 0
            Steps of refinement in float64. Worth it for λ far below the gradients' mean square
            and x in their span, where the subtraction cancels; float32 passes alone then lose
            about F's condition number times 6e-8.

        Returns
        -------
        array, shape (d,)
            In the promoted dtype of ``x`` and the gradients; a list of pieces for a list.

        Raises
        ------
        TypeError
            If ``x`` is not a real floating array of the gradients' library.
        ValueError
            If its shape or device is another, or ``refine`` is negative.

        Warns
        -----
        scipy.linalg.LinAlgWarning
            If λ is so small beside the gradients' squared norms that next to nothing is left of
            ``x`` in the subtraction: for this ``x`` F is singular in float64. With ``refine``, if
            the steps were too few by what the last of them changed. Not looked for on a CUDA
            device, where that would mean to wait.

        Notes
        -----
        Two passes over G and O(m²); each step of refinement costs two more passes, in float64.
        """
        return self._product(x, "x", (1,), refine)

    def matmat(self, x: Any, *, refine: int = 0) -> Any:
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

        Warns
        -----
        scipy.linalg.LinAlgWarning
            If 1 − Σₖ Wₖᵢ² is hardly more than its rounding for some i.

        Notes
        -----
        d·m² multiplications in float64, streaming over blocks of columns: nothing of size m × d
        is stored.
        """
        return super().diagonal()

    @serialised
    def logdet(self) -> float:
        """Return log det F⁻¹ = −(d log λ + log det (A/(nλ))).

        Returns
        -------
        float
            The logarithm of the determinant of the inverse.

        Notes
        -----
        O(m), or O(m³) where the dual is not factored at the moment.
        """
        self._settle()
        if self._dual.smallest_pivot() < SMALLEST_REST * self._dual.largest_square_norm():
            self._warn("log det F⁻¹")
        return -(self._fisher_logdet_scale + self._dual.logdet())

    @serialised
    def _diagonal(self) -> Array:
        diagonal, smallest = self._clamped_diagonal()
        # 1 − t has lost what t's rounding is to it.
        lost = self._rows.rounding > LARGEST_DIAGONAL_ROUNDING * smallest
        if self._rows.anywhere(lost):
            self._recompute_gram()
            diagonal, smallest = self._clamped_diagonal()
        if smallest < SMALLEST_REST:
            self._warn("The diagonal of F⁻¹")
        return diagonal

    def _clamped_diagonal(self) -> tuple[Array, float]:
        """Return the diagonal, and the smallest 1 − t it was computed from."""
        self._settle()
        parts, smallest = [], 1.0
        for home, block in self._rows.wide_blocks():
            whitened = self._dual.whiten(block, home)
            diagonal, rest = dense.clamped_diagonal(
                home, whitened, block, self._damping, self._divisor
            )
            smallest = min(smallest, float(home.xp.min(rest)))
            parts.append(to_numpy(diagonal))
        return np.concatenate(parts), max(smallest, 0.0)

    @serialised
    def _sample(self, n: int, rng: np.random.Generator) -> Array:
        # F⁻¹ of a draw from N(0, F) has covariance F⁻¹ F F⁻¹.
        return self._apply(self._fisher_sample(n, rng), 0)

    @serialised
    def _apply(self, x: Any, refine: int) -> Any:
        self._settle()
        if is_traced(x[0] if isinstance(x, list) else x):
            return _traced.apply(self._like(), x, self._damping, self._solve_traced)
        if refine:
            return self._refined(x, refine)
        return self._with_digits("F⁻¹x", x, lambda: LowRankOperator._apply(self, x, 0))

    @serialised
    def _column(self, j: int) -> Array:
        unit = self._unit(j)
        return self._with_digits("A column of F⁻¹", unit, lambda: LowRankOperator._column(self, j))

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

    @serialised
    def _quadratic(self, x: Any) -> Array:
        self._settle()
        exact = self._is_exact(x[0] if isinstance(x, list) else x)
        smallest = 0.0 if exact else SMALLEST_FLOAT32_REST

        def quadratic() -> tuple[Array, ...]:
            value, whole, noise = self._difference(x)
            return value, value, whole, noise

        return self._with_rest("xᵀF⁻¹x", smallest, quadratic)

    @serialised
    def _entries(self, rows: Indices, cols: Indices) -> Array:
        self._settle()
        same = rows == cols

        def entries() -> tuple[Array, ...]:
            noise = [np.zeros(0)]

            def middle(b: Array) -> Array:
                c = self._dual.solve(b)
                noise.append(self._noise(c))
                return -c / self._damping

            values = self._rows.bilinear(rows, cols, middle) + same / self._damping
            return values, values[same], 1.0 / self._damping, np.concatenate(noise)[same]

        return self._with_rest("An element of F⁻¹", self._smallest_element_rest(), entries)

    @serialised
    def _submatrix(self, indices: Indices) -> Array:
        self._settle()
        same = indices[:, None] == indices

        def submatrix() -> tuple[Array, ...]:
            columns = self._rows.take(indices)
            c = self._dual.solve(columns)
            dense = to_numpy(columns.T @ c)
            dense = (same - (dense + dense.T) / 2) / self._damping
            return dense, np.diagonal(dense), 1.0 / self._damping, self._noise(c)

        return self._with_rest("A submatrix of F⁻¹", self._smallest_element_rest(), submatrix)

    def _smallest_element_rest(self) -> float:
        """Return the 1 − t of a diagonal element below which the Gram's rounding is too much."""
        if self._rows.reduce is not None:
            return 0.0  # each rank asks for elements of its own, and a new Gram takes all of them
        return self._rows.rounding / LARGEST_DIAGONAL_ROUNDING

    def _with_rest(
        self, what: str, smallest: float, subtract: Callable[[], tuple[Array, ...]]
    ) -> Array:
        """Return a result, after an exact Gram if its subtractions ask for it, or with a warning.

        ``subtract`` returns the result, what subtractions left in it, what they began with, and
        what their rounding is relative to. Less than ``smallest`` left asks for an exact Gram.
        """
        result, rest, whole, noise = subtract()
        if np.any(rest < whole * smallest):
            self._recompute_gram()
            result, rest, whole, noise = subtract()
        if np.any(rest < np.maximum(whole, noise) * SMALLEST_REST):
            self._warn(what)
        return result

    def _difference(self, x: Any) -> tuple[Array, Array, Array]:
        """Return (‖x‖² − bᵀA⁻¹b)/λ for b = Gx, its first term, and the noise of the second."""
        b = self._rows.project(x)
        c = self._dual.solve(b)
        whole = self._rows.square_norms(x) / self._damping
        second = to_numpy(self._rows.home.xp.sum(b * c, axis=0)) / self._damping
        return whole - second, whole, self._noise(c)

    def _noise(self, c: Array) -> Array:
        """Return ‖A‖ ‖c‖²/λ, which the rounding of bᵀA⁻¹b/λ is relative to, for c = A⁻¹b.

        A solution is exact for a matrix as far from A as rounding is from ‖A‖.
        """
        squares = to_numpy(self._rows.home.xp.sum(c * c, axis=0))
        return squares * (self._dual.shift + self._dual.gram_norm()) / self._damping

    def _refined(self, x: Any, steps: int) -> Any:
        """F⁻¹x with passes in float64, and residuals taken through G instead of through its Gram.

        For y = (x − Gᵀc)/λ the residual x − Fy is Gᵀe with e = c − Gy/n, and F⁻¹Gᵀe = n GᵀA⁻¹e:
        a step is one projection and one combination, and subtracts nothing large.
        """
        n, damping = self._divisor, self._damping
        wide = [widen(piece) for piece in x] if isinstance(x, list) else widen(x)
        c = self._dual.solve(self._rows.project(wide))
        y = self._rows.combine_wide(-c / damping, wide, 1.0 / damping)
        for _ in range(steps):
            change = n * self._dual.solve(c - self._rows.project(y) / n)
            before, y = y, self._rows.combine_wide(change, y, 1.0)
            c = c - damping * change
        if not self._is_settled(before, y):
            self._warn("F⁻¹x")
        if isinstance(x, list):
            return [
                send(z, piece, promote(piece, self.dtype)) for z, piece in zip(y, x, strict=True)
            ]
        return send(y, self._like(), promote(x, self.dtype))

    def _is_settled(self, before: Any, y: Any) -> bool:
        """Whether a step of refinement from ``before`` to y left an error that is small beside y.

        A step leaves of the error before it, which is the step's length, what solutions with the
        dual have as their relative error.
        """
        if not self._rows.home.is_host:
            return True
        condition = (self._dual.shift + self._dual.gram_norm()) * self._dual.inverse_norm()
        left = condition * 2.0**-52 + (self._solution_error() if self._rows.rounding else 0.0)
        pairs = zip(y, before, strict=True) if isinstance(y, list) else [(y, before)]
        step = self._rows.square_norms([new - old for new, old in pairs])
        limit = self._rows.square_norms(y) * LARGEST_REFINED_ERROR**2
        return bool(np.all(step * left**2 <= limit))

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
        shift, norm = self._dual.shift, self._dual.gram_norm()
        if 1.0 + norm / shift < smallest ** (-2 / 3):
            return False
        smallest *= math.sqrt(max((shift + norm) * self._dual.inverse_norm(), 1.0))
        whole, rest = self._rows.square_norms(x), self._rows.square_norms(y)
        left = (rest * self._damping**2 >= whole * smallest**2) & np.isfinite(rest)
        return not bool(np.all(left))

    def _warn(self, what: str) -> None:
        warnings.warn(
            f"{what} has few right digits: damping {self._damping:g} is too small beside the "
            "gradients' squared norms for float64; raise it",
            scipy.linalg.LinAlgWarning,
            stacklevel=2,
        )

    @serialised
    def _spread(self, z: Array) -> Any:
        """Return Gᵀ A⁻¹ z, in the gradients' library and dtype."""
        self._settle()
        return self._rows.combine(self._dual.solve(z), None, 1.0, dtype=self.dtype)

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
            + FLOAT32_UNDERFLOW * self._rows.total_columns
        )
        return gram_error * self._dual.inverse_norm()

    def _recompute_gram(self) -> None:
        gram = self._rows.gram(exact=True)
        with uninterrupted():
            self._rows.exact = True
            self._dual.set_gram(gram)
