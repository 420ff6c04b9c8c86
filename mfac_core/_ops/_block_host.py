"""Many small symmetric matrices in NumPy, in products that BLAS does not split over threads.

BLAS wakes a second thread for each product above some size. Over thousands of small matrices, on
a machine with other work, most of the time would go by in waiting for it. So products come in
tiles small enough to stay in the thread that asks for them, and batches of blocks are spread over
Python threads instead, which NumPy lets run side by side. No setting of any library is touched.
"""

from __future__ import annotations

from typing import Any

import numpy as np

NDArray = np.ndarray[Any, Any]

TILE = 64
"""Edge of a product: 64³ multiplications are the most that OpenBLAS leaves to one thread."""

VECTOR_ELEMENTS = 9216
"""Elements of a matrix that is multiplied by a vector from which on OpenBLAS takes more threads."""

BASE = 16
"""Size of triangles that are inverted all at once, element by element."""


def multiply(a: NDArray, b: NDArray) -> NDArray:
    """Return the products of two stacks of matrices, (n, i, k) and (n, k, j)."""
    n, rows, inner = a.shape
    columns = b.shape[2]
    if columns == 1:
        return _times_vectors(a, b)
    if rows * inner * columns <= TILE**3:
        return a @ b
    result = np.empty((n, rows, columns))
    _multiply_into(result, a, b)
    return result


def _times_vectors(a: NDArray, x: NDArray) -> NDArray:
    """Return products with one vector each, in as many rows as BLAS leaves to one thread."""
    n, rows, inner = a.shape
    if rows * inner < VECTOR_ELEMENTS:
        return a @ x
    result = np.empty((n, rows, 1))
    for i in _tiles(rows, max((VECTOR_ELEMENTS - 1) // max(inner, 1), 1)):
        np.matmul(a[:, i], x, out=result[:, i])
    return result


def stream(a: NDArray, x: NDArray) -> NDArray:
    """Return the products of matrices with one vector each; for matrices that are not in cache.

    NumPy's own loop reads memory faster than BLAS, which is faster in cache.
    """
    result: NDArray = np.einsum("nij,nj->ni", a, x[:, :, 0])
    return result[:, :, None]


def square(a: NDArray) -> NDArray:
    """Return a aᵀ for a stack of matrices, (n, i, k); symmetric to the last bit."""
    n, rows, inner = a.shape
    transposed = a.transpose(0, 2, 1)
    if rows * inner * rows <= TILE**3:
        return a @ transposed
    result = np.empty((n, rows, rows))
    for i in _tiles(rows, TILE // 2):
        left = slice(0, i.start)
        _multiply_into(result[:, i, left], a[:, i], transposed[:, :, left])
        result[:, left, i] = result[:, i, left].transpose(0, 2, 1)
        # By itself: NumPy sees that it is a product with its own transpose.
        _multiply_into(result[:, i, i], a[:, i], transposed[:, :, i])
    return result


def _multiply_into(out: NDArray, a: NDArray, b: NDArray) -> None:
    """Set out = ab by tiles of rows and columns, and by parts of the sum where that is long."""
    for i in _tiles(out.shape[1], TILE // 2):
        step = min(a.shape[2], TILE * 4)
        width = TILE**3 // ((i.stop - i.start) * step)
        for j in _tiles(out.shape[2], width):
            here = out[:, i, j]
            for part in _tiles(a.shape[2], step):
                if part.start == 0:
                    np.matmul(a[:, i, part], b[:, part, j], out=here)
                else:
                    here += a[:, i, part] @ b[:, part, j]


def _tiles(length: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, length)) for i in range(0, length, step)]


def inverse_factor(a: NDArray) -> NDArray:
    """Return R = L⁻¹ for each a = L Lᵀ of a stack: lower triangular, a⁻¹ = RᵀR.

    By halves down to what LAPACK leaves to one thread. Raises LinAlgError where a matrix is not
    positive definite to rounding.
    """
    size = a.shape[1]
    if size <= TILE:
        return inverse_triangles(np.linalg.cholesky(a))
    half = size // BASE // 2 * BASE
    result = np.zeros_like(a)
    first = inverse_factor(a[:, :half, :half])
    below = multiply(a[:, half:, :half], first.transpose(0, 2, 1))
    last = inverse_factor(a[:, half:, half:] - square(below))
    result[:, :half, :half], result[:, half:, half:] = first, last
    result[:, half:, :half] = multiply(last, multiply(-below, first))
    return result


def inverse_triangles(lower: NDArray) -> NDArray:
    """Return the inverses of lower triangles: tiles on the diagonal, and from them the rest."""
    n, size, _ = lower.shape
    tiles = _tiles(size, BASE)
    edge = min(size, BASE)
    along = np.zeros((edge, edge, len(tiles), n))
    along[range(edge), range(edge), -1:] = 1.0  # the last tile may be shorter
    for k, i in enumerate(tiles):
        along[: i.stop - i.start, : i.stop - i.start, k] = lower[:, i, i].transpose(1, 2, 0)
    inverses = _inverse_tiles(along.reshape(edge, edge, len(tiles) * n)).reshape(along.shape)
    result = np.zeros_like(lower)
    for k, i in enumerate(tiles):
        here = inverses[: i.stop - i.start, : i.stop - i.start, k]
        result[:, i, i] = here.transpose(2, 0, 1)
    _fill(result, lower)
    return result


def _fill(result: NDArray, lower: NDArray) -> None:
    """Set what is below the diagonal tiles: −C⁻¹BA⁻¹ for a triangle of A above, B, and C."""
    size = result.shape[1]
    if size <= BASE:
        return
    half = -(-size // BASE) // 2 * BASE
    _fill(result[:, :half, :half], lower[:, :half, :half])
    _fill(result[:, half:, half:], lower[:, half:, half:])
    product = lower[:, half:, :half] @ -result[:, :half, :half]
    np.matmul(result[:, half:, half:], product, out=result[:, half:, :half])


def _inverse_tiles(lower: NDArray) -> NDArray:
    """Return the inverses of small triangles (i, i, n), row by row along all of them at once."""
    result = np.zeros_like(lower)
    for k in range(len(lower)):
        result[k, k] = 1.0 / lower[k, k]
        if k:
            sums = np.einsum("jn,jcn->cn", lower[k, :k], result[:k, :k])
            np.multiply(sums, -result[k, k], out=result[k, :k])
    return result
