"""Digits: where float32 products will not do, and where float64 has none left either.

An inverse is what a subtraction leaves: λF⁻¹ = I − GᵀA⁻¹G with A = nλI + GGᵀ. Where that is little,
the Gram GGᵀ and the passes over the rows must be the more accurate; where it is next to nothing in
float64 too, a warning is due. Every threshold and every such decision stands here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy

from mfac_core import _validate as check
from mfac_core._arrays import Array, Home, itemsize, promote, to_numpy
from mfac_core._dual import Dual
from mfac_core._operators.guard import uninterrupted
from mfac_core._rows.base import Rows, first_of
from mfac_core._rows.storage import ArrayRows
from mfac_core._warn import warn

FLOAT32_ROUNDING = 2.0**-21
"""Error of a product of two rows in float32, summed as in ``_ops``, relative to their norms.

Seen on nearly parallel rows, where the rounding errors of the sum are most of one sign; on random
rows it is twenty times less.
"""

FLOAT32_UNDERFLOW = 2.0**-126
"""Error of a product of two numbers whose square is too small for float32."""

LARGEST_STATIC_ROUNDING = 2.0**-17
"""Error of solutions that float32 products may cause where the Gram is formed once."""

LARGEST_WINDOW_ROUNDING = 2.0**-14
"""The same for a window, every step of which would pay for float64 passes."""

LARGEST_PRODUCT_ERROR = 1e-5
"""Estimated relative error of F⁻¹x for which float32 products, or a silent result, will do."""

ROWS_A_CORRECTION = 32
"""Rows for each of which a product is corrected before a Gram in float64 is formed for them.

A pass in float64 takes as long as about so many rows of that Gram.
"""

SMALLEST_FLOAT32_REST = 2.0**-14
"""What a subtraction may leave of 1 in float32 passes; where it is less, they run in float64."""

LARGEST_DIAGONAL_ROUNDING = 1e-5
"""Rounding of the Gram relative to 1 − t, above which the diagonal asks for float64 products."""

SMALLEST_REST = 2.0**-44
"""What 1 − t, and ‖x − Gᵀc‖ / ‖x‖, must leave in float64 for three right digits."""

LARGEST_REFINED_ERROR = 2.0**-6
"""Estimated relative error of a refined product from which on a warning is due."""

SMALLEST_GRAM_REST = 2.0**-4
"""What must be left of a row's square norm for a Gram that parts were taken off to be used on."""

FORESEEN_STRETCHES = 8
"""Stretches of columns whose Gram is looked at before that of all is formed."""

FORESEEN_SHARE = 16
"""One in so many columns belongs to them."""


LARGEST_MEASURABLE_CANCELLATION = 2.0**20
"""The same above which cᵀGGᵀc is too rounded to tell, and the sum itself is asked."""


class Rounding(NamedTuple):
    """Errors of products with the rows in one precision, as they are after a pass; see ``_ops``."""

    projection: float
    """Of gᵢᵀx, relative to ‖gᵢ‖ ‖x‖."""

    gram: float
    """Of gᵢᵀgⱼ, relative to ‖gᵢ‖ ‖gⱼ‖: sums of squares round the more the longer they are."""

    term: float
    """Of Gᵀc, relative to √(m Σ cᵢ²‖gᵢ‖²)."""


FLOAT32 = Rounding(projection=2.0**-23, gram=2.0**-22, term=2.0**-24)
FLOAT64 = Rounding(projection=2.0**-52, gram=2.0**-51, term=2.0**-53)


class Difference(NamedTuple):
    """A result, and what its subtractions did; each a number, or an array of them."""

    value: Any
    """The result."""

    left: Any
    """What the subtractions left."""

    whole: Any
    """What they began with."""

    noise: Any
    """What rounding in them is relative to, where that is more than ``whole``."""


class Digits:
    """What an inverse by rows and dual asks before it believes a number.

    Parameters
    ----------
    rows : Rows
        G. Their ``float64`` is set here: products in float64.
    dual : Dual
        A.
    damping : float
        λ.
    largest_rounding : float
        Error of solutions due to float32 products above which products run in float64.
    checked : bool, default False
        Whether the Gram is known to be accurate enough for the dual's condition.
    exact : bool, default False
        Whether it is of float64 products, for rows that do not change.
    patience : int, optional
        Steps in float64 after which float32 is thought of again, for rows that change.

    Attributes
    ----------
    damping : float
        λ; the dual's shift goes with it.
    checked : bool
        As given, until the dual changes.
    exact : bool
        As given.
    steps : int
        Rows exchanged.
    float64_steps : int
        Steps in float64 since float32 was last thought of.
    """

    def __init__(
        self,
        rows: Rows,
        dual: Dual,
        damping: float,
        largest_rounding: float,
        *,
        checked: bool = False,
        exact: bool = False,
        patience: int | None = None,
    ) -> None:
        self.rows, self.dual, self.damping = rows, dual, damping
        self._largest_rounding = largest_rounding
        self._patience = patience
        self.checked, self.exact = checked, exact
        self.steps = self.float64_steps = self._corrected = 0

    # -- the Gram --------------------------------------------------------------------------

    def settle(self) -> None:
        """Make the Gram as accurate as the dual's condition asks for."""
        if not self.checked:
            if self.rows.rounds and not self._solution_error() <= self._largest_rounding:
                self.go_to_float64()
            self.checked = True
        # The ill-conditioned gradients may have left. Asking once in a window's length keeps the
        # cost of a Gram computed anew in float64, should they return, below a pass a step.
        if self._patience is not None and self.float64_steps >= self._patience:
            self.float64_steps = 0
            self.rows.float64 = (
                self.rows.always_float64 or not self._solution_error() <= self._largest_rounding / 8
            )

    def stepped(self) -> None:
        """Take note that a row was exchanged."""
        self.checked = False
        self.steps += 1
        self.float64_steps += self.rows.float64

    def go_to_float64(self) -> None:
        """Stay with float64 products, of which the Gram is formed if it was not; or warn."""
        if self.exact or not self.rows.widens:
            self.rows.float64 = True
            if not self.exact:
                warn_narrow(self.damping, self.rows.dtype)
            return
        gram = self.rows.gram(float64=True)
        with uninterrupted():
            self.rows.float64 = True
            self.dual.set_gram(gram)

    def products(self, x: Array) -> Array:
        """Return G x for a finite x; float64 products from now on, where float32 overflows."""
        with np.errstate(over="ignore", invalid="ignore"):
            products = self.rows.project(x)
        if not bool(self.rows.home.xp.all(self.rows.home.xp.isfinite(products))):
            self.rows.float64 = True
            products = self.rows.project(x)
        return products

    def _solution_error(self) -> float:
        """Estimate the relative error of solutions when products of rows run in float32."""
        gram_error = (
            FLOAT32_ROUNDING * self.dual.largest_square_norm()
            + FLOAT32_UNDERFLOW * self.rows.total_columns
        )
        return gram_error * self.dual.inverse_norm()

    # -- products --------------------------------------------------------------------------

    def product(
        self,
        what: str,
        x: Any,
        formula: Callable[[Any], tuple[Any, Array]],
        corrected: Callable[[Any, Array], Any],
    ) -> Any:
        """Return y = (x − Gᵀc)/λ: by float64 passes if that cancels too much, or warned.

        ``formula(x)`` gives y and c, and ``corrected(x, c)`` y by passes in float64 and a step of
        refinement, for which the Gram of a settled dual does in float32: so a few products do not
        have to pay for another. On a device to look at them would mean to wait, and its products
        are in float64 anyway.
        """
        y, c = formula(x)
        if not self.rows.home.is_host:
            return y
        float64 = self.products_are_float64(x)
        if not float64 and self._loses(x, y, c, FLOAT32):
            if self._may_correct(c):
                float64, y = True, corrected(x, c)
            else:
                self.go_to_float64()
                float64, (y, c) = True, formula(x)
        if float64 and self._loses(x, y, c, FLOAT64):
            self.warn(what)
        return y

    def _may_correct(self, c: Array) -> bool:
        """Whether correcting products is still the cheaper way, and count those with c.

        Of rows in files a Gram takes one pass; those of a window change, and it with them.
        """
        if self._patience is not None or not isinstance(self.rows, ArrayRows):
            return False
        self._corrected += 1 if c.ndim == 1 else c.shape[1]
        return self._corrected * ROWS_A_CORRECTION <= len(self.dual)

    def products_are_float64(self, x: Any) -> bool:
        """Whether products with x run in float64."""
        return self.rows.float64 or itemsize(promote(first_of(x), self.rows.like.dtype)) == 8

    def _loses(self, x: Any, y: Any, c: Array, rounding: Rounding) -> bool:
        """Whether y = (x − Gᵀc)/λ is off by more than it may be, for some column of x.

        Errors of Gx and of the Gram grow by no more than the dual's sensitivity κ in GᵀA⁻¹. What
        they are relative to is cheaper to bound than to compute: that is tried first.
        """
        if itemsize(self.rows.like.dtype) == 8:
            return self._loses_float64(x, y)
        combination = rounding.term * math.sqrt(max(len(self.dual), 4))

        def error(sensitivity: float, whole: Any, terms: Any) -> Any:
            grown = sensitivity * (rounding.projection * whole + rounding.gram * terms)
            return (grown + combination * terms) / LARGEST_PRODUCT_ERROR

        # Terms are no more than κ‖x‖, and y no shorter than ‖x‖/(λ·ratio).
        largest, ratio = self.dual.largest_sensitivity(), self.dual.norm() / self.dual.shift
        if error(largest, 1.0, largest) * ratio < 1.0:
            return False
        whole, terms = np.sqrt(self.rows.square_norms(x)), self.dual.terms(c)
        rest = self.damping * np.sqrt(self.rows.square_norms(y))
        if not np.all(np.isfinite(rest)):
            return True
        if np.all(error(largest, whole, terms) <= rest):
            return False
        return not np.all(error(self.dual.sensitivity(), whole, terms) <= rest)

    def _loses_float64(self, x: Any, y: Any) -> bool:
        """Whether of gradients in float64 next to no digits are left of x − Gᵀc = λy."""
        if self.dual.norm() / self.dual.shift < SMALLEST_REST ** (-2 / 3):
            return False
        smallest = SMALLEST_REST * math.sqrt(max(self.dual.condition(), 1.0))
        whole, rest = self.rows.square_norms(x), self.rows.square_norms(y)
        left = (rest * self.damping**2 >= whole * smallest**2) & np.isfinite(rest)
        return not bool(np.all(left))

    def refined(self, before: Any, y: Any) -> bool:
        """Look at the step of refinement from ``before`` to y: whether an exact Gram was formed.

        A step leaves of the error before it, which is the step's length, what solutions with the
        dual have as their relative error. A warning is due where that was too long to be the last.
        """
        if not self.rows.home.is_host:
            return False
        rounding = self._solution_error() if self.rows.rounds else 0.0
        left = self.dual.condition() * 2.0**-52 + rounding
        pairs = zip(y, before, strict=True) if isinstance(y, list) else [(y, before)]
        step = self.rows.square_norms([new - old for new, old in pairs])
        error = left * np.sqrt(step), np.sqrt(self.rows.square_norms(y))
        if self.rows.rounds and not np.all(error[0] <= LARGEST_PRODUCT_ERROR * error[1]):
            self.go_to_float64()
            return True
        if not np.all(error[0] <= LARGEST_REFINED_ERROR * error[1]):
            self.warn("F⁻¹x")
        return False

    def held(self, c: Array, dtype: Any) -> Array:
        """Return Gᵀc = F⁻¹g for a gradient held, in float64 products where its terms cancel."""
        if self.rows.always_float64:  # to look at it would mean to wait for the device
            return self.rows.combine(c, None, 1.0, dtype=dtype, float64=True)
        cancellation = self.dual.cancellation(c)
        rounding = FLOAT32.term * math.sqrt(max(len(self.dual), 4))
        float64 = cancellation * rounding > LARGEST_PRODUCT_ERROR
        y = self.rows.combine(c, None, 1.0, dtype=dtype, float64=float64)
        if cancellation > LARGEST_MEASURABLE_CANCELLATION:
            left = float(self.rows.square_norms(y)) ** 0.5
            if not left >= float(self.dual.terms(c)) * SMALLEST_REST:
                self.warn("F⁻¹g")
        return y

    # -- numbers ---------------------------------------------------------------------------

    def difference(self, what: str, smallest: float, formula: Callable[[], Difference]) -> Array:
        """Return a difference, after an exact Gram if its subtractions ask for it, or warned.

        Less than ``smallest`` left asks for an exact Gram.
        """
        result = formula()
        if smallest and self.rows.anywhere(bool(np.any(result.left < result.whole * smallest))):
            self.go_to_float64()
            result = formula()
        if np.any(result.left < np.maximum(result.whole, result.noise) * SMALLEST_REST):
            self.warn(what)
        return result.value

    def smallest_quadratic(self, x: Any) -> float:
        """Return what a quadratic form may leave of xᵀx/λ."""
        return 0.0 if self.products_are_float64(x) else SMALLEST_FLOAT32_REST

    def smallest_element(self, *, alone: bool = False) -> float:
        """Return the 1 − t of a diagonal element to which t's rounding is too much.

        ``alone`` where each rank asks for elements of its own: a new Gram would take all of them.
        """
        if not self.rows.rounds or (alone and self.rows.reduce is not None):
            return 0.0
        return FLOAT32_ROUNDING / LARGEST_DIAGONAL_ROUNDING

    def noise(self, c: Array) -> Array:
        """Return ‖A‖ ‖c‖²/λ, which the rounding of bᵀA⁻¹b/λ is relative to, for c = A⁻¹b.

        A solution is exact for a matrix as far from A as rounding is from ‖A‖.
        """
        squares = to_numpy(self.rows.home.xp.sum(c * c, axis=0))
        return squares * self.dual.norm() / self.damping

    def look_at_pivots(self, what: str) -> None:
        """Warn where elimination has left next to nothing of a diagonal element of A."""
        if self.dual.smallest_pivot() < SMALLEST_REST * self.dual.largest_square_norm():
            self.warn(what)

    def warn(self, what: str) -> None:
        """Say that a result has few right digits."""
        warn_few_digits(what, self.damping)


def foresee(rows: Rows, damping: float) -> None:
    """Set rows to float64 products at once where a part of their columns says it will come to that.

    Saves the float32 Gram that would be formed for nothing; a wrong guess costs time, no digits.
    Stretches all over the columns, so that no layer stands for all.
    """
    m, d = rows.shape
    width = d // (FORESEEN_STRETCHES * FORESEEN_SHARE)
    alone = rows.reduce is None and isinstance(rows, ArrayRows)
    if not (alone and rows.home.is_host and rows.rounds) or width < m:
        return
    step = d // FORESEEN_STRETCHES
    with np.errstate(over="ignore", invalid="ignore"):
        gram = rows.home.zeros((m, m))
        for start in range(0, step * FORESEEN_STRETCHES, step):
            gram = gram + FORESEEN_SHARE * rows.stretch(start, start + width).gram()
        if not bool(rows.home.xp.all(rows.home.xp.isfinite(gram))):
            return
    part = Digits(rows, Dual(gram, m * damping, rows.home), damping, LARGEST_STATIC_ROUNDING)
    rows.float64 = not part._solution_error() <= LARGEST_STATIC_ROUNDING


def finite_gram(rows: Rows) -> Array:
    """Return GGᵀ of finite gradients; float64 products from now on, where float32 overflows.

    Raises
    ------
    ValueError
        If a gradient holds a NaN or an infinity, or its square leaves float64.
    """
    xp = rows.home.xp
    with np.errstate(over="ignore", invalid="ignore"):
        gram = rows.gram()
        if bool(xp.all(xp.isfinite(gram))):
            return gram
        nonfinite = rows.nonfinite()
        if not nonfinite:
            rows.float64 = True
            gram = rows.gram()
            if bool(xp.all(xp.isfinite(gram))):
                return gram
    raise ValueError(check.nonfinite_message(nonfinite, rows.shape[0]))


def gram_is_lost(home: Home, norms: Array, before: Array) -> bool:
    """Whether the rounding errors of a Gram are too much for what is left after a subtraction.

    They stay in it when parts are taken off, and are small beside what is left as long as no row
    has lost most of its square norm, which was ``before``.
    """
    return bool(home.xp.any(norms < SMALLEST_GRAM_REST * before))


def power_cancels(rows: Rows, largest: float, p: float) -> bool:
    """Whether λᵖx less Gᵀ(...)Gx can be too small beside its terms for products in float32.

    ``largest`` is F's largest eigenvalue over λ.
    """
    return rows.rounds and p < 0.0 and not largest**p >= SMALLEST_FLOAT32_REST


def elements_need_float64(dtype: Any, smallest: float) -> bool:
    """Whether elements by a stored W lose too much where 1 − t is as small as this."""
    return itemsize(dtype) == 4 and smallest < SMALLEST_FLOAT32_REST


def warn_narrow(damping: float, dtype: Any) -> None:
    """Warn that rows which are only functions know their products in a narrow dtype alone."""
    warn(
        f"damping {damping:g} is too small beside the gradients' squared norms for products in "
        f"{dtype}; raise it, or give the gradients a method in_float64()",
        scipy.linalg.LinAlgWarning,
    )


def warn_few_digits(what: str, damping: float) -> None:
    """Warn that float64 has lost the digits of a result, under this λ."""
    warn(
        f"{what} has few right digits: damping {damping:g} is too small beside the gradients' "
        "squared norms for float64; raise it",
        scipy.linalg.LinAlgWarning,
    )
