"""The d-sized half: the gradients, and what is ever asked of them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import array_api_extra as xpx
import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import (
    Array,
    Home,
    array_namespace,
    device,
    home_of,
    is_jax_array,
    itemsize,
    send,
    to_device,
    to_numpy,
    widen,
)
from mfac_core._ops import rows as ops
from mfac_core._typing import Reduce as Reduce

FLOAT32_RANGE = 2.0**60
"""Size of m-sized numbers, and its inverse, outside of which their products may leave float32."""

TAKE_BYTES = 1 << 25
"""Size of the float64 columns that are gathered at a time."""

Columns: TypeAlias = Array | list[Array]
"""What has d rows: one array, or the list of its parts beside the parts of the gradients."""


class Rows(ABC):
    """Gradients as the rows of G, shape (m, d), held in one part or several, side by side.

    Three acts suffice to read them: ``gram`` GGᵀ, ``project`` GX and ``combine`` GᵀC; plus
    columns, block by block or by index. What is m-sized comes and goes as float64 in the
    ``home``; over ranks that hold different columns it is summed by ``reduce``. With ``float64``
    set, products of narrower dtypes run in float64.

    Parameters
    ----------
    like : array
        Any array of the gradients' library, dtype and (first) device.
    shape : tuple of int
        (m, d), of this rank's columns.
    reduce : callable, optional
        Sum over ranks.
    """

    def __init__(self, like: Array, shape: tuple[int, int], reduce: Reduce | None = None) -> None:
        self.like = like
        self.used, self._d = shape
        self.home: Home = home_of(like)
        self.float64 = False
        check.reduce_argument(reduce)
        self.reduce = reduce
        self.total_columns = self._d
        if reduce is not None:
            ranks, rows, squares, columns = self.summed_numbers(1, self.used, self.used**2, self._d)
            if ranks * squares != rows**2:
                msg = (
                    "gradients must have the same number of rows on every rank, "
                    f"got {self.used} on this one and {rows / ranks:g} on average"
                )
                raise ValueError(msg)
            self.total_columns = int(columns)

    always_float64 = False
    """Whether products run in float64 whatever is asked."""

    widens = True
    """Whether products can run in float64."""

    reads_columns = True
    """Whether there are columns to read, or products alone."""

    @abstractmethod
    def parts(self) -> Iterable[tuple[slice, Array]]:
        """Return the parts of G with the columns they cover: arrays of at least ``used`` rows."""

    @abstractmethod
    def take(self, indices: np.ndarray[Any, Any]) -> Array:
        """Return columns of G by index as float64 in the home, shape (m, len(indices))."""

    @abstractmethod
    def read(self, columns: slice) -> Array:
        """Return consecutive columns of G as float64 in the home."""

    @abstractmethod
    def stretch(self, start: int, stop: int) -> Rows:
        """Return rows like these of consecutive columns, without ranks."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d) of the rows in use."""
        return self.used, self._d

    @property
    def xp(self) -> Any:
        """The array namespace of the gradients."""
        return array_namespace(self.like)

    @property
    def dtype(self) -> Any:
        """The dtype of the gradients."""
        return self.like.dtype

    @property
    def device(self) -> Any:
        """The device of the gradients, of their first part where they are on several."""
        return device(self.like)

    @property
    def rounds(self) -> bool:
        """Whether products run in float32."""
        return not self.float64 and itemsize(self.like.dtype) != 8

    def in_float64(self) -> Rows:
        """Return the same rows with products in float64."""
        rows = copy.copy(self)
        rows.float64 = True
        return rows

    def columns_argument(self, x: Any, name: str, ndim: tuple[int, ...]) -> Columns:
        """Check a vector (d,) or a matrix (d, k)."""
        x = check.vector_argument(x, name, self._d, ndim=ndim)
        check.beside(x, name, self.like)
        return x

    # -- passes ----------------------------------------------------------------------------

    def gram(self, *, float64: bool = False) -> Array:
        """G Gᵀ, float64 (m, m)."""
        float64 = float64 or self.float64
        total = self.home.zeros((self.used, self.used))
        for _, part in self.parts():
            gram = ops.gram(part, float64=float64, home=self.home)
            total += gram[: self.used, : self.used]
        return self.summed(total)

    def project(self, x: Columns) -> Array:
        """G x, float64 (m,) or (m, k); in float64 products when x is float64."""
        float64 = self.float64 or itemsize(first_of(x).dtype) == 8
        with np.errstate(over="ignore", invalid="ignore"):
            total = self._project(x, float64)
        if self.home.is_host and not float64 and _left_float32(total) and self._is_nonzero(x):
            total = self._project(x, True)
        return total

    def _project(self, x: Columns, float64: bool) -> Array:
        products = [
            ops.project(part, _piece(x, i, columns, part), float64=float64, home=self.home)
            for i, (columns, part) in enumerate(self.parts())
        ] or [self.home.zeros((self.used, *first_of(x).shape[1:]))]
        total = sum(products[1:], start=products[0])[: self.used, ...]
        return total if self.reduce is None else self.summed(total)

    def _is_nonzero(self, x: Columns) -> bool:
        return bool(np.any(self.square_norms(x) != 0.0))

    def combine(
        self,
        c: Array,
        base: Columns | None,
        alpha: float,
        *,
        dtype: Any,
        float64: bool | None = None,
    ) -> Columns:
        """alpha·base + Gᵀc in the gradients' library as ``dtype``, (d,) or (d, k)."""
        float64 = (self.float64 if float64 is None else float64) or itemsize(dtype) == 8
        return self._combine(c, base, alpha, dtype, float64)

    def combine_wide(self, c: Array, base: Columns | None, alpha: float) -> Columns:
        """alpha·base + Gᵀc as float64, in NumPy where the gradients' library lacks it."""
        return self._combine(c, base, alpha, None, True)

    def _combine(
        self, c: Array, base: Columns | None, alpha: float, dtype: Any, float64: bool
    ) -> Columns:
        if not float64 and self.home.is_host:
            float64 = _left_float32(c) or (base is not None and _left_float32(np.asarray(alpha)))
        pieces = []
        for i, (columns, part) in enumerate(self.parts()):
            if unused := part.shape[0] - c.shape[0]:
                c = xpx.pad(c, [(0, unused), *[(0, 0)] * (c.ndim - 1)], xp=self.home.xp)
            piece = None if base is None else _piece(base, i, columns, part)
            pieces.append(ops.combine(part, c, piece, alpha, dtype=dtype, float64=float64))
        if isinstance(base, list):
            return pieces
        if not pieces:  # no columns, as on a rank whose weights have all gone
            none = self.home.zeros((0, *c.shape[1:]))
            return none if dtype is None else send(none, self.like, dtype)
        return pieces[0] if len(pieces) == 1 else joined(pieces)

    def pair_products(self, columns: np.ndarray[Any, Any], right: Array) -> Array:
        """Σᵣ G[r, columns[p]] right[r, p] for ``right`` (m, len(columns)), float64 in the home."""
        return self.home.xp.sum(self.take(columns) * right, axis=0)

    def bilinear(
        self,
        rows: np.ndarray[Any, Any],
        cols: np.ndarray[Any, Any],
        middle: Callable[[Array], Array],
    ) -> np.ndarray[Any, Any]:
        """G_:iᵀ M G_:j for each pair of columns i, j; ``middle`` multiplies (m, k) by M."""
        values = [np.zeros(0)]
        width = max(TAKE_BYTES // (8 * max(self.used, 1)), 1)
        for some in ops.column_slices(len(rows), width):
            products = self.pair_products(rows[some], middle(self.take(cols[some])))
            values.append(to_numpy(products))
        return np.concatenate(values)

    def square_norms(self, x: Columns) -> np.ndarray[Any, Any]:
        """‖x‖² of a vector or of each column, summed in float64 over parts and ranks."""
        pieces = x if isinstance(x, list) else [x]
        total = np.asarray(sum(ops.square_norms(piece) for piece in pieces))
        return total if self.reduce is None else np.asarray(self.reduce(total.copy()))

    def shared_normal(self, z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Make one standard normal array that is the same on all ranks of one from each."""
        if self.reduce is None:
            return z
        ranks = self.summed_numbers(1.0)[0]
        total = np.asarray(self.reduce(z.copy()))
        if self.anywhere(ranks > 1 and np.allclose(total, ranks * z, rtol=1e-9)):
            msg = "rng must differ from rank to rank; seed it with the rank's number as well"
            raise ValueError(msg)
        shared: np.ndarray[Any, Any] = total / np.sqrt(ranks)
        return shared

    def wide_blocks(self) -> Iterator[tuple[Home, Array]]:
        """Yield the columns of G block by block as float64, in the home of their part."""
        for _, part in self.parts():
            home = home_of(part)
            for _, block in ops.wide_blocks(part, home):
                yield home, block[: self.used, :]

    def nonfinite(self) -> list[int]:
        """Return the indices of rows that hold a NaN or an infinity, on any rank."""
        found = np.zeros(self.used)
        for _, part in self.parts():
            xp = array_namespace(part)
            for columns in ops.column_slices(part.shape[1], ops.wide_columns(part.shape[0])):
                finite = xp.all(xp.isfinite(part[:, columns]), axis=1)
                found += ~to_numpy(finite)[: self.used]
        return self._found(found)

    def _found(self, found: np.ndarray[Any, Any]) -> list[int]:
        """Return the indices of what was found, on any rank."""
        if self.reduce is not None:
            found = self.reduce(found)
        return [int(i) for i in np.flatnonzero(found)]

    # -- ranks -----------------------------------------------------------------------------

    def summed(self, x: Array) -> Array:
        """Sum an m-sized float64 array over ranks."""
        if self.reduce is None:
            return x
        total = np.asarray(self.reduce(np.array(to_numpy(x), dtype=np.float64)))
        if total.shape != tuple(x.shape):
            msg = (
                f"reduce must return the sum over ranks, of shape {tuple(x.shape)}, "
                f"got {type(total).__name__} of shape {total.shape}"
            )
            raise ValueError(msg)
        return self.home.receive(total)

    def summed_numbers(self, *numbers: float) -> list[float]:
        """Sum numbers over ranks."""
        if self.reduce is None:
            return list(numbers)
        return [float(x) for x in self.reduce(np.array(numbers, dtype=np.float64))]

    def anywhere(self, condition: bool) -> bool:
        """Whether a condition holds on any rank: all of them then act on it."""
        return self.summed_numbers(float(condition))[0] > 0.0


def first_of(x: Columns) -> Array:
    """Return x, or the first of its pieces."""
    return x[0] if isinstance(x, list) else x


def widened(x: Columns) -> Columns:
    """Return x, or all of its pieces, as float64."""
    return [widen(piece) for piece in x] if isinstance(x, list) else widen(x)


def _piece(x: Columns, i: int, columns: slice, part: Array) -> Array:
    """Return what of x belongs to the columns of part i, beside it."""
    if isinstance(x, list):
        return x[i]
    if columns == slice(None):
        return x
    piece = x[columns, ...]
    return piece if is_jax_array(piece) else to_device(piece, device(part))


def joined(pieces: list[Array]) -> Array:
    """Return pieces of a d-sized array as one, on the device of the first."""
    if not is_jax_array(pieces[0]):
        pieces = [to_device(piece, device(pieces[0])) for piece in pieces]
    return array_namespace(pieces[0]).concat(pieces, axis=0)


def _left_float32(x: Array) -> bool:
    """Whether float32 products with these numbers, or that gave them, may have left its range."""
    largest = float(np.max(np.abs(to_numpy(x)), initial=0.0))
    return not 1.0 / FLOAT32_RANGE < largest < FLOAT32_RANGE
