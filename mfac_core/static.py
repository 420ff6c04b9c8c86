"""The static algorithm: all gradients at once, factored once, queried many times."""

from __future__ import annotations

import numpy as np

from mfac_core import _traced
from mfac_core import _validate as check
from mfac_core._arrays import Array, is_traced
from mfac_core._dual import Dual
from mfac_core._inverse import DampedInverse
from mfac_core._rows import Rows


class InverseFisher(DampedInverse):
    """The inverse of the damped empirical Fisher matrix F = λI + GᵀG/m as an operator.

    Factors the dual A = mλI + GGᵀ once, in float64, and answers every query with passes over G
    and that factor. Nothing of size d × d, and no second array of size m × d, is ever formed.

    Parameters
    ----------
    gradients : array, shape (m, d)
        One gradient per row, of any array-API library, real floating. Held, not copied, and
        never written to; do not change it while the operator is in use.
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
        If its shape is not (m, d) with m, d ≥ 1, if it holds a NaN or an infinity, or if
        ``damping`` is not finite and positive.

    See Also
    --------
    SlidingInverseFisher : The same for a window of gradients that changes.
    ihvp : One product without keeping the operator.

    Notes
    -----
    Set-up costs d·m² multiplications for the Gram GGᵀ and m³/3 for its Cholesky factor; extra
    memory is O(m²) and a bounded buffer. Products of float32 gradients run in float32 where the
    condition of A allows it, and in float64 where it does not. Under the name of the static
    algorithm of Frantar, Kurtic and Alistarh, "Efficient Matrix-Free Approximations of
    Second-Order Information" (NeurIPS 2021, arXiv 2107.03356): its vectors are
    v_k = (L⁻¹G)_k/λ and its scalars q_k = D_kk/λ for A = L D Lᵀ with unit lower triangular L.

    Examples
    --------
    >>> import numpy as np
    >>> import mfac_core as mfac
    >>> G = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    >>> inverse = mfac.InverseFisher(G, damping=0.5)
    >>> inverse @ np.array([3.0, 1.0, 0.0])
    array([ 5.,  1., -2.])
    >>> inverse.diagonal()
    array([1.66666667, 1.        , 0.66666667])
    """

    _largest_rounding = 2.0**-17  # the Gram is computed once: float64 costs little

    def __init__(self, gradients: Array, *, damping: float) -> None:
        self.gradients = check.gradients_argument(gradients)
        self._damping = check.positive_number(damping, "damping")
        self._rows = Rows(self.gradients)
        gram = self._finite_gram()
        self._dual = Dual(gram, self._divisor * self._damping, self._rows.home)
        self._checked = False
        self._settle()
        self._dual.factor()

    def _finite_gram(self) -> Array:
        xp = self._rows.home.xp
        with np.errstate(over="ignore", invalid="ignore"):
            gram = self._rows.gram()
        if bool(xp.all(xp.isfinite(gram))):
            return gram
        if rows := self._rows.nonfinite():
            which = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            msg = (
                f"gradients must be finite, got NaN or infinity in {len(rows)} of "
                f"{self._divisor} rows, at index {which}; drop those rows"
            )
            raise ValueError(msg)
        self._rows.exact = True  # finite rows whose products overflow float32
        with np.errstate(over="ignore", invalid="ignore"):
            gram = self._rows.gram()
        if bool(xp.all(xp.isfinite(gram))):
            return gram
        msg = "gradients are too large: their squared norms overflow float64; scale them down"
        raise ValueError(msg)


def ihvp(gradients: Array, x: Array, *, damping: float) -> Array:
    """Return F⁻¹x for the damped empirical Fisher matrix F = λI + GᵀG/m, in one call.

    Parameters
    ----------
    gradients : array, shape (m, d)
        G, one gradient per row, of any array-API library, real floating.
    x : array, shape (d,) or (d, k)
        A vector, or columns of vectors, of the same library and device.
    damping : float
        λ > 0.

    Returns
    -------
    array, shape (d,) or (d, k)
        F⁻¹x in the promoted dtype of ``gradients`` and ``x``.

    Raises
    ------
    TypeError
        If an argument is not a real floating array, or the libraries differ.
    ValueError
        If shapes or devices do not fit, if ``gradients`` holds a NaN or an infinity, or if
        ``damping`` is not finite and positive.

    See Also
    --------
    InverseFisher : Factor once, for many products with the same gradients.

    Notes
    -----
    d·m² + m³/3 multiplications and two passes over G. Works inside ``jax.jit`` and ``jax.vmap``,
    where values cannot be checked, Gram products stay in the gradients' dtype, and the m × m
    system is solved in float64 on the host.

    Examples
    --------
    >>> import numpy as np
    >>> import mfac_core as mfac
    >>> mfac.ihvp(np.array([[3.0, 4.0]]), np.array([3.0, 4.0]), damping=5.0)
    array([0.1       , 0.13333333])
    """
    gradients = check.gradients_argument(gradients)
    x = check.vector_argument(x, "x", gradients.shape[1], ndim=(1, 2))
    check.beside(x, "x", gradients)
    if not is_traced(damping):
        damping = check.positive_number(damping, "damping")
    if is_traced(gradients, x, damping):
        return _traced.ihvp(gradients, x, damping)
    return InverseFisher(gradients, damping=damping) @ x
