"""What the static and the sliding inverse share: every query from rows and dual."""

from __future__ import annotations

from typing import Any

import numpy as np

from mfac_core._arrays import Array, is_traced, promote, send, to_numpy, widen
from mfac_core._jax import traced as _traced
from mfac_core._operators.base import Indices
from mfac_core._operators.digits import SMALLEST_REST, DualOperator
from mfac_core._operators.guard import serialised
from mfac_core._operators.lowrank import LowRankOperator
from mfac_core._ops import dense
from mfac_core._rows.base import SMALLEST_FLOAT32_REST


class DampedInverse(DualOperator):
    """F⁻¹ for F = λI + GᵀG/n, from the rows G and the dual A = nλI + GGᵀ."""

    _exponent = -1.0

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
        self._settle()

        def diagonal() -> tuple[Any, ...]:
            parts, smallest = [], 1.0
            for home, block in self._rows.wide_blocks():
                whitened = self._dual.whiten(block, home)
                values, rest = dense.clamped_diagonal(
                    home, whitened, block, self._damping, self._divisor
                )
                smallest = min(smallest, float(home.xp.min(rest)))
                parts.append(to_numpy(values))
            return np.concatenate(parts), smallest, 1.0, 0.0

        return self._with_rest("The diagonal of F⁻¹", self._smallest_rest(), diagonal)

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

    @serialised
    def _quadratic(self, x: Any) -> Array:
        self._settle()
        exact = self._is_exact(x[0] if isinstance(x, list) else x)
        smallest = 0.0 if exact else SMALLEST_FLOAT32_REST

        def quadratic() -> tuple[Any, ...]:
            b = self._rows.project(x)
            c = self._dual.solve(b)
            whole = self._rows.square_norms(x) / self._damping
            second = to_numpy(self._rows.home.xp.sum(b * c, axis=0)) / self._damping
            return whole - second, whole - second, whole, self._noise(c)

        return self._with_rest("xᵀF⁻¹x", smallest, quadratic)

    @serialised
    def _entries(self, rows: Indices, cols: Indices) -> Array:
        self._settle()
        same = rows == cols

        def entries() -> tuple[Any, ...]:
            noise = [np.zeros(0)]

            def middle(b: Array) -> Array:
                c = self._dual.solve(b)
                noise.append(self._noise(c))
                return -c / self._damping

            values = self._rows.bilinear(rows, cols, middle) + same / self._damping
            return values, values[same], 1.0 / self._damping, np.concatenate(noise)[same]

        return self._with_rest("An element of F⁻¹", self._smallest_rest(alone=True), entries)

    @serialised
    def _submatrix(self, indices: Indices) -> Array:
        self._settle()
        same = indices[:, None] == indices

        def submatrix() -> tuple[Any, ...]:
            columns = self._rows.take(indices)
            c = self._dual.solve(columns)
            product = to_numpy(columns.T @ c)
            values = (same - (product + product.T) / 2) / self._damping
            return values, np.diagonal(values), 1.0 / self._damping, self._noise(c)

        return self._with_rest("A submatrix of F⁻¹", self._smallest_rest(alone=True), submatrix)

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

    @serialised
    def _spread(self, z: Array) -> Any:
        """Return Gᵀ A⁻¹ z, in the gradients' library and dtype."""
        self._settle()
        return self._rows.combine(self._dual.solve(z), None, 1.0, dtype=self.dtype)

    def _solve_traced(self, b: Any) -> Any:
        home = self._rows.home
        return self._dual.solve(home.receive(b)).astype(b.dtype)
