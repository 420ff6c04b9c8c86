"""Where gradients live: one array, or parts side by side; and which storage takes what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import (
    Array,
    array_namespace,
    is_array_api_obj,
    is_dask_array,
    is_jax_array,
    itemsize,
)
from mfac_core._ops import rows as ops
from mfac_core._progress import track
from mfac_core._rows.base import Columns, Reduce, Rows
from mfac_core._rows.files import opened
from mfac_core._rows.given import GivenRows, is_given
from mfac_core._rows.sliced import PART_BYTES, sliced_rows


class ArrayRows(Rows):
    """The rows of one array, of which only the first ``used`` need be in use."""

    def __init__(
        self,
        array: Array,
        used: int | None = None,
        *,
        reduce: Reduce | None = None,
        progress: bool = False,
    ) -> None:
        m, d = (int(n) for n in array.shape)
        super().__init__(array, (m if used is None else used, d), reduce)
        self.array = array
        self.progress = progress

    def parts(self) -> Iterable[tuple[slice, Array]]:
        """Return the array whole, or in slices that a progress bar can count."""
        # The unused rows come along where leaving them out would be a copy; they are zero.
        whole = self.used == self.array.shape[0] or is_jax_array(self.array)
        array = self.array if whole else self.array[: self.used, :]
        if not self.progress:
            return ((slice(None), array),)
        width = max(PART_BYTES // (itemsize(array.dtype) * max(self.used, 1)), 1)
        cuts = track(list(ops.column_slices(self.shape[1], width)), "gradients")
        return ((columns, array[:, columns]) for columns in cuts)

    def take(self, indices: np.ndarray[Any, Any]) -> Array:
        """See :meth:`Rows.take`."""
        return ops.take(self.array, indices, self.home)[: self.used, :]

    def pair_products(self, columns: np.ndarray[Any, Any], right: Array) -> Array:
        """See :meth:`Rows.pair_products`."""
        return ops.pair_products(self.array, columns, right, self.home)

    def read(self, columns: slice) -> Array:
        """See :meth:`Rows.read`."""
        return self.home.receive(self.array[:, columns])[: self.used, :]

    def stretch(self, start: int, stop: int) -> ArrayRows:
        """See :meth:`Rows.stretch`."""
        return ArrayRows(self.array[:, start:stop], self.used, progress=self.progress)


class SplitRows(Rows):
    """Columns in several arrays of one library, on one device or on several.

    The parts stay where they are; only what is m-sized travels to the home of the first, and the
    pieces of a vector that is given as one array.
    """

    def __init__(
        self, arrays: list[Array], *, reduce: Reduce | None = None, progress: bool = False
    ) -> None:
        self._arrays = arrays
        self._progress = progress
        stops = np.cumsum([int(array.shape[1]) for array in arrays])
        self._slices = [
            slice(int(stop) - int(array.shape[1]), int(stop))
            for array, stop in zip(arrays, stops, strict=True)
        ]
        super().__init__(arrays[0], (int(arrays[0].shape[0]), int(stops[-1])), reduce)

    def parts(self) -> Iterator[tuple[slice, Array]]:
        """Yield the arrays."""
        pairs = list(zip(self._slices, self._arrays, strict=True))
        yield from track(pairs, "gradients") if self._progress else pairs

    def take(self, indices: np.ndarray[Any, Any]) -> Array:
        """See :meth:`Rows.take`."""
        result = self.home.zeros((self.used, len(indices)))
        for columns, array in zip(self._slices, self._arrays, strict=True):
            here = np.flatnonzero((indices >= columns.start) & (indices < columns.stop))
            taken = ops.take(array, indices[here] - columns.start, self.home)
            for position, k in enumerate(here):
                result[:, int(k)] = taken[:, position]
        return result

    def read(self, columns: slice) -> Array:
        """See :meth:`Rows.read`."""
        parts = [self.home.receive(array) for array in self._cut(columns)]
        return self.home.xp.concat(parts, axis=1)

    def stretch(self, start: int, stop: int) -> SplitRows:
        """See :meth:`Rows.stretch`."""
        return SplitRows(self._cut(slice(start, stop)), progress=self._progress)

    def _cut(self, columns: slice) -> list[Array]:
        """Return what of each part lies within ``columns``."""
        cut = []
        for own, array in zip(self._slices, self._arrays, strict=True):
            start, stop = max(own.start, columns.start), min(own.stop, columns.stop)
            if start < stop:
                cut.append(array[:, start - own.start : stop - own.start])
        return cut

    def columns_argument(self, x: Any, name: str, ndim: tuple[int, ...]) -> Columns:
        """Check a vector or matrix, which may be given as one piece beside each part."""
        if not isinstance(x, (list, tuple)):
            return super().columns_argument(x, name, ndim)
        if len(x) != len(self._arrays):
            msg = f"{name} must be one array, or one for each of {len(self._arrays)} parts"
            raise ValueError(msg)
        pieces: list[Array] = []
        for i, (piece, array) in enumerate(zip(x, self._arrays, strict=True)):
            label = f"{name}[{i}]"
            same = (pieces[0].ndim,) if pieces else ndim
            pieces.append(check.vector_argument(piece, label, array.shape[1], ndim=same))
            check.beside(pieces[-1], label, array)
        return pieces


def rows_of(gradients: Any, *, reduce: Reduce | None = None, progress: bool = False) -> Rows:
    """Check gradients, of whatever storage; finiteness is checked where they are first read."""
    if is_given(gradients):
        return GivenRows(gradients, reduce=reduce)
    gradients = opened(gradients, "gradients")
    if isinstance(gradients, (list, tuple)):
        gradients = [opened(g, f"gradients[{i}]") for i, g in enumerate(gradients)]
    if isinstance(gradients, list) and gradients and _are_arrays(gradients):
        return SplitRows(_parts_argument(gradients), reduce=reduce, progress=progress)
    sliceable = all(hasattr(gradients, name) for name in ("shape", "dtype", "__getitem__"))
    if is_dask_array(gradients) or (sliceable and not is_array_api_obj(gradients)):
        check.sliceable_argument(gradients)
        return sliced_rows(gradients, reduce=reduce, progress=progress)
    return ArrayRows(check.gradients_argument(gradients), reduce=reduce, progress=progress)


def _are_arrays(parts: Any) -> bool:
    return all(is_array_api_obj(part) for part in parts)


def _parts_argument(gradients: Any) -> list[Array]:
    parts = [check.gradients_argument(g, f"gradients[{i}]") for i, g in enumerate(gradients)]
    first = parts[0]
    for i, part in enumerate(parts):
        if array_namespace(part) is not array_namespace(first) or part.dtype != first.dtype:
            msg = f"gradients[{i}] must be of the library and dtype of gradients[0]; convert it"
            raise TypeError(msg)
        if part.shape[0] != first.shape[0]:
            msg = (
                f"gradients[{i}] must have as many rows as gradients[0], {first.shape[0]}, "
                f"got {part.shape[0]}"
            )
            raise ValueError(msg)
    return parts
