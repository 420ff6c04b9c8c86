"""The m-sized half: A = shift·I + GGᵀ in float64, and its inverse.

It knows nothing of d, of devices or of where the gradients are. While the matrix stands still it
is factored by Cholesky. When rows are replaced one at a time it keeps K = A⁻¹ instead and updates
it in O(m²); errors of K that build up are taken out of every solution by refinement against the
exactly kept A, and K is computed afresh when refinement has too much to do, and at least every m
replacements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import array_api_extra as xpx
import numpy as np
import scipy

from mfac_core._arrays import Array, Home, to_numpy
from mfac_core._ops import dense
from mfac_core._warn import warn

LARGEST_CORRECTION = 1e-4
"""Relative size of a solution's first correction above which K is given up."""

SMALL_CORRECTION = 1e-7
"""Relative size below which a second correction would change nothing: it is the square."""

POWER_STEPS = 4
"""Steps of the power iteration that estimates ‖A⁻¹‖."""

LARGEST_LIFTS = 8
"""Attempts to factor a matrix that rounding has made indefinite, each lifted eight times more."""


class Dual:
    """A = shift·I + gram, symmetric positive definite, (m, m).

    Parameters
    ----------
    gram : array
        G Gᵀ, float64 in ``home``; the dual takes it over.
    shift : float
        Divisor times damping.
    home : Home
        Where the matrices live.
    """

    def __init__(self, gram: Array, shift: float, home: Home) -> None:
        self.home = home
        self.gram = gram
        self.shift = shift
        self._factor: Array | None = None
        self._inverse: Array | None = None
        self._replaced = 0  # rows replaced since K was computed
        self._norm: float | None = None  # of the Gram
        self._sensitivity: float | None = None
        self._probe: Array | None = None  # last vector of the power iteration
        self.doubt: Array | None = None  # on a device, [0] or more where K is to be given up

    def __len__(self) -> int:
        return int(self.gram.shape[0])

    # -- changes ---------------------------------------------------------------------------

    def set_shift(self, shift: float) -> None:
        """Change the shift: every eigenvalue moves, so that the next solution factors anew."""
        if shift != self.shift:
            self.shift = shift
            self.forget()

    def set_gram(self, gram: Array) -> None:
        """Exchange the Gram, for one computed more accurately or of other gradients."""
        self.gram, self._norm = gram, None
        self.forget()

    def forget(self) -> None:
        """Drop what was derived from the matrix."""
        self._factor = self._inverse = self._probe = self.doubt = self._sensitivity = None
        self._replaced = 0

    def grow(self) -> None:
        """Append a zero row and column to the Gram."""
        self.gram = self._bordered(self.gram, 0.0)
        if self._factor is not None:
            self._factor = self._bordered(self._factor, self.shift**0.5)
        if self._inverse is not None:
            self._inverse = self._bordered(self._inverse, 1.0 / self.shift)

    def replace(self, i: int, row: Array) -> None:
        """Exchange row and column i of the Gram; O(m²) where an inverse is known."""
        self.discard_if_doubtful()
        if self._inverse is None and self._factor is not None:
            self._inverse = dense.inverse(self.home, self._matrix(self.shift))
            self._replaced = 0
        self._factor = self._norm = self._sensitivity = None
        if self._inverse is not None and self._replaced >= max(len(self), 16):
            self._inverse = None
        if self._inverse is not None:
            self._replaced += 1
            self.doubt = dense.replace(self._inverse, self.gram, i, row, self.shift)
            if self.doubt is not None:  # on a device, which has done it all
                return
            self._inverse = self._replaced_inverse(self._inverse, i, row)
        self.gram[i, :] = row
        self.gram[:, i] = row

    def _replaced_inverse(self, inverse: Array, i: int, row: Array) -> Array | None:
        """K of the changed matrix: delete index i, insert it again by its Schur complement.

        With k = K eᵢ the deletion is K − k kᵀ/kᵢᵢ. With b the new row without its diagonal entry,
        u = K_deleted b and s = Aᵢᵢ − bᵀu the insertion adds v vᵀ/s, v = u − eᵢ.
        """
        k = self.home.xp.asarray(inverse[:, i], copy=True)
        b = self.home.xp.asarray(row, copy=True)
        b[i] = 0.0
        pivot = float(k[i])
        if not pivot > 0.0:
            return None
        v = inverse @ b - k * (float(k @ b) / pivot)
        schur = self.shift + float(row[i]) - float(b @ v)
        if not schur > 0.5 * self.shift:  # at least the shift, had there been no rounding
            return None
        v[i] = -1.0
        pair = self.home.xp.stack([k / pivot**0.5, v / schur**0.5], axis=1)
        return dense.add_rank_two(self.home, inverse, pair, (-1.0, 1.0))

    def _bordered(self, a: Array, corner: float) -> Array:
        larger = xpx.pad(a, (0, 1), xp=self.home.xp)
        larger[-1, -1] = corner
        return larger

    # -- queries ---------------------------------------------------------------------------

    def solve(self, b: Array) -> Array:
        """A⁻¹b for b of shape (m,) or (m, k)."""
        if self.doubt is not None:
            self.discard_if_doubtful()
        if self._inverse is not None:
            y = self._refined(b, self._inverse @ b)
            if y is not None:
                return y
            self._inverse = None
        factor = self.factor() if self._factor is None else self._factor
        return dense.cholesky_solve(self.home, factor, b)

    def column(self, i: int) -> Array:
        """A⁻¹eᵢ, shape (m,); to be asked for again where K is then found doubtful."""
        e = self.home.zeros(len(self))
        e[i] = 1.0
        if self.doubt is not None and self._inverse is not None:
            return self._refined_unseen(e, self._inverse[:, i])
        if self._inverse is not None:
            y = self._refined(e, self._inverse[:, i])
            if y is not None:
                return y
            self._inverse = None
        return dense.cholesky_solve(self.home, self.factor(), e)

    def discard_if_doubtful(self, found: float | None = None) -> bool:
        """Give K up where a device has found it too far from A⁻¹; whether it has.

        Waits for :attr:`doubt`, unless the caller has looked at it and says what was ``found``.
        """
        if self.doubt is None:
            return False
        found = self.doubt[0] if found is None else found
        self.doubt = None
        if bool(found):
            self._inverse = None
            return True
        return False

    def factor(self) -> Array:
        """Return the lower triangular Cholesky factor of A."""
        factor = self._known_factor()
        if factor is not None:
            return factor
        # A shift below the rounding of the Gram may leave A indefinite: raise it to there.
        lift = len(self) * 2.0**-52 * self.largest_square_norm()
        for _ in range(LARGEST_LIFTS):
            factor = dense.cholesky(self.home, self._matrix(self.shift + lift))
            if factor is not None:
                self._factor = factor
                warn(
                    f"the dual nλI + GGᵀ is singular in float64, and its nλ = {self.shift:g} was "
                    f"taken as {self.shift + lift:g}; raise the damping",
                    scipy.linalg.LinAlgWarning,
                )
                return factor
            lift *= 8.0
        msg = "the Gram of the gradients is not positive semidefinite, or not finite"
        raise np.linalg.LinAlgError(msg)

    def is_indefinite(self) -> bool:
        """Whether A has no Cholesky factor; O(m³) after a change."""
        return self._inverse is None and self._known_factor() is None

    def _known_factor(self) -> Array | None:
        """Return the Cholesky factor, computed once; None where A is not positive definite."""
        factor = self._factor
        if factor is None:
            factor = self._factor = dense.cholesky(self.home, self._matrix(self.shift))
        return factor

    def whiten(self, b: Array, home: Home) -> Array:
        """L⁻¹b with A = L Lᵀ, where b is."""
        return dense.solve_lower(home, home.receive(self.factor()), b)

    def logdet(self) -> float:
        """Return log det (A / shift) = 2 Σ log (Lₖₖ / √shift), each term by itself."""
        diagonal = self.home.xp.linalg.diagonal(self.factor())
        return 2.0 * float(self.home.xp.sum(self.home.xp.log(diagonal / math.sqrt(self.shift))))

    def smallest_pivot(self) -> float:
        """Return min Lₖₖ²: what elimination has left of the least of A's diagonal elements."""
        if not len(self):
            return self.shift
        return float(self.home.xp.min(self.home.xp.linalg.diagonal(self.factor()))) ** 2

    def inverse_norm(self) -> float:
        """Estimate ‖A⁻¹‖₂ by power iteration, from below; infinite where A is indefinite.

        O(m²) where the inverse or the factor is known.
        """
        self.discard_if_doubtful()
        if self.is_indefinite():
            return math.inf
        n = len(self)
        if self._probe is None or self._probe.shape[0] != n:
            self._probe = self.home.receive(np.cos(np.arange(n) * 2.399963))
            steps = POWER_STEPS
        else:  # it goes on from where the matrix was a row ago
            steps = 1
        norm = 0.0
        for _ in range(steps):
            y = self._probe / math.sqrt(float(self._probe @ self._probe))
            if self._inverse is not None:
                self._probe = self._inverse @ y
            else:
                self._probe = dense.cholesky_solve(self.home, self._factor, y)
            norm = math.sqrt(float(self._probe @ self._probe))
        if not math.isfinite(norm):
            self._probe = None
        return norm

    def sensitivity(self) -> float:
        """Return √(Σ ‖gᵢ‖²[A⁻¹]ᵢᵢ), which errors of the products with rows grow by in Gᵀ A⁻¹ G x.

        Those are relative to ‖gᵢ‖‖x‖, and ‖Gᵀ A⁻¹ e‖² ≤ eᵀ A⁻¹ e. O(m³) after a change, or O(m)
        where an inverse is known; infinite where A is indefinite.
        """
        if self._sensitivity is None:
            xp = self.home.xp
            if self._inverse is not None:
                inverse = xp.linalg.diagonal(self._inverse)
            elif self._known_factor() is None:
                return math.inf
            else:
                half = dense.inverse_lower(self.home, self._factor)
                inverse = xp.sum(half * half, axis=0)
            self._sensitivity = math.sqrt(max(float(xp.sum(self._diagonal() * inverse)), 0.0))
        return self._sensitivity

    def largest_sensitivity(self) -> float:
        """Return √(Σ ‖gᵢ‖² / shift), which :meth:`sensitivity` is no more than; O(m)."""
        return math.sqrt(float(self.home.xp.sum(self._diagonal())) / self.shift)

    def norm(self) -> float:
        """Return shift + ‖GGᵀ‖∞, which is no less than ‖A‖₂; O(m²) after a change."""
        if self._norm is None:
            xp = self.home.xp
            sums = xp.sum(xp.abs(self.gram), axis=1)
            self._norm = float(xp.max(sums)) if len(self) else 0.0
        return self.shift + self._norm

    def condition(self) -> float:
        """Estimate ‖A‖ ‖A⁻¹‖, see :meth:`norm` and :meth:`inverse_norm`."""
        return self.norm() * self.inverse_norm()

    def largest_square_norm(self) -> float:
        """Return max ‖gᵢ‖²."""
        if not len(self):
            return 0.0
        return float(self.home.xp.max(self._diagonal()))

    def cancellation(self, c: Array) -> float:
        """Return √(Σ cᵢ²‖gᵢ‖²) / ‖Gᵀc‖: how much larger the terms of Gᵀc are than their sum."""
        total = float(c @ (self.gram @ c))
        return float(self.terms(c)) / math.sqrt(total) if total > 0.0 else math.inf

    def terms(self, c: Array) -> np.ndarray[Any, Any]:
        """Return √(Σ cᵢ²‖gᵢ‖²), the size of the terms of Gᵀc, for c or each of its columns."""
        norms = self.home.xp.sqrt(self._diagonal())
        terms = c * (norms if c.ndim == 1 else norms[:, None])
        return np.asarray(np.sqrt(to_numpy(self.home.xp.sum(terms * terms, axis=0))))

    def matrix(self) -> Array:
        """Return A."""
        return self._matrix(self.shift)

    def _matrix(self, shift: float) -> Array:
        return self.gram + shift * self.home.eye(len(self))

    def _diagonal(self) -> Array:
        return self.home.xp.linalg.diagonal(self.gram)

    def _refined(self, b: Array, y: Array) -> Array | None:
        """Correct y ≈ A⁻¹b by K, or return None where K is too far from A⁻¹."""
        correction = self._correction(b, y)
        size = self.home.xp.sum(correction * correction, axis=0)
        norm = self.home.xp.sum(y * y, axis=0)
        if not bool(self.home.xp.all(size <= LARGEST_CORRECTION**2 * norm)):
            return None
        y = y + correction
        if bool(self.home.xp.all(size <= SMALL_CORRECTION**2 * norm)):
            return y
        return y + self._correction(b, y)

    def _refined_unseen(self, b: Array, y: Array) -> Array:
        """Correct y ≈ A⁻¹b twice by K, on a device, without waiting for what its checks say."""
        xp = self.home.xp
        correction = self._correction(b, y)
        sound = xp.sum(correction * correction) <= LARGEST_CORRECTION**2 * xp.sum(y * y)
        self.doubt = xp.astype(~sound, xp.int32)[None] + self.doubt
        y = y + correction
        return y + self._correction(b, y)

    def _correction(self, b: Array, y: Array) -> Array:
        return self._inverse @ (b - self.gram @ y - self.shift * y)

    # -- state -----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return NumPy copies of all that later results depend on, bit for bit."""
        self.discard_if_doubtful()
        inverse = self.home.zeros((0, 0)) if self._inverse is None else self._inverse
        probe = self.home.zeros(0) if self._probe is None else self._probe
        return {
            "gram": np.array(to_numpy(self.gram)),
            "inverse": np.array(to_numpy(inverse)),
            "probe": np.array(to_numpy(probe)),
            "replaced": self._replaced,
            "factored": self._factor is not None,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a state that :meth:`state` returned for a matrix with the same shift."""
        copy = self.home.xp.asarray
        self.set_gram(copy(self.home.receive(state["gram"]), copy=True))
        if state["inverse"].shape[0]:
            self._inverse = copy(self.home.receive(state["inverse"]), copy=True)
        if state["probe"].shape[0]:
            self._probe = copy(self.home.receive(state["probe"]), copy=True)
        self._replaced = int(state["replaced"])
        if state["factored"]:
            self.factor()
