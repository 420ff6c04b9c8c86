"""The empirical Fisher matrix itself, as a forward operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mfac_core import _validate as check
from mfac_core._arrays import Array, promote, send
from mfac_core._operator import SymmetricOperator
from mfac_core._rows import Rows

if TYPE_CHECKING:
    from mfac_core.static import InverseFisher


class EmpiricalFisher(SymmetricOperator):
    """The damped empirical Fisher matrix F = λI + GᵀG/m as an operator.

    Parameters
    ----------
    gradients : array, shape (m, d)
        One gradient per row: m gradients of d parameters. Held, not copied, and never written to.
    damping : float
        λ > 0.

    Attributes
    ----------
    gradients : array, shape (m, d)
        As given.
    damping : float
        λ.

    Raises
    ------
    TypeError
        If ``gradients`` is not a real floating array of an array-API library.
    ValueError
        If its shape is not (m, d) with m, d ≥ 1, or ``damping`` is not finite and positive.

    See Also
    --------
    InverseFisher : The inverse of this matrix.

    Notes
    -----
    A product λx + Gᵀ(Gx)/m costs two passes over G.

    Examples
    --------
    >>> import numpy as np
    >>> import mfac_core as mfac
    >>> F = mfac.EmpiricalFisher(np.array([[3.0, 4.0]]), damping=1.0)
    >>> F.to_dense()
    array([[10., 12.],
           [12., 17.]])
    >>> F.inverse() @ (F @ np.array([1.0, 2.0]))
    array([1., 2.])
    """

    def __init__(self, gradients: Array, *, damping: float) -> None:
        self.gradients = check.gradients_argument(gradients)
        self.damping = check.positive_number(damping, "damping")
        self._rows = Rows(self.gradients)

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

    def inverse(self) -> InverseFisher:
        """Return F⁻¹, factored once for many products.

        Returns
        -------
        InverseFisher
            The inverse, over the same gradients.
        """
        from mfac_core.static import InverseFisher

        return InverseFisher(self.gradients, damping=self.damping)

    def diagonal(self) -> Array:
        """Return λ + Σᵢ gᵢ²/m, shape (d,); one pass over G.

        Returns
        -------
        array, shape (d,)
            In the gradients' dtype.
        """
        xp = self._rows.home.xp
        m = self._rows.shape[0]
        parts = [
            self.damping + xp.sum(block * block, axis=0) / m
            for _, block in self._rows.wide_blocks()
        ]
        return send(xp.concat(parts), self.gradients, self.dtype)

    def _apply(self, x: Array, refine: int) -> Array:
        c = self._rows.project(x) / self._rows.shape[0]
        return self._rows.combine(c, x, self.damping, dtype=promote(x, self.dtype))

    def _like(self) -> Array:
        return self._rows.array
