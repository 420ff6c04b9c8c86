"""Oracles and assertions for checking inverse Fisher products, here and in your own tests.

Three independent ways to the same numbers, none of which shares code with the operators: a dense
float64 inverse by SciPy, and the paper's two algorithms written plainly, one vector at a time.
All of them are for small problems.

The paper is E. Frantar, E. Kurtic, D. Alistarh, "M-FAC: Efficient Matrix-Free Approximations of
Second-Order Information", NeurIPS 2021, arXiv 2107.03356.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy

from mfac_core import _validate as check
from mfac_core._arrays import Array, array_namespace, library_name, send, to_numpy
from mfac_core._operators.base import SymmetricOperator
from mfac_core._rows.protocol import GradientRows
from mfac_core._rows.storage import rows_of
from mfac_core._typing import AnyArray

NDArray = np.ndarray[Any, Any]

__all__ = [
    "DynamicRecursion",
    "StaticRecursion",
    "assert_operator_close",
    "assert_rows",
    "dense_fisher",
    "dense_inverse",
    "error_bound",
]


def dense_fisher(gradients: AnyArray, *, damping: float, divisor: int | None = None) -> NDArray:
    """Return F = λI + GᵀG/n as a dense float64 matrix.

    Parameters
    ----------
    gradients : array, shape (m, d)
        G, one gradient per row, of any array library.
    damping : float
        λ > 0.
    divisor : int, optional
        n; the number of gradients m by default.

    Returns
    -------
    numpy.ndarray, shape (d, d)
        F. O(d²) memory.

    Examples
    --------
    >>> import numpy as np
    >>> from mfac_core.testing import dense_fisher
    >>> dense_fisher(np.array([[1.0, 2.0]]), damping=1.0)
    array([[2., 2.],
           [2., 5.]])
    """
    g = _wide(gradients)
    damping = check.damping(damping)
    n = len(g) if divisor is None else divisor
    return damping * np.eye(g.shape[1]) + g.T @ g / n


def dense_inverse(gradients: AnyArray, *, damping: float, divisor: int | None = None) -> NDArray:
    """Return F⁻¹ as a dense float64 matrix, by SciPy.

    Parameters
    ----------
    gradients : array, shape (m, d)
        G, one gradient per row, of any array library.
    damping : float
        λ > 0.
    divisor : int, optional
        n of F = λI + GᵀG/n; the number of gradients m by default.

    Returns
    -------
    numpy.ndarray, shape (d, d)
        F⁻¹, symmetric. O(d³) operations.

    Examples
    --------
    >>> import numpy as np
    >>> from mfac_core.testing import dense_inverse
    >>> dense_inverse(np.array([[0.0, 2.0]]), damping=1.0)
    array([[1. , 0. ],
           [0. , 0.2]])
    """
    fisher = dense_fisher(gradients, damping=damping, divisor=divisor)
    inverse = scipy.linalg.inv(fisher)
    return (inverse + inverse.T) / 2  # type: ignore[no-any-return]


class StaticRecursion:
    """The paper's static algorithm: F⁻¹ by one Sherman-Morrison step per gradient.

    With F_k the matrix after k gradients (divisor m throughout), v_k = F_{k-1}⁻¹ g_k and
    q_k = m + g_kᵀ v_k, so that F⁻¹ = I/λ − Σ_k v_k v_kᵀ / q_k. O(d·m²) to set up.

    Parameters
    ----------
    gradients : array, shape (m, d)
        One gradient per row, of any array library.
    damping : float
        λ > 0.
    dtype : dtype, default float64
        NumPy dtype the recursion runs in.

    Attributes
    ----------
    v : numpy.ndarray, shape (m, d)
        The vectors v_k.
    q : numpy.ndarray, shape (m,)
        The scalars q_k.
    damping : float
        λ.

    Examples
    --------
    >>> import numpy as np
    >>> from mfac_core.testing import StaticRecursion
    >>> StaticRecursion(np.array([[0.0, 2.0]]), damping=1.0).matvec(np.array([1.0, 5.0]))
    array([1., 1.])
    """

    def __init__(self, gradients: AnyArray, *, damping: float, dtype: Any = np.float64) -> None:
        g = to_numpy(gradients).astype(dtype, copy=False)
        self.damping = check.damping(damping)
        m = len(g)
        self.v = np.empty_like(g)
        self.q = np.empty(m, dtype)
        for k in range(m):
            self.v[k] = self._partial(g[k], k)
            self.q[k] = m + g[k] @ self.v[k]

    def matvec(self, x: AnyArray) -> NDArray:
        """Return F⁻¹x = x/λ − Σ_k (v_kᵀx / q_k) v_k; O(d·m).

        Parameters
        ----------
        x : array, shape (d,)
            A vector.

        Returns
        -------
        numpy.ndarray, shape (d,)
            F⁻¹x.
        """
        return self._partial(to_numpy(x).astype(self.v.dtype), len(self.v))

    def entry(self, i: int, j: int) -> float:
        """Return [F⁻¹]ᵢⱼ = δᵢⱼ/λ − Σ_k v_kᵢ v_kⱼ / q_k; O(m).

        Parameters
        ----------
        i, j : int
            Row and column.

        Returns
        -------
        float
            The element.
        """
        return float((i == j) / self.damping - np.sum(self.v[:, i] * self.v[:, j] / self.q))

    def _partial(self, x: NDArray, k: int) -> NDArray:
        """F_k⁻¹x."""
        weights = (self.v[:k] @ x) / self.q[:k]
        return x / self.v.dtype.type(self.damping) - weights @ self.v[:k]  # type: ignore[no-any-return]


class DynamicRecursion:
    """The paper's dynamic algorithm: F⁻¹x through m × m matrices D and B.

    D_ij = g_iᵀ F_{i-1}⁻¹ g_j for j ≥ i, and F_{i-1}⁻¹ g_i = Σ_j B_ij g_j, so that all that is
    d-sized are products with G. O(d·m² + m³) to set up.

    Parameters
    ----------
    gradients : array, shape (m, d)
        One gradient per row, of any array library.
    damping : float
        λ > 0.
    dtype : dtype, default float64
        NumPy dtype the recursion runs in.

    Attributes
    ----------
    D : numpy.ndarray, shape (m, m)
        Upper triangular.
    B : numpy.ndarray, shape (m, m)
        Lower triangular.
    damping : float
        λ.

    Examples
    --------
    >>> import numpy as np
    >>> from mfac_core.testing import DynamicRecursion
    >>> DynamicRecursion(np.array([[0.0, 2.0]]), damping=1.0).matvec(np.array([1.0, 5.0]))
    array([1., 1.])
    """

    def __init__(self, gradients: AnyArray, *, damping: float, dtype: Any = np.float64) -> None:
        self._g = g = to_numpy(gradients).astype(dtype, copy=False)
        self.damping = check.damping(damping)
        m = len(g)
        self.D = np.triu(g @ g.T / self.damping)
        self.B = np.eye(m, dtype=dtype) / self.damping
        for i in range(m):
            weights = self.D[:i, i] / (m + np.diagonal(self.D)[:i])
            self.D[i, i:] -= weights @ self.D[:i, i:]
            self.B[i] -= weights @ self.B[:i]

    def matvec(self, x: AnyArray) -> NDArray:
        """Return F⁻¹x = x/λ − Σ_i b_i / (m + D_ii) Σ_j B_ij g_j, with b_i = g_iᵀ F_{i-1}⁻¹ x.

        Parameters
        ----------
        x : array, shape (d,)
            A vector.

        Returns
        -------
        numpy.ndarray, shape (d,)
            F⁻¹x; O(d·m + m²).
        """
        x = to_numpy(x).astype(self._g.dtype)
        m = len(self._g)
        pivots = m + np.diagonal(self.D)
        b = self._g @ x / self.damping
        for i in range(m):
            b[i] -= self.D[:i, i] / pivots[:i] @ b[:i]
        return x / self.damping - (b / pivots) @ self.B @ self._g  # type: ignore[no-any-return]


def error_bound(
    gradients: AnyArray, *, damping: float, dtype: Any = None, divisor: int | None = None
) -> float:
    """Return a bound on the relative error of F⁻¹x: a modest multiple of κ(F) times rounding.

    Parameters
    ----------
    gradients : array, shape (m, d)
        G, one gradient per row, of any array library.
    damping : float
        λ > 0.
    dtype : NumPy dtype, optional
        What the products were computed in; the gradients' own dtype by default.
    divisor : int, optional
        n of F = λI + GᵀG/n; the number of gradients m by default.

    Returns
    -------
    float
        (8 + √m)·κ(F)·ε, where κ(F) ≤ (λ + tr(GᵀG)/n)/λ is F's condition number and ε the spacing
        of 1 in ``dtype``. To be compared with ‖y − F⁻¹x‖/‖F⁻¹x‖.

    Notes
    -----
    F⁻¹x = (x − Gᵀ A⁻¹ G x)/λ subtracts numbers as large as ‖x‖/λ, each rounded, to leave at least
    ‖x‖/‖F‖; a relative perturbation of ε in A moves its solutions by κ(A)·ε ≤ κ(F)·ε. Random
    rounding errors of m terms add up like √m.

    Examples
    --------
    >>> import numpy as np
    >>> from mfac_core.testing import error_bound
    >>> bound = error_bound(np.array([[0.0, 2.0]]), damping=1.0)
    >>> round(bound / np.finfo(float).eps)
    45
    """
    g = _wide(gradients)
    n = len(g) if divisor is None else divisor
    spacing = _spacing(gradients if dtype is None else np.empty(0, dtype))
    condition = 1.0 + float(np.sum(g * g)) / (n * damping)
    return float((8 + len(g) ** 0.5) * condition * spacing)


def assert_operator_close(
    operator: SymmetricOperator, dense: NDArray, *, rtol: float, seed: int = 0
) -> None:
    """Assert that an operator is a given matrix, whatever way it is asked.

    Compares products with a vector and with columns from both sides, ``@``, the transpose, the
    diagonal, elements, columns, submatrices, quadratic forms, the log-determinant, the square
    root and the inverse, ``to_dense`` and ``to_scipy``; checks shapes, dtypes and the array
    library of results.

    Parameters
    ----------
    operator : operator of shape (d, d)
        Any operator of this package.
    dense : numpy.ndarray, shape (d, d)
        The matrix it should be, for example from :func:`dense_inverse`.
    rtol : float
        Largest error of a result relative to its norm, for example from :func:`error_bound`.
    seed : int, default 0
        For the vectors, which are standard normal.

    Raises
    ------
    AssertionError
        If a result differs; names it and its error.

    Examples
    --------
    >>> import numpy as np
    >>> import mfac_core as mfac
    >>> from mfac_core.testing import assert_operator_close, dense_inverse, error_bound
    >>> G = np.random.default_rng(0).standard_normal((3, 5))
    >>> operator = mfac.InverseFisher(G, damping=0.1)
    >>> bound = error_bound(G, damping=0.1)
    >>> assert_operator_close(operator, dense_inverse(G, damping=0.1), rtol=bound)
    """
    d = dense.shape[0]
    assert operator.shape == (d, d), f"shape is {operator.shape}, expected {(d, d)}"
    like = operator._like()
    rng = np.random.default_rng(seed)
    vector = send(rng.standard_normal(d), like, operator.dtype)
    columns = send(rng.standard_normal((d, 3)), like, operator.dtype)
    x, columns64 = _wide(vector), _wide(columns)

    rows, cols = rng.integers(-d, d, (2, 4)), rng.integers(-d, d, 4)
    indices = rng.integers(-d, d, 5)
    j = int(rng.integers(d))
    values, vectors = np.linalg.eigh(dense)
    root, inverse = ((vectors * values**p) @ vectors.T for p in (0.5, -1.0))
    quadratics = np.sum(columns64 * (dense @ columns64), axis=0)

    results = {
        "matvec": (operator.matvec(vector), dense @ x),
        "rmatvec": (operator.rmatvec(vector), dense.T @ x),
        "matmat": (operator.matmat(columns), dense @ columns64),
        "rmatmat": (operator.rmatmat(columns), dense.T @ columns64),
        "operator @ vector": (operator @ vector, dense @ x),
        "operator @ columns": (operator @ columns, dense @ columns64),
        "operator.T @ vector": (operator.T @ vector, dense.T @ x),
        "operator.H @ vector": (operator.H @ vector, dense.T @ x),
        "diagonal": (operator.diagonal(), np.diagonal(dense)),
        "column": (operator.column(j), dense[:, j]),
        "quadratic of columns": (operator.quadratic(columns), quadratics),
        "power(0.5) @ vector": (operator.power(0.5) @ vector, root @ x),
        "power(-1) @ vector": (operator.power(-1) @ vector, inverse @ x),
        "to_dense": (operator.to_dense(), dense),
    }
    elements = {
        "entries": (operator.entries(rows, cols), dense[rows, cols]),
        "submatrix": (operator.submatrix(indices), dense[np.ix_(indices, indices)]),
    }
    largest = np.abs(dense).max()
    for name, (result, expected) in elements.items():
        error = np.abs(_wide(result) - expected).max() / largest
        assert error <= rtol, f"{name} is off by {error:.2e} of the largest; allowed: {rtol:.2e}"
    logs = np.log(values)
    error, allowed = abs(operator.logdet() - np.sum(logs)), rtol * np.sum(1.0 + np.abs(logs))
    assert error <= allowed, f"logdet is off by {error:.2e}; allowed were {allowed:.2e}"
    _assert_close("quadratic", np.asarray(operator.quadratic(vector)), x @ dense @ x, rtol)
    assert operator.sample(2, rng).shape == (2, d)

    for name, (result, expected) in results.items():
        assert array_namespace(result) is array_namespace(like), (
            f"{name} is of {library_name(result)}"
        )
        assert result.dtype == operator.dtype, f"{name} is of dtype {result.dtype}"
        _assert_close(name, _wide(result), expected, rtol)

    linear = operator.to_scipy()
    _assert_close("to_scipy() @ vector", linear @ x, dense @ x, rtol)
    _assert_close("to_scipy() @ columns", linear @ columns64, dense @ columns64, rtol)


def assert_rows(rows: GradientRows, *, rtol: float | None = None, seed: int = 0) -> None:
    """Assert that the products of gradients are those of one matrix G.

    With random x, y, c and e: that a second call gives what the first gave, G(x + 2y) = Gx + 2Gy,
    Gᵀ(c + 2e) = Gᵀc + 2Gᵀe, ⟨Gx, c⟩ = ⟨x, Gᵀc⟩, (GGᵀ)c = G(Gᵀc), that the Gram is symmetric,
    and that matrices are multiplied column by column; ``columns``, ``blocks`` and ``in_float64``
    are compared with these, where they are there.

    Parameters
    ----------
    rows : GradientRows
        What is to be taken in the place of an (m, d) array.
    rtol : float, optional
        Largest error of a product relative to the norms of its factors, ‖G‖ the Frobenius norm;
        100 spacings of 1 in the rows' dtype by default.
    seed : int, default 0
        For the vectors, which are standard normal.

    Raises
    ------
    AssertionError
        If a relation does not hold; names it and its error.
    TypeError, ValueError
        If what comes back is not an array of the rows' library and device of the right shape.

    Examples
    --------
    >>> import numpy as np
    >>> from mfac_core.testing import assert_rows
    >>> class Stored:
    ...     def __init__(self, g):
    ...         self.g, self.shape, self.dtype = g, g.shape, g.dtype
    ...
    ...     def gram(self):
    ...         return self.g @ self.g.T
    ...
    ...     def project(self, x):
    ...         return self.g @ x
    ...
    ...     def combine(self, c):
    ...         return self.g.T @ c
    >>> assert_rows(Stored(np.eye(3, 5)))
    """
    given, like = rows_of(rows), rows_of(rows).like
    (m, d), rng = given.shape, np.random.default_rng(seed)
    rtol = 100.0 * _spacing(like) if rtol is None else rtol

    def sent(values: NDArray) -> Array:
        return send(values, like, like.dtype)

    def project(x: NDArray) -> NDArray:
        return _wide(given.project(sent(x)))

    def combine(c: NDArray) -> NDArray:
        home = given.home.receive(c)
        return _wide(given.combine(home, None, 1.0, dtype=like.dtype))

    def check_close(name: str, actual: NDArray, expected: NDArray, scale: float) -> None:
        error = float(np.max(np.abs(actual - expected), initial=0.0)) / max(scale, 1e-300)
        assert error <= rtol, f"{name} is off by {error:.2e} of its factors; allowed: {rtol:.2e}"

    # Exactly the same numbers in every dtype.
    x, y = (_wide(sent(rng.standard_normal(d))) for _ in range(2))
    c, e = (_wide(sent(rng.standard_normal(m))) for _ in range(2))
    gram = _wide(given.gram())
    size = float(np.sqrt(max(np.trace(gram), 0.0)))
    x_size, c_size = (size * float(np.linalg.norm(v)) for v in (x, c))
    gx, gc = project(x), combine(c)
    check_close("project(x), a second time,", project(x), gx, x_size)
    check_close("combine(c), a second time,", combine(c), gc, c_size)
    check_close("gram(), a second time,", _wide(given.gram()), gram, size**2)
    twice = _wide(sent(x + 2 * y)), _wide(sent(c + 2 * e))
    check_close("project(x + 2y)", project(twice[0]), gx + 2 * project(y), 4 * x_size)
    check_close("combine(c + 2e)", combine(twice[1]), gc + 2 * combine(e), 4 * c_size)
    check_close("⟨project(x), c⟩ beside ⟨x, combine(c)⟩", gx @ c, x @ gc, x_size * c_size / size)
    check_close("gram() @ c beside project(combine(c))", gram @ c, project(gc), size * c_size)
    check_close("gram() beside its transpose", gram, gram.T, size**2)
    columns = project(np.stack([x, y], axis=1))
    check_close("project of columns", columns, np.stack([gx, project(y)], axis=1), 4 * x_size)
    columns = combine(np.stack([c, e], axis=1))
    check_close("combine of columns", columns, np.stack([gc, combine(e)], axis=1), 4 * c_size)
    if given.reads_columns:
        units = np.zeros((d, 3))
        indices = rng.integers(0, d, 3)
        units[indices, np.arange(3)] = 1.0
        check_close("columns by index", _wide(given.take(indices)), project(units), size)
        total = sum((_wide(b) @ x[at] for at, b in given.parts()), np.zeros(m))
        check_close("blocks() @ x beside project(x)", total, gx, x_size)
    if given.widens:
        wide = given.in_float64()
        check_close("project(x) in float64", _wide(wide.project(sent(x))), gx, x_size)
        check_close("gram() in float64", _wide(wide.gram()), gram, size**2)


def _assert_close(name: str, actual: NDArray, expected: Any, rtol: float) -> None:
    assert actual.shape == np.shape(expected), f"{name} has shape {actual.shape}"
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error <= rtol, f"{name} is off by {error:.2e}, relative; allowed were {rtol:.2e}"


def _wide(x: Array) -> NDArray:
    return to_numpy(check.array_argument(x, "the argument")).astype(np.float64)


def _spacing(x: Array) -> float:
    """ε of the dtype, those of 16 bits included."""
    return float(array_namespace(x).finfo(x.dtype).eps)
