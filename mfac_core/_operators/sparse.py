"""The dynamic algorithm over compressed gradients: a window a hundred times smaller."""

from __future__ import annotations

from typing import Any

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array, array_namespace, is_traced
from mfac_core._operators.sliding import Incoming, SlidingInverseFisher
from mfac_core._ops import sparse
from mfac_core._rows.base import Reduce
from mfac_core._rows.ring import Ring
from mfac_core._rows.sparse_ring import SparseRing, SparseRow, format_of, wide_dtype
from mfac_core._typing import ArrayT, Normalization


class SparseSlidingInverseFisher(SlidingInverseFisher[ArrayT]):
    """The inverse of F = λI + (1/n) Σ cᵢcᵢᵀ over a window of compressed gradients, as an operator.

    Of each gradient g the window keeps a row c: with e what earlier rows have left out, c holds the
    largest entries of e + g by magnitude, and e ← e + g − c. So nothing is lost, only put off: the
    rows ever stored and e add up to the gradients ever given. The d columns are cut into ⌈d/4096⌉
    equal blocks (the last may be shorter), of which each keeps its ⌈density · block⌉ largest
    entries.

    Parameters
    ----------
    num_params : int
        d, the length of a gradient.
    window_size : int
        m, the most gradients held.
    density : float
        The share of a gradient's entries that is kept, above 0 and at most 1.
    damping : float
        λ > 0; can be set later.
    dtype, xp, device : optional
        Dtype of the entries kept, array namespace and device of the window. What is not given is
        taken from the first gradient. In 16 bits (bfloat16 where the library has it) an entry takes
        4 bytes; what rounding takes away goes to e, which is float32 then.
    normalization : {"count", "window"}, default "count"
        See :class:`SlidingInverseFisher`.
    reduce : callable, optional
        For a window whose columns are spread over ranks, see :class:`SlidingInverseFisher`. Each
        rank compresses its own columns.

    Attributes
    ----------
    num_params, window_size : int
        As given.
    density : float
        As given.
    normalization : str
        As given.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its form.

    See Also
    --------
    SlidingInverseFisher : All of each gradient.

    Notes
    -----
    All queries, and ``gradients``, are those of the rows c. ``append`` and ``replace`` compress;
    ``remove`` drops a row and leaves e; ``clear`` starts anew, with e = 0. ``append_matvec(g)``
    returns F⁻¹c, which over time makes up for what it leaves out of each g; for F⁻¹g ask
    ``matvec(g)``.

    With v bytes an entry (4 for float32, 2 in 16 bits) the rows take (2 + v)·m·⌈d/4096⌉·k bytes,
    k entries a block, and e takes 4d (8d for float64). Beside the 4md bytes of a float32 window
    that is density·(2 + v)/4 + 1/m: for 1 % and float32 a fiftieth from m = 201 on, in 16 bits
    from m = 101 on. The dual takes what it takes there, 3m² of float64.

    A step costs a selection of d numbers, one pass over the entries for the new row of the Gram and
    one or two for the product, each O(density·d·m), and O(m²) for the dual. Entries of equal
    magnitude are chosen among as the library does it.

    The compression is that of Modoranu et al., "Error Feedback Can Accurately Compress
    Preconditioners" (ICML 2024, arXiv 2306.06098); the window, see
    :class:`SlidingInverseFisher`.

    Examples
    --------
    >>> import numpy as np
    >>> import mfac_core as mfac
    >>> window = mfac.SparseSlidingInverseFisher(4, window_size=2, density=0.25, damping=0.5)
    >>> window.append(np.array([1.0, 0.0, -3.0, 2.0]))
    >>> window.append(np.array([1.0, 0.0, 0.0, 1.0]))  # 2 + 1 is now the largest
    >>> window.gradients
    array([[ 0.,  0., -3.,  0.],
           [ 0.,  0.,  0.,  3.]])
    >>> window.error
    array([2., 0., 0., 0.])
    """

    _rows: SparseRing

    def __init__(
        self,
        num_params: int,
        window_size: int,
        *,
        density: float,
        damping: float,
        dtype: Any = None,
        xp: Any = None,
        device: Any = None,
        normalization: Normalization = "count",
        reduce: Reduce | None = None,
    ) -> None:
        self.density = check.positive_number(density, "density")
        if self.density > 1.0:
            msg = f"density must be at most 1, the share of entries kept, got {density!r}"
            raise ValueError(msg)
        d = check.integer(num_params, "num_params", minimum=1)
        self._format = format_of(d, self.density)
        super().__init__(
            d,
            window_size,
            damping=damping,
            dtype=dtype,
            xp=xp,
            device=device,
            normalization=normalization,
            reduce=reduce,
        )

    def _of_what(self) -> str:
        return f"{super()._of_what()} density {self.density:g},"

    @property
    def error(self) -> ArrayT:
        """What the rows have left out so far, shape (d,): a copy.

        In float64 for a window of float64, in float32 otherwise.
        """
        error: ArrayT = self._rows.xp.asarray(self._rows.error, copy=True)
        return error

    def append_matvec(self, g: ArrayT, *, check_finite: bool = True) -> ArrayT:
        """Add a gradient and return F⁻¹c = n Cᵀ A⁻¹ eⱼ, c being its row in the window.

        Parameters
        ----------
        g : array, shape (d,)
            See :meth:`append`.
        check_finite : bool, default True
            Changes nothing here: compressing waits for the device anyway.

        Returns
        -------
        array, shape (d,)
            In the dtype of ``g``.

        Raises
        ------
        TypeError, ValueError
            See :meth:`append`.

        Notes
        -----
        One pass over the entries less than ``append`` and ``matvec``, and accurate for rows that
        are nearly collinear or for tiny λ, since nothing is subtracted.
        """
        return super().append_matvec(g)

    def _checked(self, x: Any, name: str, ndim: tuple[int, ...]) -> Any:
        if is_traced(x):
            msg = (
                "x must be an array of numbers, got a value traced by JAX; products with a sparse "
                "window do not run inside jit, vmap or grad"
            )
            raise TypeError(msg)
        return super()._checked(x, name, ndim)

    @property
    def _sizes(self) -> dict[str, Any]:
        return {**super()._sizes, "density": self.density}

    def _ring(self, like: Array, capacity: int) -> Ring:
        return SparseRing.empty(like, capacity, self._format, self._reduce)

    def _values(self, row: SparseRow) -> Array:
        return row.values

    def _row_of(self, g: Array, dtype: Any, unseen: bool) -> Incoming:
        xp = array_namespace(g)
        with np.errstate(over="ignore"):  # an overflow is refused below, by name
            total = xp.astype(g, wide_dtype(xp, dtype))
            if self._allocated:
                total = total + self._rows.error
        check.finite_norm(float(self._rows.square_norms(total)), dtype)
        row = SparseRow(*sparse.compress(total, self._format.k, self._format.width, dtype))
        norm2 = float(self._rows.square_norms(row.kept))
        check.finite_norm(norm2, dtype)
        return Incoming(row, norm2)
