"""What type checkers and editors are told of arguments and results; nothing here runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from typing_extensions import TypeVar  # in every checker, and nowhere needed to run
else:
    from typing import TypeVar as _TypeVar

    def TypeVar(name, **_):
        return _TypeVar(name)


class Sliceable(Protocol):
    """What is read by slices: a dataset of h5py or zarr, a memory map, an array."""

    @property
    def shape(self) -> Any:
        """(m, d)."""

    @property
    def dtype(self) -> Any:
        """Of its elements."""

    def __getitem__(self, key: Any, /) -> Any:
        """Return a part of it."""


class AnyArray(Sliceable, Protocol):
    """An array of any library, as far as their types agree."""

    @property
    def ndim(self) -> int:
        """The number of axes."""

    @property
    def T(self) -> Any:
        """The transpose."""


ArrayT = TypeVar("ArrayT", bound=AnyArray, default=Any)
"""The array type of an operator: what goes in, and what comes out."""

GivenT = TypeVar("GivenT", bound=AnyArray)
"""The same, to be found from arguments: a default would take what is no array at all."""

NDArray: TypeAlias = np.ndarray[Any, Any]

Damping: TypeAlias = float | Literal["auto"]

Stored: TypeAlias = NDArray | Sequence[NDArray | Path] | Path
"""Gradients beside which vectors are NumPy's, but for what is only sliceable."""

IndexLike: TypeAlias = int | Sequence[int] | AnyArray

Normalization: TypeAlias = Literal["count", "window"]

BlockSize: TypeAlias = int | Sequence[int]

Layers: TypeAlias = Sequence[int | Sequence[int]]

Method: TypeAlias = Literal["leave-one-out", "ledoit-wolf", "oas"]

Update: TypeAlias = Literal["joint", "independent"]

Scope: TypeAlias = Literal["layer", "global"]


class Reduce(Protocol):
    """What ``reduce=`` takes: it sums a small float64 NumPy array over ranks.

    A function, such as ``comm.allreduce`` of mpi4py, that returns the sum on every rank, with the
    same bits if possible. All ranks call it in the same order.
    """

    def __call__(self, x: NDArray, /) -> NDArray:
        """Return the sum."""
