"""Where rows are written to: a tensor, anything that takes ``out[i] = row``, or a file."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mfac_core import _validate as check
from mfac_core.torch._sharding import local


class Store(Protocol):
    """Takes rows in their order."""

    start: int
    """How many rows are there already."""

    def write(self, i: int, rows: Tensor) -> None:
        """Write rows (k, d) from row i on."""

    def finish(self) -> Any:
        """Return what holds all rows."""


class TensorStore:
    """One tensor, made in advance or given."""

    def __init__(self, out: Tensor) -> None:
        self.start, self._out = 0, out

    def write(self, i: int, rows: Tensor) -> None:
        """See :class:`Store`."""
        self._out[i : i + len(rows)].copy_(rows)

    def finish(self) -> Tensor:
        """See :class:`Store`."""
        return self._out


class ListStore:
    """Rows of which nobody knows how many will come."""

    def __init__(self, dtype: Any) -> None:
        self.start, self._dtype, self._rows = 0, dtype, list[Any]()

    def write(self, i: int, rows: Tensor) -> None:
        """See :class:`Store`."""
        self._rows.append(rows.to(self._dtype))

    def finish(self) -> Tensor:
        """See :class:`Store`."""
        return torch.cat(self._rows)


class ArrayStore:
    """A NumPy array or memmap, a dataset of h5py or zarr."""

    def __init__(self, out: Any) -> None:
        self.start, self._out = 0, out

    def write(self, i: int, rows: Tensor) -> None:
        """See :class:`Store`."""
        self._out[i : i + len(rows)] = numpy_of(rows)

    def finish(self) -> Any:
        """See :class:`Store`."""
        return self._out


class FileStore:
    """A .npy file, and beside it how far it is until it is complete.

    Written by plain calls: a page of a memory map that no longer fits the disk would end the
    process, where these raise.
    """

    def __init__(self, path: Path, shape: tuple[int, int], dtype: Any, source: str) -> None:
        self._path, self._shape, self._dtype = path, shape, np.dtype(dtype)
        self._progress = path.with_name(path.name + ".progress")
        self._about = {"shape": list(shape), "dtype": self._dtype.str, "source": source}
        self.start = self._rows_there()
        if not self.start:
            with path.open("wb") as file:
                header = np.lib.format.header_data_from_array_1_0(np.empty(0, self._dtype))
                np.lib.format.write_array_header_1_0(file, header | {"shape": shape})
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            self._offset = file.tell()

    def write(self, i: int, rows: Tensor) -> None:
        """See :class:`Store`."""
        with self._path.open("r+b") as file:
            file.seek(self._offset + i * self._shape[1] * self._dtype.itemsize)
            file.write(numpy_of(rows).astype(self._dtype, copy=False).tobytes())
        self._progress.write_text(json.dumps(self._about | {"rows": i + len(rows)}))

    def finish(self) -> Any:
        """See :class:`Store`."""
        self._progress.unlink(missing_ok=True)
        return np.load(self._path, mmap_mode="r")

    def _rows_there(self) -> int:
        """Return how many rows an earlier run of the same has left."""
        try:
            about = json.loads(self._progress.read_text())
            rows = int(about.pop("rows"))
        except (OSError, ValueError, KeyError):
            return 0
        return rows if about == self._about and self._path.exists() else 0


def numpy_of(rows: Tensor) -> np.ndarray[Any, Any]:
    """Return rows as a NumPy array; bfloat16, which NumPy has not, in float32."""
    rows = rows.detach().cpu()
    return np.asarray((rows.float() if rows.dtype is torch.bfloat16 else rows).numpy())


def width(parameters: Mapping[str, Tensor]) -> int:
    """Return d, the number of all weights that are here."""
    return sum(local(p).numel() for p in parameters.values())


def fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """Return a text that tells weights apart, by which an unfinished file is known again."""
    value = 0
    for name, p in parameters.items():
        value = zlib.crc32(name.encode(), value)
        flat = local(p).detach().cpu().contiguous().view(-1).view(torch.uint8)
        value = zlib.crc32(flat.numpy().data, value)
    return f"{value:08x}"


def store_for(
    out: Any, rows: int | None, d: int, parameters: Mapping[str, Tensor], dtype: Any
) -> tuple[Store, int | None, Any]:
    """Return the store for ``out`` of d columns, the number of rows, and their dtype."""
    if out is None:
        if rows is None:
            return ListStore(dtype), None, dtype
        device = next(iter(parameters.values())).device
        return TensorStore(torch.empty((rows, d), dtype=dtype, device=device)), rows, dtype
    if isinstance(out, (str, os.PathLike)):
        path = Path(out)
        if path.suffix != ".npy":
            msg = f"out must be a path that ends in .npy, or an array, got {str(path)!r}"
            raise ValueError(msg)
        if rows is None:
            msg = "rows must be given with a file in out, where batches have no length"
            raise ValueError(msg)
        kind = _numpy_dtype(dtype)
        return FileStore(path, (rows, d), kind, fingerprint(parameters)), rows, dtype
    shape = tuple(getattr(out, "shape", ()))
    if len(shape) != 2 or shape[1] != d or (rows is not None and rows != shape[0]):
        msg = f"out must have shape ({'rows' if rows is None else rows}, {d}), got {shape}"
        raise ValueError(msg)
    if isinstance(out, torch.Tensor):
        if not out.is_floating_point() or out.requires_grad:
            msg = f"out must be a real floating tensor without a gradient, got {out.dtype}"
            raise TypeError(msg)
        return TensorStore(out), shape[0], out.dtype
    if not hasattr(out, "__setitem__") or np.dtype(getattr(out, "dtype", object)).kind != "f":
        msg = (
            "out must be a tensor, a real floating array that takes out[i] = row, or a path "
            f"that ends in .npy, got {type(out).__name__}"
        )
        raise TypeError(msg)
    kind = {2: torch.float16, 4: torch.float32}.get(np.dtype(out.dtype).itemsize, torch.float64)
    return ArrayStore(out), shape[0], kind


def put(store: Store, i: int, rows: Tensor, wanted: int | None) -> None:
    """Write rows (k, d) from row i on, and say what went wrong."""
    if not bool(torch.isfinite(rows).all()):
        msg = f"gradient {i} overflows {rows.dtype}; take a wider dtype for the rows"
        raise check.NonFiniteError(msg)
    try:
        store.write(i, rows)
    except OSError as error:
        size = f" of {wanted}" if wanted else ""
        msg = (
            f"row {i}{size} could not be written to out, {rows[0].nbytes} bytes a row: "
            f"{error.strerror or error}; make room, or take fewer rows or a narrower dtype"
        )
        raise OSError(error.errno, msg) from error


def _numpy_dtype(dtype: Any) -> Any:
    if dtype is torch.bfloat16:
        msg = "dtype of a .npy file must be one of NumPy's, got bfloat16; take float16 or float32"
        raise ValueError(msg)
    return torch.empty(0, dtype=dtype).numpy().dtype
