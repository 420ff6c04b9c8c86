"""Many short diagonal blocks of F inverted at once, each as the B × B matrix that it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array, home_of, promote, send, to_numpy
from mfac_core._operators.base import Indices, SymmetricOperator
from mfac_core._ops.cuda import blocks as cuda_blocks
from mfac_core._rows.base import Rows

BATCH_BYTES = 1 << 24
"""Size of the float64 gradients, and of the matrices, that are worked on at a time."""


class PrimalBlocks(SymmetricOperator):
    """op = diag(M₁, M₂, …) with symmetric positive definite Mₖ of one size B, in float64.

    Parameters
    ----------
    matrices : array, shape (blocks, B, B)
        The blocks, in the home of ``like``.
    like : array
        Any array of the gradients' library, dtype and device.
    """

    def __init__(self, matrices: Array, like: Array) -> None:
        self._matrices = matrices
        self._array = like
        self._home = home_of(like)

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        blocks, size, _ = self._matrices.shape
        return (int(blocks * size),) * 2

    @property
    def dtype(self) -> Any:
        """The dtype of the gradients."""
        return self._array.dtype

    @property
    def device(self) -> Any:
        """The device of the gradients."""
        return self._array.device

    def logdet(self) -> float:
        """Return the sum of the blocks' log-determinants.

        Returns
        -------
        float
            The logarithm of the determinant.
        """
        return super().logdet()

    def _logdet(self) -> float:
        xp = self._home.xp
        return sum(float(xp.sum(xp.linalg.slogdet(b)[1])) for b in _batches(self._matrices))

    def power(self, p: float) -> PrimalBlocks:
        """Return the blocks' powers, by their eigenvalues.

        Parameters
        ----------
        p : float
            Any real number.

        Returns
        -------
        PrimalBlocks
            The power.
        """
        return super().power(p)  # type: ignore[return-value]

    def _power(self, p: float) -> PrimalBlocks:
        parts = []
        for batch in _batches(self._matrices):
            values, vectors = self._home.xp.linalg.eigh(batch)
            parts.append((vectors * (values**p)[:, None, :]) @ _transposed(vectors))
        return PrimalBlocks(self._home.xp.concat(parts), self._array)

    def _like(self) -> Array:
        return self._array

    def _multiply(self, x: Array) -> Array:
        """Return the product with an array of the home."""
        blocks, size, _ = self._matrices.shape
        columns = self._home.xp.reshape(x, (blocks, size, -1))
        return self._home.xp.reshape(self._matrices @ columns, tuple(x.shape))

    def _apply(self, x: Any) -> Array:
        dtype = promote(x, self.dtype)
        blocks, size, _ = self._matrices.shape
        if x.ndim == 1 and cuda_blocks.serves_product(self._matrices, x):
            return cuda_blocks.product(self._matrices, np.full(blocks, size), x, dtype=dtype)
        return send(self._multiply(self._home.receive(x)), x, dtype)

    def _diagonal(self) -> Array:
        xp = self._home.xp
        return xp.reshape(xp.linalg.diagonal(self._matrices), (-1,))

    def _entries(self, rows: Indices, cols: Indices) -> Array:
        size = int(self._matrices.shape[1])
        same = rows // size == cols // size
        matrices = to_numpy(self._matrices)
        return np.where(same, matrices[rows // size, rows % size, cols % size], 0.0)

    def _submatrix(self, indices: Indices) -> Array:
        rows, cols = np.broadcast_arrays(indices[:, None], indices)
        return self._entries(rows, cols)

    def _quadratic(self, x: Any) -> Array:
        wide = self._home.receive(x)
        return to_numpy(self._home.xp.sum(wide * self._multiply(wide), axis=0))

    def _sample(self, n: int, rng: np.random.Generator) -> Array:
        return self._power(0.5)._apply(self._normal(n, rng))


def fisher_blocks(
    rows: Rows, start: int, size: int, blocks: int, damping: float
) -> Iterator[tuple[slice, Array]]:
    """Yield λI + G_bᵀG_b/m, float64 (batch, B, B), for consecutive blocks of ``size`` columns.

    Batches of blocks at a time; d·B·m multiplications in all.
    """
    home, m = rows.home, rows.shape[0]
    batch = max(BATCH_BYTES // (8 * size * max(m, size)), 1)
    for first in range(0, blocks, batch):
        last = min(first + batch, blocks)
        gradients = rows.read(slice(start + first * size, start + last * size))
        split = home.xp.permute_dims(home.xp.reshape(gradients, (m, -1, size)), (1, 2, 0))
        with np.errstate(over="ignore", invalid="ignore"):
            fisher = split @ _transposed(split)
        fisher /= m
        fisher += damping * home.eye(size)
        if not bool(home.xp.all(home.xp.isfinite(home.xp.linalg.diagonal(fisher)))):
            raise ValueError(check.nonfinite_message(rows.nonfinite(), m))
        yield slice(first, last), fisher


def invert_blocks(rows: Rows, start: int, size: int, blocks: int, damping: float) -> PrimalBlocks:
    """Return the inverses of consecutive blocks of F, in O(d·B·(m + B))."""
    fused = _on_device(rows, size, blocks, damping)
    if fused is not None:
        return PrimalBlocks(fused, rows.like)
    xp, where = rows.home.xp, rows.home.device
    inverses = xp.empty((blocks, size, size), dtype=xp.float64, device=where)
    for batch, fisher in fisher_blocks(rows, start, size, blocks, damping):
        inverse = xp.linalg.inv(fisher)
        inverses[batch, ...] = inverse
        inverses[batch, ...] += _transposed(inverse)
        inverses[batch, ...] /= 2
    return PrimalBlocks(inverses, rows.like)


def _on_device(rows: Rows, size: int, blocks: int, damping: float) -> Array | None:
    """Return the inverses by a kernel, where it takes all of G, and finds nothing wrong."""
    array = getattr(rows, "array", None)
    covers = array is not None and int(array.shape[1]) == size * blocks
    if not covers or not cuda_blocks.serves_blocks(array, size):
        return None
    xp, lengths = rows.home.xp, np.full(blocks, size)
    inverses, failed = cuda_blocks.inverses(array, lengths, damping, rows.shape[0])
    sound = bool(xp.all(xp.isfinite(inverses))) and not bool(xp.any(failed != 0))
    return inverses if sound else None


def _batches(matrices: Array) -> Iterator[Array]:
    blocks, size, _ = matrices.shape
    width = max(BATCH_BYTES // (8 * size * size), 1)
    for start in range(0, blocks, width):
        yield matrices[start : min(start + width, blocks), ...]


def _transposed(a: Array) -> Array:
    return a.mT if hasattr(a, "mT") else a.swapaxes(-1, -2)
