"""What the static and the sliding inverse share: every query from rows and dual."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, overload

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array, is_traced, send, to_numpy
from mfac_core._dual import Dual
from mfac_core._jax import traced
from mfac_core._operators.base import Indices
from mfac_core._operators.digits import Difference, Digits
from mfac_core._operators.lowrank import LowRankOperator
from mfac_core._ops import dense
from mfac_core._rows.base import first_of, widened
from mfac_core._typing import ArrayT


class DampedInverse(LowRankOperator[ArrayT]):
    """F⁻¹ for F = λI + GᵀG/n, from the rows G and the dual A = nλI + GGᵀ."""

    _dual: Dual
    _digits: Digits
    """Whether what is computed from rows and dual may be believed."""

    _exponent = -1.0

    @property
    def damping(self) -> float:
        """λ."""
        return self._damping

    @overload
    def matvec(self, x: ArrayT, *, refine: int = 0) -> ArrayT: ...
    @overload
    def matvec(self, x: list[ArrayT], *, refine: int = 0) -> list[ArrayT]: ...
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
        PyTorch and JAX differentiate it in x, the gradients held being constants; of a window,
        before it changes.
        """
        return self._multiplied(self._query(refine), x, "x", (1,))

    @overload
    def matmat(self, x: ArrayT, *, refine: int = 0) -> ArrayT: ...
    @overload
    def matmat(self, x: list[ArrayT], *, refine: int = 0) -> list[ArrayT]: ...
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
        return self._multiplied(self._query(refine), x, "x", (2,))

    def diagonal(self) -> ArrayT:
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
        return super().logdet()

    def _settle(self) -> None:
        self._digits.settle()

    # -- products --------------------------------------------------------------------------

    def _query(self, refine: Any) -> Callable[[Any], Any]:
        steps = check.integer(refine, "refine", minimum=0)
        return functools.partial(self._refined, steps=steps) if steps else self._apply

    def _apply(self, x: Any) -> Any:
        if is_traced(first_of(x)):
            return traced.apply(self._like(), x, self._damping, self._divisor, self._solve_traced)
        return self._digits.product("F⁻¹x", x, self._formula, self._corrected)

    def _formula(self, x: Any) -> tuple[Any, Array]:
        """F⁻¹x = (x − Gᵀc)/λ, and c = A⁻¹Gx."""
        c, alpha = self._dual.solve(self._rows.project(x)), 1.0 / self._damping
        return self._rows.combine(-alpha * c, x, alpha, dtype=self._product_dtype(x)), c

    def _refined(self, x: Any, steps: int) -> Any:
        """F⁻¹x with passes in float64, and residuals taken through G instead of through its Gram.

        For y = (x − Gᵀc)/λ the residual x − Fy is Gᵀe with e = c − Gy/n, and F⁻¹Gᵀe = n GᵀA⁻¹e:
        a step is one projection and one combination, and subtracts nothing large.
        """
        y, before = self._steps(x, steps)
        if self._digits.refined(before, y):
            y, before = self._steps(x, steps)
            self._digits.refined(before, y)
        return self._given_back(y, x)

    def _corrected(self, x: Any, c: Array) -> Any:
        """F⁻¹x = (x − Gᵀc)/λ by passes in float64, and a step of refinement from c = A⁻¹Gx on."""
        return self._given_back(self._steps(x, 1, c)[0], x)

    def _given_back(self, y: Any, x: Any) -> Any:
        """Return a product that was taken in float64 as one with x has to be."""
        dtype = self._product_dtype(x)
        if isinstance(x, list):
            return [send(z, piece, dtype) for z, piece in zip(y, x, strict=True)]
        return send(y, self._like(), dtype)

    def _steps(self, x: Any, steps: int, c: Array | None = None) -> tuple[Any, Any]:
        """Return F⁻¹x after some steps of refinement, and before the last of them."""
        n, damping = self._divisor, self._damping
        wide = widened(x)
        if c is None:
            c = self._dual.solve(self._rows.project(wide))
        y = self._rows.combine_wide(-c / damping, wide, 1.0 / damping)
        for _ in range(steps):
            change = n * self._dual.solve(c - self._rows.project(y) / n)
            before, y = y, self._rows.combine_wide(change, y, 1.0)
            c = c - damping * change
        return y, before

    def _column(self, j: int) -> Array:
        self._columns_known()

        def formula(unit: Array) -> tuple[Array, Array]:
            c, alpha = self._dual.solve(self._rows.take(np.array([j]))[:, 0]), 1.0 / self._damping
            return self._rows.combine(-alpha * c, unit, alpha, dtype=unit.dtype), c

        return self._digits.product("A column of F⁻¹", self._unit(j), formula, self._corrected)

    def _spread(self, z: Array) -> Any:
        """Return Gᵀ A⁻¹ z, in the gradients' library and dtype."""
        return self._rows.combine(self._dual.solve(z), None, 1.0, dtype=self._rows.like.dtype)

    def _sample(self, n: int, rng: np.random.Generator) -> Array:
        # F⁻¹ of a draw from N(0, F) has covariance F⁻¹ F F⁻¹.
        return self._apply(self._fisher_sample(n, rng))

    def _solve_traced(self, b: Any) -> Any:
        return self._dual.solve(self._rows.home.receive(b)).astype(b.dtype)

    # -- numbers ---------------------------------------------------------------------------

    def _diagonal(self) -> Array:
        def formula() -> Difference:
            here = self._rows.home
            parts, smallest = [here.zeros(0)], 1.0
            for home, block in self._rows.wide_blocks():
                whitened = self._dual.whiten(block, home)
                values, rest = dense.clamped_diagonal(
                    home, whitened, block, self._damping, self._divisor
                )
                smallest = min(smallest, float(home.xp.min(rest)))
                parts.append(here.receive(values))
            return Difference(here.xp.concat(parts), left=smallest, whole=1.0, noise=0.0)

        smallest = self._digits.smallest_element()
        return self._digits.difference("The diagonal of F⁻¹", smallest, formula)

    def _quadratic(self, x: Any) -> Array:
        def formula() -> Difference:
            b = self._rows.project(x)
            c = self._dual.solve(b)
            whole = self._rows.square_norms(x) / self._damping
            value = whole - to_numpy(self._rows.home.xp.sum(b * c, axis=0)) / self._damping
            return Difference(value, left=value, whole=whole, noise=self._digits.noise(c))

        smallest = self._digits.smallest_quadratic(x)
        return self._digits.difference("xᵀF⁻¹x", smallest, formula)

    def _entries(self, rows: Indices, cols: Indices) -> Array:
        same = rows == cols

        def formula() -> Difference:
            noise = [np.zeros(0)]

            def middle(b: Array) -> Array:
                c = self._dual.solve(b)
                noise.append(self._digits.noise(c))
                return -c / self._damping

            value = self._rows.bilinear(rows, cols, middle) + same / self._damping
            return Difference(value, value[same], 1.0 / self._damping, np.concatenate(noise)[same])

        smallest = self._digits.smallest_element(alone=True)
        return self._digits.difference("An element of F⁻¹", smallest, formula)

    def _submatrix(self, indices: Indices) -> Array:
        same = indices[:, None] == indices

        def formula() -> Difference:
            columns = self._rows.take(indices)
            c = self._dual.solve(columns)
            product = to_numpy(columns.T @ c)
            value = (same - (product + product.T) / 2) / self._damping
            whole, noise = 1.0 / self._damping, self._digits.noise(c)
            return Difference(value, np.diagonal(value), whole, noise)

        smallest = self._digits.smallest_element(alone=True)
        return self._digits.difference("A submatrix of F⁻¹", smallest, formula)

    def _logdet(self) -> float:
        self._digits.look_at_pivots("log det F⁻¹")
        return -self._fisher_logdet(self._dual.logdet())
