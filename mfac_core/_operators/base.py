"""What every operator shares: shapes, products from both sides, conversions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Generic, Self, TypeAlias, TypeVar

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array, array_namespace, send, to_numpy
from mfac_core._operators import autograd
from mfac_core._rows.given import ColumnsUnknownError
from mfac_core._typing import ArrayT, IndexLike

if TYPE_CHECKING:
    import scipy.sparse.linalg

Indices: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"

Answer = TypeVar("Answer")


class SymmetricOperator(ABC, Generic[ArrayT]):
    """A real symmetric (d, d) matrix known by its products.

    This class is the one door: its public methods check arguments and :meth:`_ask` one thread at a
    time, on settled ground. Subclasses answer in private methods that know none of this: in float64
    where results are small, and calling no public ones.
    """

    ndim = 2
    __array_ufunc__ = None  # lets ndarray @ operator reach __rmatmul__
    __array_priority__ = 100.0

    _lock: AbstractContextManager[Any] = nullcontext()
    """What a query holds while it runs; nothing where queries change nothing."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(d, d)."""

    @property
    @abstractmethod
    def dtype(self) -> Any:
        """The dtype of the gradients, and of products with vectors of that dtype."""

    @property
    @abstractmethod
    def device(self) -> Any:
        """The device of the gradients."""

    @abstractmethod
    def _like(self) -> Array:
        """Return an array of the operator's library, dtype and (first) device."""

    @abstractmethod
    def _apply(self, x: Any) -> ArrayT:
        """Return the product with a checked x of shape (d,) or (d, k)."""

    @abstractmethod
    def _diagonal(self) -> Array:
        """Return the diagonal as any float array."""

    @abstractmethod
    def _entries(self, rows: Indices, cols: Indices) -> Array:
        """Return the elements (rows[k], cols[k]) as any float array, shape (k,)."""

    @abstractmethod
    def _submatrix(self, indices: Indices) -> Array:
        """Return the submatrix of these rows and columns as any float array."""

    @abstractmethod
    def _quadratic(self, x: Any) -> Array:
        """Return xᵀ·op·x as any float array, shape () or (k,)."""

    @abstractmethod
    def _sample(self, n: int, rng: np.random.Generator) -> Array:
        """Return n draws from N(0, op) as columns, shape (d, n)."""

    @abstractmethod
    def _logdet(self) -> float:
        """Return the logarithm of the determinant."""

    @abstractmethod
    def _power(self, p: float) -> SymmetricOperator[ArrayT]:
        """Return a power for a checked p."""

    def _settle(self) -> None:
        """See to what was left for the next query, before it."""

    def _ask(self, query: Callable[..., Answer], *arguments: Any) -> Answer:
        """Answer a query behind the one door."""
        with self._lock:
            self._settle()
            try:
                return query(*arguments)
            except ColumnsUnknownError as error:
                name = getattr(query, "__name__", "_this").removeprefix("_")
                raise ColumnsUnknownError(error.kind, name) from None

    def _multiplied(
        self, query: Callable[[Any], ArrayT], x: Any, name: str, ndim: tuple[int, ...]
    ) -> ArrayT:
        """Answer a product, as a part of PyTorch's graph where x is in one."""
        autograd.refuse(name, x)
        if not autograd.is_recorded(x):
            return self._ask(query, self._checked(x, name, ndim))
        version = self._version()

        def product(z: Array) -> Array:
            if self._version() != version:
                msg = (
                    "the operator has changed since the product that is differentiated; call "
                    "backward before it changes"
                )
                raise RuntimeError(msg)
            return self._ask(query, self._checked(z, name, ndim))

        recorded: ArrayT = autograd.multiplied(product, x)
        return recorded

    def _version(self) -> Any:
        """Return what differs once the operator has changed."""
        return None

    @property
    def T(self) -> Self:
        """The transpose: the operator itself."""
        return self

    @property
    def H(self) -> Self:
        """The adjoint: the operator itself."""
        return self

    def _checked(self, x: Any, name: str, ndim: tuple[int, ...]) -> Any:
        """Check what is to be multiplied."""
        x = check.vector_argument(x, name, self.shape[0], ndim=ndim)
        check.beside(x, name, self._like())
        return x

    def _sent(self, values: Array) -> ArrayT:
        """Bring small results to the operator's library, device and dtype."""
        like = self._like()
        sent: ArrayT = send(values, like, like.dtype)
        return sent

    def _column(self, j: int) -> ArrayT:
        return self._apply(self._unit(j))

    def _unit(self, j: int) -> Array:
        unit = np.zeros(self.shape[0])
        unit[j] = 1.0
        return self._sent(unit)

    def _normal(self, n: int, rng: np.random.Generator) -> Array:
        return self._sent(rng.standard_normal((self.shape[0], n)))

    def matvec(self, x: ArrayT) -> ArrayT:
        """Multiply a vector.

        Parameters
        ----------
        x : array, shape (d,)
            Real floating, of the gradients' library and device.

        Returns
        -------
        array, shape (d,)
            In the promoted dtype of ``x`` and the gradients.

        Raises
        ------
        TypeError
            If ``x`` is not a real floating array of the gradients' library.
        ValueError
            If its shape or device is another.
        """
        return self._multiplied(self._apply, x, "x", (1,))

    def matmat(self, x: ArrayT) -> ArrayT:
        """Multiply a matrix of columns at the speed of matrix products.

        Parameters
        ----------
        x : array, shape (d, k)
            Real floating, of the gradients' library and device.

        Returns
        -------
        array, shape (d, k)
            In the promoted dtype of ``x`` and the gradients.
        """
        return self._multiplied(self._apply, x, "x", (2,))

    def diagonal(self) -> ArrayT:
        """Return the diagonal.

        Returns
        -------
        array, shape (d,)
            In the gradients' dtype.

        Notes
        -----
        Streams over blocks of columns; nothing of size m × d is stored.
        """
        return self._sent(self._ask(self._diagonal))

    def entries(self, rows: IndexLike, cols: IndexLike) -> ArrayT:
        """Return single elements, by row and column.

        Parameters
        ----------
        rows, cols : int or array of int
            Indices below d, of shapes that broadcast; negative ones count from the end.

        Returns
        -------
        array
            Elements (rows, cols), in the broadcast shape and the gradients' dtype.

        Raises
        ------
        TypeError, IndexError
            If an index is not an integer, or out of range.

        Warns
        -----
        scipy.linalg.LinAlgWarning
            By an inverse, where λ is so small that float64 has no digits left of 1/λ less the rest.

        Notes
        -----
        An element of a low-rank operator costs O(m²), or O(m) where it stores whitened gradients;
        only the columns asked for are read.
        """
        i = check.indices(rows, "rows", self.shape[0])
        j = check.indices(cols, "cols", self.shape[0])
        try:
            i, j = np.broadcast_arrays(i, j)
        except ValueError:
            msg = f"rows and cols must have shapes that broadcast, got {i.shape} and {j.shape}"
            raise ValueError(msg) from None
        values = self._sent(self._ask(self._entries, i.ravel(), j.ravel()))
        shaped: ArrayT = array_namespace(values).reshape(values, i.shape)
        return shaped

    def column(self, j: int) -> ArrayT:
        """Return one column.

        Parameters
        ----------
        j : int
            Its index; negative ones count from the end.

        Returns
        -------
        array, shape (d,)
            In the gradients' dtype.

        Raises
        ------
        TypeError, IndexError
            If ``j`` is not an integer, or out of range.

        Warns
        -----
        scipy.linalg.LinAlgWarning
            By an inverse, where λ is so small that float64 has no digits left of 1/λ less the rest.

        Notes
        -----
        One pass over the gradients, where a product has two.
        """
        return self._ask(self._column, int(check.indices(j, "j", self.shape[0], ndim=(0,))))

    def submatrix(self, indices: IndexLike) -> ArrayT:
        """Return the square matrix of chosen rows and columns.

        Parameters
        ----------
        indices : array of int, shape (k,)
            Indices below d, in any order, repeated or not; negative ones count from the end.

        Returns
        -------
        array, shape (k, k)
            In the gradients' dtype.

        Raises
        ------
        TypeError, IndexError
            If an index is not an integer, or out of range.

        Warns
        -----
        scipy.linalg.LinAlgWarning
            By an inverse, where λ is so small that float64 has no digits left of 1/λ less the rest.

        Notes
        -----
        O(k·m² + k²·m) for a low-rank operator; only k columns of the gradients are read.
        """
        i = check.indices(indices, "indices", self.shape[0], ndim=(1,))
        return self._sent(self._ask(self._submatrix, i))

    def quadratic(self, x: ArrayT) -> Any:
        """Return xᵀ·op·x.

        Parameters
        ----------
        x : array, shape (d,) or (d, k)
            A vector, or columns of vectors.

        Returns
        -------
        float, or array of shape (k,)
            One number for each vector.

        Warns
        -----
        scipy.linalg.LinAlgWarning
            By an inverse, where λ is so small that float64 has no digits left of 1/λ less the rest.

        Notes
        -----
        One pass over the gradients, where a product has two.
        """
        x = self._checked(x, "x", (1, 2))
        values = self._ask(self._quadratic, x)
        return float(values) if values.ndim == 0 else self._sent(values)

    def logdet(self) -> float:
        """Return the logarithm of the operator's determinant.

        Returns
        -------
        float
            log det of the operator itself: of F for a Fisher matrix, of F⁻¹ for an inverse one.
        """
        return self._ask(self._logdet)

    def power(self, p: float) -> SymmetricOperator[ArrayT]:
        """Return a real power of this operator, as an operator.

        Parameters
        ----------
        p : float
            Any real number. Relative to this operator: ``InverseFisher(...).power(0.5)`` is F^-½.

        Returns
        -------
        operator of shape (d, d)
            With the same queries.

        Raises
        ------
        TypeError, ValueError
            If ``p`` is not a finite number.
        """
        return self._ask(self._power, check.finite_number(p, "p"))

    def sample(self, n: int, rng: np.random.Generator | int | None = None) -> ArrayT:
        """Draw from the normal distribution with this operator as its covariance.

        Parameters
        ----------
        n : int
            How many draws.
        rng : numpy.random.Generator or int, optional
            Source of randomness, or a seed for one.

        Returns
        -------
        array, shape (n, d)
            Draws from N(0, op), in the gradients' dtype.
        """
        n = check.integer(n, "n", minimum=1)
        draws: ArrayT = self._ask(self._sample, n, check.generator(rng)).T
        return draws

    def rmatvec(self, x: ArrayT) -> ArrayT:
        """Multiply a vector by the adjoint, which is the operator itself.

        Parameters
        ----------
        x : array, shape (d,)
            See :meth:`matvec`.

        Returns
        -------
        array, shape (d,)
            See :meth:`matvec`.
        """
        return self.matvec(x)

    def rmatmat(self, x: ArrayT) -> ArrayT:
        """Multiply a matrix by the adjoint, which is the operator itself.

        Parameters
        ----------
        x : array, shape (d, k)
            See :meth:`matmat`.

        Returns
        -------
        array, shape (d, k)
            See :meth:`matmat`.
        """
        return self.matmat(x)

    def __matmul__(self, x: ArrayT) -> ArrayT:
        return self._multiplied(self._apply, x, "x", (1, 2))

    def __rmatmul__(self, x: ArrayT) -> ArrayT:
        if getattr(x, "ndim", 1) == 2:
            product: ArrayT = self._multiplied(self._apply, x.T, "x.T", (2,)).T
            return product
        return self._multiplied(self._apply, x, "x", (1,))

    def to_dense(self) -> ArrayT:
        """Return the (d, d) matrix itself; for checks on small problems.

        Returns
        -------
        array, shape (d, d)
            In the gradients' dtype; O(d²) memory, d products.
        """
        dense: Array = self._ask(self._apply, self._sent(np.eye(self.shape[0])))
        # Rounding differs above and below the diagonal; the matrix is symmetric.
        dense = (dense + dense.T) / 2
        matrix: ArrayT = array_namespace(dense).astype(dense, self._like().dtype, copy=False)
        return matrix

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """Return a SciPy LinearOperator of NumPy arrays, with ``matmat`` kept whole.

        Returns
        -------
        scipy.sparse.linalg.LinearOperator
            Takes and gives NumPy arrays whatever the gradients' library is; its ``dtype`` is
            float32 for gradients in 16 bits.
        """
        import scipy.sparse.linalg

        numpy_dtype = to_numpy(self._like()[:0, :0]).dtype
        dtype = np.promote_types(numpy_dtype, np.float32)

        def multiply(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            columns = x.reshape(x.shape[0], -1) if x.ndim == 2 else x
            product = to_numpy(self._ask(self._apply, self._sent(columns)))
            return product.astype(dtype, copy=False)

        return scipy.sparse.linalg.LinearOperator(
            shape=self.shape,
            matvec=multiply,
            rmatvec=multiply,
            matmat=multiply,
            rmatmat=multiply,
            dtype=dtype,
        )

    def __repr__(self) -> str:
        d = self.shape[0]
        return f"<{d}x{d} {type(self).__name__}{self._of_what()} with dtype {self.dtype}>"

    def _of_what(self) -> str:
        """Return what else an operator says of itself."""
        return ""
