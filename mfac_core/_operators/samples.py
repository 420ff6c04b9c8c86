"""The inverse between the gradients of samples, all of it m-sized: what influence asks, by name."""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array, to_numpy
from mfac_core._operators.damping import damping_of
from mfac_core._operators.digits import finite_gram
from mfac_core._operators.spectra import Blocks
from mfac_core._operators.static import InverseFisher
from mfac_core._rows.base import Reduce, Rows
from mfac_core._rows.storage import rows_of

NDArray = np.ndarray[Any, Any]


class SampleInverse:
    """A⁻¹ with A = mλI + GGᵀ, and G.

    Attributes
    ----------
    rows : Rows
        G.
    damping : float
        λ.
    """

    def __init__(self, rows: Rows, inverse: InverseFisher) -> None:
        self.rows, self.damping = rows, inverse.damping
        self._inverse = inverse
        self._matrices: tuple[NDArray, NDArray] | None = None

    @classmethod
    def of(
        cls,
        gradients: Any,
        *,
        damping: float | Literal["auto"],
        reduce: Reduce | None,
        progress: bool,
    ) -> Self:
        """Return that of gradients in any storage; with many of them, too, by their Gram matrix."""
        given = check.damping_or_auto(damping)
        rows = rows_of(gradients, reduce=reduce, progress=progress)
        gram = finite_gram(rows)
        chosen = damping_of(Blocks(rows, gram=gram)) if given is None else given
        return cls(rows, InverseFisher._of_rows(rows, chosen, gram))

    def with_damping(self, damping: float) -> Self:
        """Return that under another λ, without a pass over the gradients."""
        return type(self)(self.rows, self._inverse.with_damping(damping))

    def solve(self, products: Array) -> NDArray:
        """Return A⁻¹ products, float64 (m, k), for an array of the rows' home."""
        return to_numpy(self._inverse._ask(self._inverse._dual.solve, products))

    def matrices(self) -> tuple[NDArray, NDArray]:
        """Return GGᵀ and A⁻¹, float64, computed once."""
        if self._matrices is None:
            inverse = self.solve(self.rows.home.eye(self.rows.shape[0]))
            self._matrices = to_numpy(self._inverse.gram), (inverse + inverse.T) / 2
        return self._matrices
