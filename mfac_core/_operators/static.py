"""The static algorithm: all gradients at once, factored once, queried many times."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any, Self, overload

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array, array_namespace, is_traced, promote, send, to_numpy
from mfac_core._dual import Dual
from mfac_core._jax import traced
from mfac_core._operators import autograd, digits
from mfac_core._operators.base import Indices
from mfac_core._operators.damping import damping_of
from mfac_core._operators.fewer import PrimalOrDual, has_fewer_columns
from mfac_core._operators.guard import Lock
from mfac_core._operators.spectra import Blocks
from mfac_core._rows.base import Reduce, Rows
from mfac_core._rows.protocol import AnyGradients, Gradients
from mfac_core._rows.storage import ArrayRows, rows_of
from mfac_core._typing import AnyArray, ArrayT, Damping, GivenT, NDArray, Sliceable, Stored


class InverseFisher(PrimalOrDual[ArrayT]):
    """The inverse of the damped empirical Fisher matrix F = λI + GᵀG/m as an operator.

    Factors the dual A = mλI + GGᵀ once, in float64, and answers every query with passes over G
    and that factor. Nothing of size d × d, and no second array of size m × d, is ever formed.

    Parameters
    ----------
    gradients : array of shape (m, d), sequence of arrays of shape (m, dₖ), sliceable, or rows
        One gradient per row, real floating: an array of any array-API library; or several,
        side by side, on one device or on several; or anything with ``shape``, ``dtype`` and
        ``[:, a:b]``, such as a numpy.memmap, an h5py dataset or a zarr array, which is read in
        slices; or the path of a .npy file; or :class:`GradientRows`, which are known by their
        products. Held, not copied, and never written to; do not change it meanwhile.
    damping : float or "auto"
        λ > 0; or that of :func:`choose_damping`, to be read from ``damping`` afterwards.
    reduce : callable, optional
        For gradients whose columns are spread over ranks, each rank holding (m, d_rank) of them:
        takes a small float64 NumPy array and returns its sum over ranks. All ranks then make the
        same calls; vectors, diagonals and indices are those of the rank's own columns.
    progress : bool, default False
        Show a bar during passes over the gradients, where tqdm is installed.
    store_whitened : bool, default False
        Keep the diagonal and W = L⁻¹G (m × d, in at least float32), A = L Lᵀ, so that an element
        of F⁻¹ costs O(m) instead of O(m²), but for those too small beside 1/λ for float32.

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
        If its shape is not (m, d) with m, d ≥ 1, if it holds a NaN or an infinity, or if
        ``damping`` is not finite and positive.

    See Also
    --------
    SlidingInverseFisher : The same for a window of gradients that changes.
    ihvp : One product without keeping the operator.

    Notes
    -----
    Set-up costs d·m² multiplications for the Gram GGᵀ and m³/3 for its Cholesky factor; extra
    memory is O(m²) and a bounded buffer. With fewer parameters than gradients (d < m) the d × d
    matrix F itself is inverted instead: d²·m + d³ multiplications, O(m·d + d²) memory.

    Products of float32 gradients run in float32 where the condition of A allows it, and in
    float64 where it does not. Under the name of the static algorithm of Frantar, Kurtic and
    Alistarh, "Efficient Matrix-Free Approximations of Second-Order Information" (NeurIPS 2021,
    arXiv 2107.03356): its vectors are v_k = (L⁻¹G)_k/λ and its scalars q_k = D_kk/λ for A = L D
    Lᵀ with unit lower triangular L.

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

    @overload
    def __init__(
        self: InverseFisher[NDArray],
        gradients: Stored,
        *,
        damping: Damping,
        reduce: Reduce | None = None,
        progress: bool = False,
        store_whitened: bool = False,
    ) -> None: ...
    @overload
    def __init__(
        self: InverseFisher[GivenT],
        gradients: Gradients[GivenT],
        *,
        damping: Damping,
        reduce: Reduce | None = None,
        progress: bool = False,
        store_whitened: bool = False,
    ) -> None: ...
    @overload
    def __init__(
        self: InverseFisher[NDArray],
        gradients: Sliceable,
        *,
        damping: Damping,
        reduce: Reduce | None = None,
        progress: bool = False,
        store_whitened: bool = False,
    ) -> None: ...
    def __init__(
        self,
        gradients: Any,
        *,
        damping: Damping,
        reduce: Reduce | None = None,
        progress: bool = False,
        store_whitened: bool = False,
    ) -> None:
        given = check.damping_or_auto(damping)
        self.gradients = gradients
        rows = rows_of(gradients, reduce=reduce, progress=progress)
        if not store_whitened and has_fewer_columns(rows):
            given = damping_of(Blocks(rows)) if given is None else given
            self._damping, self._rows, self._lock = given, rows, Lock()
            if self._invert(rows):
                return
        if given is not None:
            digits.foresee(rows, given)
        gram = digits.finite_gram(rows)
        self._damping = damping_of(Blocks(rows, gram=gram)) if given is None else given
        self._start(rows, gram)
        if store_whitened:
            self._store_whitened()

    @classmethod
    def from_gram(
        cls,
        gradients: AnyGradients,
        gram: AnyArray,
        *,
        damping: Damping,
        exact: bool = False,
        reduce: Reduce | None = None,
        progress: bool = False,
    ) -> Self:
        """Make the operator from a Gram matrix that is already known.

        For gradients of which columns came one block after the other. For one set of gradients
        under many dampings see :meth:`with_damping`.

        Parameters
        ----------
        gradients : array of shape (m, d), sequence of arrays of shape (m, dₖ), or sliceable
            See the class. Read by later queries only.
        gram : array, shape (m, m)
            G Gᵀ, such as :attr:`gram` of another operator; summed over ranks, if there are any.
        damping : float or "auto"
            λ > 0; or that of :func:`choose_damping`.
        exact : bool, default False
            Whether it was computed from float64 products. One of float32 products is formed anew
            in float64, at d·m² multiplications, by the first query for whose λ it is not accurate
            enough; an exact one never is.
        reduce : callable, optional
            See the class.
        progress : bool, default False
            See the class.

        Returns
        -------
        InverseFisher
            As if made from the gradients alone.

        Raises
        ------
        TypeError, ValueError
            See the class; and if ``gram`` is not a finite symmetric matrix of shape (m, m), such as
            the triangle that BLAS's syrk returns.
        """
        given = check.damping_or_auto(damping)
        rows = rows_of(gradients, reduce=reduce, progress=progress)
        gram = rows.home.receive(check.gram_argument(gram, rows.shape[0]))
        gram = rows.home.xp.asarray(gram, copy=True)
        operator = cls.__new__(cls)
        operator._damping = damping_of(Blocks(rows, gram=gram)) if given is None else given
        operator.gradients = gradients
        # On the host a product asks for more where it needs it; on a device none is looked at.
        operator._start(rows, gram, checked=rows.home.is_host, exact=exact)
        return operator

    def with_damping(self, damping: float) -> Self:
        """Return the inverse over the same gradients under another λ.

        Parameters
        ----------
        damping : float
            λ > 0.

        Returns
        -------
        InverseFisher
            It shares the Gram with this operator, and what is known of its accuracy.

        Raises
        ------
        TypeError, ValueError
            If ``damping`` is not finite and positive.

        Notes
        -----
        O(m³), and no pass over the gradients; but the first λ for which a Gram of float32 products
        is not accurate enough has it formed anew in float64, here as there, and once. With fewer
        parameters than gradients F itself is formed and inverted anew.

        Examples
        --------
        >>> import numpy as np
        >>> import mfac_core as mfac
        >>> inverse = mfac.InverseFisher(np.array([[1.0, 0.0, 2.0]]), damping=1.0)
        >>> [float(inverse.with_damping(λ).logdet()) for λ in (0.5, 1.0)]
        [-0.3184537, -1.79175947]
        """
        return self._ask(self._with_damping, check.damping(damping))

    def _with_damping(self, damping: float) -> Self:
        if self._primal is not None:
            return type(self)(self.gradients, damping=damping, reduce=self._rows.reduce)
        exact = self._digits.exact
        other = self._of_rows(copy.copy(self._rows), damping, self._dual.gram, exact=exact)
        if other._rows.float64 and not self._rows.float64:
            self._rows.float64 = True
            self._dual.set_gram(other._dual.gram)
        if hasattr(self, "gradients"):
            other.gradients = self.gradients
        return other

    @classmethod
    def _of_rows(
        cls, rows: Rows, damping: float, gram: Array | None = None, *, exact: bool = False
    ) -> Self:
        operator = cls.__new__(cls)
        operator._damping = damping
        gram = digits.finite_gram(rows) if gram is None else gram
        operator._start(rows, gram, checked=exact and rows.home.is_host, exact=exact)
        return operator

    _whitened: Rows | None = None

    _stored_diagonal: Array
    """With ``_whitened``."""

    def _start(
        self, rows: Rows, gram: Array, *, checked: bool = False, exact: bool = False
    ) -> None:
        """Factor the dual; a ``checked`` Gram is taken as it is until a query needs more."""
        self._lock = Lock()
        self._rows = rows
        self._whitened = None
        self._dual = Dual(gram, self._divisor * self._damping, rows.home)
        self._digits = digits.Digits(
            rows,
            self._dual,
            self._damping,
            digits.LARGEST_STATIC_ROUNDING,
            checked=checked and (exact or not self._dual.is_indefinite()),
            exact=exact,
        )
        self._settle()
        self._dual.factor()

    def _by_dual(self) -> None:
        if not hasattr(self, "_dual"):
            self._start(self._rows, digits.finite_gram(self._rows))

    def solve_rows(self, e: ArrayT) -> ArrayT:
        """Return Gᵀ(GGᵀ + mλI)⁻¹e, the shortest step x for which Gx is e, but for the damping.

        It minimises ‖Gx − e‖²/m + λ‖x‖², and is F⁻¹Gᵀe/m, with nothing subtracted: one pass over
        the gradients where the general product has two. With rows J/√m of derivatives of log ψ,
        centred, and local energies e it is the step of stochastic reconfiguration as minSR takes
        it, with rows of residuals the natural gradient of a physics-informed network.

        Parameters
        ----------
        e : array, shape (m,) or (m, k)
            A number for each gradient, or columns of them; real floating, of the gradients'
            library and device.

        Returns
        -------
        array, shape (d,) or (d, k)
            In the promoted dtype of ``e`` and the gradients; over ranks the rank's own part.

        Raises
        ------
        TypeError, ValueError
            If ``e`` is not such an array.

        Warns
        -----
        scipy.linalg.LinAlgWarning
            If the terms of the sum Gᵀ(A⁻¹e) cancel down to its rounding.

        Notes
        -----
        A momentum μ in the dual, as of SPRING: x ← μx + solve_rows(e − μGx).

        Chen and Heyl, "Empowering deep neural quantum states through efficient optimization"
        (Nature Physics 2024); Goldshlager, Abrahamsen and Lin, "A Kaczmarz-inspired approach to
        accelerate the optimization of neural network wavefunctions" (2024).

        Examples
        --------
        >>> import numpy as np
        >>> import mfac_core as mfac
        >>> inverse = mfac.InverseFisher(np.array([[3.0, 4.0, 0.0]]), damping=1e-12)
        >>> inverse.solve_rows(np.array([5.0]))
        array([0.6, 0.8, 0. ])
        """
        e = check.vector_argument(e, "e", self._rows.shape[0], ndim=(1, 2))
        check.beside(e, "e", self._like())
        step: ArrayT = self._ask(self._solve_rows, e)
        return step

    def _solve_rows(self, e: Array) -> Array:
        self._by_dual()
        c = self._dual.solve(self._rows.home.receive(e))
        dtype = promote(e, self._rows.like.dtype)
        if c.ndim == 1:
            return self._digits.held(c, dtype)
        return self._rows.combine(c, None, 1.0, dtype=dtype)

    @property
    def gram(self) -> Array:
        """G Gᵀ, shape (m, m), float64: a copy."""
        self._by_dual()
        return self._rows.home.xp.asarray(self._dual.gram, copy=True)

    @property
    def dual(self) -> Array:
        """A = mλI + GGᵀ, shape (m, m), float64: a copy."""
        self._by_dual()
        return self._dual.matrix()

    def _store_whitened(self) -> None:
        # This makes the Gram as exact as it has to be.
        self._stored_diagonal = to_numpy(super()._diagonal())
        like = self._like()
        dtype = promote(like, array_namespace(like).float32)
        blocks = []
        for home, block in self._rows.wide_blocks():
            blocks.append(send(self._dual.whiten(block, home), like, dtype))
        self._whitened = ArrayRows(array_namespace(like).concat(blocks, axis=1))

    def _diagonal(self) -> Array:
        return super()._diagonal() if self._whitened is None else self._stored_diagonal.copy()

    def _entries(self, rows: Indices, cols: Indices) -> Array:
        if self._whitened is None:
            return super()._entries(rows, cols)
        diagonal = self._stored_diagonal
        smallest = min(np.min(diagonal[i], initial=math.inf) for i in (rows, cols))
        if digits.elements_need_float64(self._whitened.dtype, smallest * self._damping):
            values = super()._entries(rows, cols)
        else:
            values = -self._whitened.bilinear(rows, cols, lambda w: w) / self._damping
        return np.where(rows == cols, diagonal[rows], values)

    def _frozen(self) -> tuple[Rows, Array]:
        self._by_dual()
        return self._rows, self._dual.gram


@overload
def ihvp(gradients: Stored, x: NDArray, *, damping: Damping) -> NDArray: ...
@overload
def ihvp(gradients: Gradients[GivenT], x: GivenT, *, damping: Damping) -> GivenT: ...
@overload
def ihvp(gradients: Gradients[GivenT], x: list[GivenT], *, damping: Damping) -> list[GivenT]: ...
@overload
def ihvp(gradients: Sliceable, x: NDArray, *, damping: Damping) -> NDArray: ...
def ihvp(gradients: Any, x: Any, *, damping: Damping) -> Any:
    """Return F⁻¹x for the damped empirical Fisher matrix F = λI + GᵀG/m, in one call.

    Parameters
    ----------
    gradients : array of shape (m, d), sequence of arrays of shape (m, dₖ), or sliceable
        G, one gradient per row, real floating, of any storage that :class:`InverseFisher` takes.
    x : array, shape (d,) or (d, k)
        A vector, or columns of vectors, of the same library and device.
    damping : float or "auto"
        λ > 0; or that of :func:`choose_damping`.

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
    system is solved in float64 on the host. PyTorch and JAX differentiate it in ``x`` and in a
    single array of ``gradients``, JAX in ``damping`` too.

    Examples
    --------
    >>> import numpy as np
    >>> import mfac_core as mfac
    >>> mfac.ihvp(np.array([[3.0, 4.0]]), np.array([3.0, 4.0]), damping=5.0)
    array([0.1       , 0.13333333])
    """
    if is_traced(gradients, x, damping):
        gradients = check.gradients_argument(gradients)
        x = check.vector_argument(x, "x", gradients.shape[1], ndim=(1, 2))
        check.beside(x, "x", gradients)
        if not is_traced(damping):
            damping = check.damping(damping)
        return traced.ihvp(gradients, x, damping)
    autograd.refuse("gradients", gradients)
    if not autograd.is_recorded(gradients):
        return _ihvp(gradients, x, damping)
    return autograd.solved(functools.partial(_ihvp, damping=damping), gradients, x)


def _ihvp(gradients: Any, x: Any, damping: Damping) -> Any:
    rows = rows_of(gradients)
    rows.columns_argument(x, "x", (1, 2))  # before the work
    return InverseFisher(gradients, damping=damping) @ x
