"""Rows that are only functions: what an object must offer in the place of an array."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from mfac_core._typing import ArrayT, GivenT, Sliceable


@runtime_checkable
class GradientRows(Protocol[ArrayT]):
    """Gradients G, shape (m, d), that need not exist: known by their Gram matrix and products.

    Any object with these members is taken wherever gradients are, by :class:`InverseFisher`,
    :func:`ihvp`, :class:`EmpiricalFisher` and all else; nothing is to be inherited. F⁻¹ takes one
    Gram matrix, and each product with it one ``project`` and one ``combine``.

    Attributes
    ----------
    shape : tuple of int
        (m, d).
    dtype : dtype
        Of the gradients, real floating. PyTorch's stands for tensors of PyTorch, all others for
        arrays of the namespace that the method ``__array_namespace__()`` returns, which is the
        array standard's way to say it, or for NumPy's where there is no such method.
    device : optional
        Where these arrays are; the library's default without it.

    Notes
    -----
    ``project`` and ``combine`` are given arrays of that library, dtype and device, and return such.
    Errors of the Gram are what limits F⁻¹: sum its products in float64, in an array of NumPy where
    the library has none, as JAX by default. These may be there as well:

    ``in_float64()``
        Returns the same rows in float64: rows as these, of that dtype, and of NumPy where the
        library has no float64. Asked for where the damping is too small beside the gradients for
        fewer digits; without it a warning says so.
    ``cross(other)``
        Returns G Hᵀ, shape (m, q), for rows H of the same type. Influence asks for it where queries
        are such rows; without it by ``combine`` and ``project``, a product for each query.
    ``columns(indices)``
        Columns of G by index, a NumPy array of int64: an array of shape (m, len(indices)).
    ``blocks()``
        All columns of G in their order, in blocks: arrays of shape (m, width).

    ``columns`` or ``blocks`` is needed by whatever looks at single parameters, ``diagonal``,
    ``entries``, ``column`` and ``submatrix``, by blocks and by pruning, which refuse without.
    Products, ``quadratic``, ``logdet``, ``power`` and ``sample`` need neither. With ``reduce`` the
    Gram and the products are those of the rank's own columns.

    See Also
    --------
    mfac_core.testing.assert_rows : Checks that the three methods are of one G.
    mfac_core.torch.ModelGradients : Those of a model, which are never stored.

    Examples
    --------
    The rows gᵢ = aᵢ ⊗ bᵢ of a linear layer, by their factors:

    >>> import numpy as np
    >>> import mfac_core as mfac
    >>> class Layer:
    ...     def __init__(self, a, b):
    ...         self.a, self.b = a, b
    ...         self.shape, self.dtype = (len(a), a.shape[1] * b.shape[1]), a.dtype
    ...
    ...     def gram(self):
    ...         return (self.a @ self.a.T) * (self.b @ self.b.T)
    ...
    ...     def project(self, x):
    ...         x = x.reshape(self.a.shape[1], self.b.shape[1], *x.shape[1:])
    ...         return np.einsum("mi,mj,ij...->m...", self.a, self.b, x)
    ...
    ...     def combine(self, c):
    ...         y = np.einsum("mi,mj,m...->ij...", self.a, self.b, c)
    ...         return y.reshape(self.shape[1], *c.shape[1:])
    >>> layer = Layer(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 2.0], [1.0, 0.0]]))
    >>> inverse = mfac.InverseFisher(layer, damping=0.5)
    >>> inverse @ np.array([3.0, 1.0, 3.0, 0.0])
    array([ 4.33333333, -1.33333333,  3.        ,  0.        ])
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d)."""

    @property
    def dtype(self) -> Any:
        """The dtype of the gradients."""

    def gram(self) -> Any:
        """Return G Gᵀ.

        Returns
        -------
        array, shape (m, m)
            Symmetric; in float64 where the library has it.
        """

    def project(self, x: ArrayT, /) -> ArrayT:
        """Return G x.

        Parameters
        ----------
        x : array, shape (d,) or (d, k)
            A vector, or columns of vectors; not to be written to.

        Returns
        -------
        array, shape (m,) or (m, k)
            In any real floating dtype.
        """

    def combine(self, c: ArrayT, /) -> ArrayT:
        """Return Gᵀc.

        Parameters
        ----------
        c : array, shape (m,) or (m, k)
            A vector, or columns of vectors; not to be written to.

        Returns
        -------
        array, shape (d,) or (d, k)
            In any real floating dtype.
        """


AnyGradients: TypeAlias = Sliceable | Sequence[Sliceable | Path] | Path | GradientRows[Any]
"""Whatever is taken for gradients."""

Gradients: TypeAlias = GivenT | Sequence[GivenT] | GradientRows[GivenT]
"""Gradients beside which vectors are arrays of the same type."""
