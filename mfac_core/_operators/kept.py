"""The inverse over the columns that pruning keeps, F_RR⁻¹: what it is asked, by name."""

from __future__ import annotations

from typing import Self

from mfac_core._arrays import Array
from mfac_core._dual import Dual
from mfac_core._operators import digits
from mfac_core._operators.static import InverseFisher
from mfac_core._ops import blocks as ops
from mfac_core._rows.base import Rows


class KeptInverse:
    """F_RR⁻¹ for F_RR = λI + G_RᵀG_R/m.

    Parameters
    ----------
    rows : Rows
        G_R.
    damping : float
        λ.
    gram : array, shape (m, m), optional
        G_R G_Rᵀ of float64 products, in the rows' home.
    norms : array, shape (m,), optional
        Squared norms of the rows whose Gram was the last to be formed from all their columns.
    """

    def __init__(self, rows: Rows, damping: float, gram: Array = None, norms: Array = None) -> None:
        self._rows = rows
        self._inverse = InverseFisher._of_rows(rows, damping, gram, exact=gram is not None)
        self._norms = self._square_norms(self._inverse._dual.gram) if norms is None else norms

    @property
    def float64(self) -> bool:
        """Whether products had to be in float64: those of fewer columns will have to be, too."""
        return self._rows.float64

    def without(self, rows: Rows, removed: Rows) -> Self:
        """Return that of fewer columns: the Gram of what is removed is taken off, or a new one."""
        gram = None
        if not removed.rounds:
            gram = self._inverse._dual.gram - removed.gram()
            if digits.gram_is_lost(rows.home, self._square_norms(gram), self._norms):
                gram = None
        norms = None if gram is None else self._norms
        return type(self)(rows, self._inverse.damping, gram, norms)

    def _square_norms(self, gram: Array) -> Array:
        """Return a copy of the diagonal."""
        xp = self._rows.home.xp
        return xp.asarray(xp.linalg.diagonal(gram), copy=True)

    def diagonal(self) -> Array:
        """Return diag F_RR⁻¹."""
        return self._inverse._ask(self._inverse._diagonal)

    def product(self, x: Array) -> Array:
        """Return F_RR⁻¹x."""
        return self._inverse._ask(self._inverse._apply, x)

    def spread(self, z: Array) -> Array:
        """Return F_RR⁻¹G_Rᵀz/m = G_RᵀA⁻¹z, which subtracts nothing."""
        return self._inverse._ask(self._inverse._spread, z)

    def squares(self, columns: Array, n: int) -> Array:
        """Return [F_RR⁻¹]_QQ for n groups Q, from their columns of G side by side.

        An (n, k, k) array in the home of blocks.
        """
        self._see_to_digits()
        white = self._inverse._dual.whiten(columns, self._rows.home)
        home = ops.home(self._rows.like)
        groups = ops.split(home, white, int(columns.shape[1]) // n)
        products = ops.square(home, ops.transposed(groups))
        return (home.eye(int(groups.shape[2])) - products) / self._inverse.damping

    def without_form(self, gram: Array, z: Array) -> float:
        """Return zᵀB⁻¹z for the dual B of these columns without a group, whose Gram this is."""
        self._see_to_digits()
        dual = self._inverse._dual
        return float(z @ Dual(dual.gram - gram, dual.shift, self._rows.home).solve(z))

    def _see_to_digits(self) -> None:
        if self._rows.rounds:  # what follows subtracts from one
            self._inverse._digits.go_to_float64()
