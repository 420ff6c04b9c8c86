"""The empirical Fisher matrix itself, as a forward operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array
from mfac_core._operators.damping import damping_of
from mfac_core._operators.lowrank import FisherFunction
from mfac_core._operators.spectra import Blocks
from mfac_core._rows.base import Reduce, Rows
from mfac_core._rows.protocol import Gradients
from mfac_core._rows.storage import rows_of
from mfac_core._typing import ArrayT, BlockSize, Damping, GivenT, NDArray, Sliceable, Stored

if TYPE_CHECKING:
    from mfac_core._operators.blocked import BlockInverseFisher
    from mfac_core._operators.static import InverseFisher


class EmpiricalFisher(FisherFunction[ArrayT]):
    """The damped empirical Fisher matrix F = λI + GᵀG/m as an operator.

    Parameters
    ----------
    gradients : array of shape (m, d), sequence of arrays of shape (m, dₖ), sliceable, or rows
        One gradient per row, real floating: an array of any array-API library; or several,
        side by side, on one device or on several; or anything with ``shape``, ``dtype`` and
        ``[:, a:b]``, such as a numpy.memmap, an h5py dataset or a zarr array, which is read in
        slices; or :class:`GradientRows`, which are known by their products. Held, not copied, and
        never written to; do not change it meanwhile.
    damping : float or "auto"
        λ > 0; or that of :func:`choose_damping`, which costs d·m² multiplications.
    reduce : callable, optional
        For gradients whose columns are spread over ranks, each rank holding (m, d_rank) of them:
        takes a small float64 NumPy array and returns its sum over ranks. All ranks then make the
        same calls; vectors, diagonals and indices are those of the rank's own columns.
    progress : bool, default False
        Show a bar during passes over the gradients, where tqdm is installed.

    Attributes
    ----------
    gradients : array, sequence of arrays, or sliceable
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

    @overload
    def __init__(
        self: EmpiricalFisher[NDArray],
        gradients: Stored,
        *,
        damping: Damping,
        reduce: Reduce | None = None,
        progress: bool = False,
    ) -> None: ...
    @overload
    def __init__(
        self: EmpiricalFisher[GivenT],
        gradients: Gradients[GivenT],
        *,
        damping: Damping,
        reduce: Reduce | None = None,
        progress: bool = False,
    ) -> None: ...
    @overload
    def __init__(
        self: EmpiricalFisher[NDArray],
        gradients: Sliceable,
        *,
        damping: Damping,
        reduce: Reduce | None = None,
        progress: bool = False,
    ) -> None: ...
    def __init__(
        self,
        gradients: Any,
        *,
        damping: Damping,
        reduce: Reduce | None = None,
        progress: bool = False,
    ) -> None:
        given = check.damping_or_auto(damping)
        self.gradients = gradients
        self._rows = rows_of(gradients, reduce=reduce, progress=progress)
        self._damping = damping_of(Blocks(self._rows)) if given is None else given
        self._reduce, self._progress = reduce, progress

    @property
    def damping(self) -> float:
        """λ."""
        return self._damping

    @overload
    def inverse(self) -> InverseFisher[ArrayT]: ...
    @overload
    def inverse(self, block_size: BlockSize) -> BlockInverseFisher[ArrayT]: ...
    def inverse(
        self, block_size: BlockSize | None = None
    ) -> InverseFisher[ArrayT] | BlockInverseFisher[ArrayT]:
        """Return F⁻¹, factored once for many products.

        Parameters
        ----------
        block_size : int or sequence of int, optional
            Invert the diagonal blocks of F of these lengths instead of the whole of it.

        Returns
        -------
        InverseFisher or BlockInverseFisher
            The inverse, over the same gradients.
        """
        from mfac_core._operators.blocked import BlockInverseFisher
        from mfac_core._operators.static import InverseFisher

        if block_size is None:
            return InverseFisher(
                self.gradients,
                damping=self.damping,
                reduce=self._reduce,
                progress=self._progress,
            )
        return BlockInverseFisher(
            self.gradients,
            damping=self.damping,
            block_size=block_size,
            reduce=self._reduce,
            progress=self._progress,
        )

    def logdet(self) -> float:
        """Return log det F = d log λ + Σᵢ log(1 + sᵢ/(mλ)), sᵢ the eigenvalues of GGᵀ.

        Returns
        -------
        float
            The logarithm of the determinant.

        Notes
        -----
        d·m² multiplications for the Gram GGᵀ, and O(m³).
        """
        return super().logdet()

    def _logdet(self) -> float:
        return self._power(1.0)._logdet()

    _exponent = 1.0

    @property
    def _alpha(self) -> float:
        return self._damping

    def _middle(self, b: Array) -> Array:
        return b / self._divisor

    def _frozen(self) -> tuple[Rows, Array]:
        return self._rows, self._rows.gram(float64=True)

    def _sample(self, n: int, rng: np.random.Generator) -> Array:
        return self._fisher_sample(n, rng)
