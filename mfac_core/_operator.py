"""What every operator shares: shapes, products from both sides, conversions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array, array_namespace, send, to_numpy

if TYPE_CHECKING:
    import scipy.sparse.linalg


class SymmetricOperator(ABC):
    """A real symmetric (d, d) matrix known by its products.

    Subclasses give ``shape``, ``dtype``, ``device``, :meth:`diagonal` and two private acts:
    ``_apply`` a checked vector or matrix of columns, and ``_like``, an array of the operator's
    library and device (of any shape).
    """

    ndim = 2
    __array_ufunc__ = None  # lets ndarray @ operator reach __rmatmul__
    __array_priority__ = 100.0

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
    def diagonal(self) -> Array:
        """Return the diagonal, shape (d,)."""

    @abstractmethod
    def _apply(self, x: Array, refine: int) -> Array:
        """Return the product with a checked x of shape (d,) or (d, k)."""

    @abstractmethod
    def _like(self) -> Array:
        """Return an array of the operator's library and device."""

    @property
    def T(self) -> Self:
        """The transpose: the operator itself."""
        return self

    @property
    def H(self) -> Self:
        """The adjoint: the operator itself."""
        return self

    def _product(self, x: Array, name: str, ndim: tuple[int, ...], refine: int = 0) -> Array:
        x = check.vector_argument(x, name, self.shape[0], ndim=ndim)
        check.beside(x, name, self._like())
        return self._apply(x, check.integer(refine, "refine", minimum=0))

    def matvec(self, x: Array) -> Array:
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
        return self._product(x, "x", (1,))

    def matmat(self, x: Array) -> Array:
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
        return self._product(x, "x", (2,))

    def rmatvec(self, x: Array) -> Array:
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

    def rmatmat(self, x: Array) -> Array:
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

    def __matmul__(self, x: Array) -> Array:
        return self._product(x, "x", (1, 2))

    def __rmatmul__(self, x: Array) -> Array:
        if getattr(x, "ndim", 1) == 2:
            return self._product(x.T, "x.T", (2,)).T
        return self._product(x, "x", (1,))

    def to_dense(self) -> Array:
        """Return the (d, d) matrix itself; for checks on small problems.

        Returns
        -------
        array, shape (d, d)
            In the gradients' dtype; O(d²) memory, d products.
        """
        like = self._like()
        xp = array_namespace(like)
        eye = send(np.eye(self.shape[0]), like, self.dtype)
        dense = self._apply(eye, 0)
        # Rounding differs above and below the diagonal; the matrix is symmetric.
        return xp.astype((dense + dense.T) / 2, self.dtype, copy=False)

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """Return a SciPy LinearOperator of NumPy arrays, with ``matmat`` kept whole.

        Returns
        -------
        scipy.sparse.linalg.LinearOperator
            Takes and gives NumPy arrays whatever the gradients' library is; its ``dtype`` is
            float32 for gradients in 16 bits.
        """
        import scipy.sparse.linalg

        like = self._like()
        numpy_dtype = to_numpy(like[:0, :0]).dtype
        dtype = np.promote_types(numpy_dtype, np.float32)

        def multiply(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            columns = x.reshape(x.shape[0], -1) if x.ndim == 2 else x
            product = to_numpy(self._apply(send(columns, like, self.dtype), 0))
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
        return f"<{d}x{d} {type(self).__name__} with dtype {self.dtype}>"
