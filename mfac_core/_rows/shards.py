"""Row shards: gradients that lie in several arrays or files, one below the other."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import is_array_api_obj, is_numpy_array
from mfac_core._rows.files import opened


class RowShards:
    """Arrays or files with some of the rows each, as one source of gradients.

    A list of arrays stands for columns side by side; this says that they lie one below the other.
    It can be sliced, holds no numbers itself, and goes wherever gradients that are read by slices
    do; vectors beside it and results are NumPy arrays.

    Parameters
    ----------
    shards : sequence
        Of shape (mₖ, d) and one dtype each: NumPy arrays and memory maps; anything with ``shape``,
        ``dtype`` and ``[a:b, c:d]``, such as h5py datasets and zarr arrays; slices of safetensors
        files; or paths of .npy files, which are mapped into memory.

    Attributes
    ----------
    shape : tuple of int
        (m, d), m the sum of the mₖ.
    dtype : numpy.dtype
        That of the shards.
    chunks : tuple of int or None
        The largest of the shards' chunks, where they have any.

    Raises
    ------
    TypeError
        If a shard cannot be sliced, is an array of another library than NumPy, or has another
        dtype than the first.
    ValueError
        If there is no shard, or one has another number of columns than the first.

    See Also
    --------
    InverseFisher : Takes it as its gradients.

    Notes
    -----
    A slice copies what it covers, from every shard it touches.

    Examples
    --------
    >>> import numpy as np
    >>> import mfac_core as mfac
    >>> G = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    >>> shards = mfac.RowShards([G[:1], G[1:]])
    >>> shards.shape
    (2, 3)
    >>> mfac.InverseFisher(shards, damping=0.5) @ np.array([3.0, 1.0, 0.0])
    array([ 5.,  1., -2.])
    """

    def __init__(self, shards: Sequence[Any]) -> None:
        check.iterable_argument(shards, "shards", "arrays or files")
        self._shards = [_opened(shard, f"shards[{i}]") for i, shard in enumerate(shards)]
        if not self._shards:
            msg = "shards must hold at least one array or file, got none"
            raise ValueError(msg)
        first = self._shards[0]
        for i, shard in enumerate(self._shards):
            if len(shard.shape) != 2 or shard.shape[1] != first.shape[1]:
                columns = first.shape[1] if len(first.shape) == 2 else "columns"
                msg = (
                    f"shards[{i}] must have shape (rows, {columns}), as many columns as "
                    f"shards[0], got {tuple(shard.shape)}"
                )
                raise ValueError(msg)
            if np.dtype(shard.dtype) != np.dtype(first.dtype):
                msg = f"shards[{i}] must be of dtype {first.dtype} as shards[0], got {shard.dtype}"
                raise TypeError(msg)
        self._starts = [0, *itertools.accumulate(int(shard.shape[0]) for shard in self._shards)]
        self.shape = (self._starts[-1], int(first.shape[1]))
        self.dtype = np.dtype(first.dtype)
        chunks = [getattr(shard, "chunks", None) for shard in self._shards]
        known = [c for c in chunks if c is not None]
        self.chunks = tuple(max(sizes) for sizes in zip(*known, strict=True)) if known else None

    def __repr__(self) -> str:
        (m, d), n = self.shape, len(self._shards)
        return f"<RowShards of {n} shards, {m} rows of {d} parameters with dtype {self.dtype}>"

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray[Any, Any]:
        rows, columns = key
        start, stop, _ = rows.indices(self.shape[0])
        parts = [np.empty((0, len(range(*columns.indices(self.shape[1])))), self.dtype)]
        for shard, first, last in zip(self._shards, self._starts, self._starts[1:], strict=False):
            here = slice(max(start, first) - first, min(stop, last) - first)
            if here.start < here.stop:
                parts.append(np.asarray(shard[here, columns]))
        return parts[1] if len(parts) == 2 else np.concatenate(parts)


def _opened(shard: Any, name: str) -> Any:
    shard = opened(shard, name)
    if is_array_api_obj(shard) and not is_numpy_array(shard):
        msg = (
            f"{name} must be a NumPy array, or read by slices from a file, got "
            f"{type(shard).__module__}.{type(shard).__name__}; concatenate such arrays along axis 0"
        )
        raise TypeError(msg)
    if not all(hasattr(shard, attribute) for attribute in ("shape", "dtype", "__getitem__")):
        msg = (
            f"{name} must have shape, dtype and slicing, or be the path of a .npy file, got "
            f"{type(shard).__name__}"
        )
        raise TypeError(msg)
    return shard
