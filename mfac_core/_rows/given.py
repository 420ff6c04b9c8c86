"""Rows that somebody else multiplies: objects of the public protocol."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from typing import Any

import array_api_compat
import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import (
    Array,
    array_namespace,
    is_floating,
    is_numpy_array,
    is_traced,
    itemsize,
    send,
    to_numpy,
    widen,
)
from mfac_core._ops import rows as ops
from mfac_core._rows.base import Columns, Reduce, Rows
from mfac_core._rows.protocol import GradientRows


class ColumnsUnknownError(TypeError):
    """Something asks for columns of rows that are known by their products alone."""

    def __init__(self, kind: str, what: str = "this") -> None:
        super().__init__(
            f"{what} needs columns of the gradients, and gradients of type {kind} give none; "
            "define columns(indices) or blocks(), or store the gradients as an array. Products, "
            "quadratic, logdet, power and sample do without"
        )
        self.kind = kind


class GivenRows(Rows):
    """Rows by their own Gram and products; columns of them where they can be had."""

    def __init__(self, given: GradientRows, *, reduce: Reduce | None = None) -> None:
        shape = tuple(given.shape)
        check.gradients_shape(shape, "gradients")
        like = _array_like(given)
        self._given, self._given_like = given, like
        self._wide: tuple[GradientRows, Array] | None = None
        self._nonfinite: list[int] = []
        self.widens = itemsize(like.dtype) == 8 or hasattr(given, "in_float64")
        self.reads_columns = hasattr(given, "columns") or hasattr(given, "blocks")
        super().__init__(like, (int(shape[0]), int(shape[1])), reduce)

    def columns_argument(self, x: Any, name: str, ndim: tuple[int, ...]) -> Columns:
        """Check a vector or matrix, which must have values."""
        if is_traced(x):
            msg = (
                f"{name} must have values beside gradients of type {type(self._given).__name__}: "
                "their products run outside of jax.jit, jax.vmap and jax.grad"
            )
            raise TypeError(msg)
        return super().columns_argument(x, name, ndim)

    # -- passes ----------------------------------------------------------------------------

    def gram(self, *, float64: bool = False) -> Array:
        """See :meth:`Rows.gram`."""
        m = self.used
        served, like = self._served(float64 or self.float64)
        gram = self._returned(served.gram(), "gram()", (m, m), like)
        values = to_numpy(gram)
        self._nonfinite = np.flatnonzero(~np.isfinite(np.diagonal(values))).tolist()
        if np.all(np.isfinite(values)):
            check.gram_argument(gram, m, "gradients.gram()")
        return self.summed(self.home.xp.asarray(self.home.receive(gram), copy=True))

    def _project(self, x: Any, float64: bool) -> Array:
        served, like = self._served(float64)
        product = served.project(_sent(x, like))
        shape = (self.used, *x.shape[1:])
        return self.summed(self.home.receive(self._returned(product, "project(x)", shape, like)))

    def _combine(
        self, c: Array, base: Columns | None, alpha: float, dtype: Any, float64: bool
    ) -> Columns:
        served, like = self._served(float64)
        # By a power of two, so that c does not leave the range of narrower dtypes.
        largest = float(np.max(np.abs(to_numpy(c)), initial=0.0)) if self.home.is_host else 0.0
        scale = float(2.0 ** np.frexp(largest)[1]) if 0.0 < largest < np.inf else 1.0
        product = served.combine(_sent(c / scale, like))
        y = self._returned(product, "combine(c)", (self.shape[1], *c.shape[1:]), like)
        y = scale * (widen(y) if float64 else _at_least_float32(y))
        if base is not None:
            y = y + alpha * (widen(base) if float64 else _at_least_float32(base))
        return y if dtype is None else send(y, self.like, dtype)

    def cross(self, other: GivenRows) -> Array | None:
        """Return G Hᵀ for other rows H, float64 (m, q), or None where the objects do not know."""
        (mine, like), (others, _) = (rows._served(self.float64) for rows in (self, other))
        if type(mine) is not type(others) or not hasattr(mine, "cross"):
            return None
        shape = self.used, other.used
        products = self._returned(mine.cross(others), "cross(other)", shape, like)
        return self.summed(self.home.receive(products))

    def nonfinite(self) -> list[int]:
        """Return the rows whose squared norm was not finite in the last Gram."""
        found = np.zeros(self.used)
        found[self._nonfinite] = 1.0
        return self._found(found)

    def _served(self, float64: bool) -> tuple[GradientRows, Array]:
        """Return the rows to ask, those in float64 where that is wanted, and an array like theirs.

        Those in float64 are NumPy's where the library has no float64.
        """
        if not float64 or not self.widens or itemsize(self.dtype) == 8:
            return self._given, self._given_like
        if self._wide is None:
            wide = self._given.in_float64()  # type: ignore[attr-defined]
            if tuple(wide.shape) != self.shape or itemsize(wide.dtype) != 8:
                msg = (
                    f"gradients.in_float64() must return rows of shape {self.shape} in float64, "
                    f"got shape {tuple(wide.shape)}, dtype {wide.dtype}"
                )
                raise ValueError(msg)
            self._wide = wide, _array_like(wide)
        return self._wide

    def _returned(self, x: Any, what: str, shape: tuple[int, ...], like: Array) -> Array:
        x = check.array_argument(x, f"gradients.{what}")
        if tuple(x.shape) != shape:
            msg = f"gradients.{what} must return shape {shape}, got {tuple(x.shape)}"
            raise ValueError(msg)
        is_of_home = is_numpy_array(x) and self.home.is_numpy and shape[0] == self.used
        if not is_of_home:  # as what is m-sized may be, where the library has no float64
            check.beside(x, f"gradients.{what}", like)
        return x

    # -- columns ---------------------------------------------------------------------------

    def parts(self) -> Iterable[tuple[slice, Array]]:
        """Yield the blocks that there are, or columns in blocks of a bounded size."""
        if not self.reads_columns:
            raise self._refusal()
        return self._blocks()

    def _blocks(self) -> Iterator[tuple[slice, Array]]:
        d = self.shape[1]
        if not hasattr(self._given, "blocks"):
            for columns in ops.column_slices(d, ops.wide_columns(self.used)):
                yield columns, self._columns(np.arange(columns.start, columns.stop))
            return
        start = 0
        for block in self._given.blocks():
            width = int(block.shape[-1])
            yield (
                slice(start, start + width),
                self._returned(block, "blocks()", (self.used, width), self.like),
            )
            start += width
        if start != d:
            msg = f"gradients.blocks() must return {d} columns in all, got {start}"
            raise ValueError(msg)

    def take(self, indices: np.ndarray[Any, Any]) -> Array:
        """See :meth:`Rows.take`."""
        if not self.reads_columns:
            raise self._refusal()
        if hasattr(self._given, "columns"):
            return self.home.receive(self._columns(indices))
        order = np.argsort(indices, kind="stable")
        ordered, taken = indices[order], [np.zeros((self.used, 0))]
        for columns, block in self._blocks():
            here = slice(*np.searchsorted(ordered, (columns.start, columns.stop)))
            if here.start < here.stop:
                found = ops.gathered(block, ordered[here] - columns.start)
                taken.append(np.asarray(to_numpy(found), np.float64))
        back = np.argsort(order, kind="stable")
        return self.home.receive(np.concatenate(taken, axis=1)[:, back])

    def _columns(self, indices: np.ndarray[Any, Any]) -> Array:
        columns = self._given.columns(indices)  # type: ignore[attr-defined]
        shape = (self.used, len(indices))
        return self._returned(columns, "columns(indices)", shape, self.like)

    def read(self, columns: slice) -> Array:
        """See :meth:`Rows.read`."""
        return self.take(np.arange(columns.start, columns.stop))

    def stretch(self, start: int, stop: int) -> Rows:
        """See :meth:`Rows.stretch`."""
        if not self.reads_columns:
            raise self._refusal()
        return Stretch(self, start, stop)

    def _refusal(self) -> ColumnsUnknownError:
        return ColumnsUnknownError(type(self._given).__name__)


class Stretch(Rows):
    """Consecutive columns of such rows, which their own products do not know."""

    def __init__(self, rows: GivenRows, start: int, stop: int) -> None:
        super().__init__(rows.like, (rows.used, stop - start))
        self._rows, self._start = rows, start

    def parts(self) -> Iterator[tuple[slice, Array]]:
        """Yield what of the blocks of all columns lies within these."""
        stop = self._start + self.shape[1]
        for columns, block in self._rows.parts():
            first, last = max(columns.start, self._start), min(columns.stop, stop)
            if first < last:
                here = slice(first - columns.start, last - columns.start)
                yield slice(first - self._start, last - self._start), block[:, here]

    def take(self, indices: np.ndarray[Any, Any]) -> Array:
        """See :meth:`Rows.take`."""
        return self._rows.take(indices + self._start)

    def read(self, columns: slice) -> Array:
        """See :meth:`Rows.read`."""
        return self._rows.read(slice(columns.start + self._start, columns.stop + self._start))

    def stretch(self, start: int, stop: int) -> Rows:
        """See :meth:`Rows.stretch`."""
        return Stretch(self._rows, self._start + start, self._start + stop)


def is_given(gradients: Any) -> bool:
    """Whether an object offers the protocol's products."""
    return all(callable(getattr(gradients, n, None)) for n in ("gram", "project", "combine"))


def _array_like(given: GradientRows) -> Array:
    """Return an empty array of the rows' library, dtype and device."""
    for name in ("shape", "dtype"):
        if not hasattr(given, name):
            msg = (
                f"gradients must have shape and dtype beside gram, project and combine, got "
                f"{type(given).__name__} without {name}"
            )
            raise TypeError(msg)
    if type(given.dtype).__module__ == "torch":
        xp = importlib.import_module("torch")
    elif hasattr(given, "__array_namespace__"):
        xp = given.__array_namespace__()
    else:
        xp = np
    place = {} if getattr(given, "device", None) is None else {"device": given.device}  # type: ignore[attr-defined]
    like = xp.empty((0, 0), dtype=given.dtype, **place)
    if not array_api_compat.is_array_api_obj(like) or not is_floating(like):
        msg = f"gradients must be of a real floating dtype, got {given.dtype}"
        raise TypeError(msg)
    return like


def _sent(x: Array, like: Array) -> Array:
    """Return an array of the gradients' library or home as one of the rows that are asked."""
    if is_numpy_array(like):
        x = to_numpy(x)
    return send(x, like, like.dtype)


def _at_least_float32(x: Array) -> Array:
    xp = array_namespace(x)
    return xp.astype(x, xp.float32) if itemsize(x.dtype) < 4 else x
