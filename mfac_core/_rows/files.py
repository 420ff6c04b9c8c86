"""Files by their paths, and slices of safetensors: as what the rows read, with shape and dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

SAFETENSORS = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
"""Their dtypes that NumPy has."""


class TensorSlice:
    """What ``get_slice`` of a safetensors file returns, with shape and dtype as arrays have them.

    Parameters
    ----------
    tensor : safetensors slice
        Has ``get_shape()``, ``get_dtype()`` and ``[a:b, c:d]``.
    """

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor
        self.shape = tuple(tensor.get_shape())
        name = tensor.get_dtype()
        self.dtype = SAFETENSORS.get(name, name)

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray[Any, Any]:
        return np.asarray(self._tensor[key])


def opened(source: Any, name: str) -> Any:
    """Return a .npy file mapped into memory for its path, and what else is sliced as it is."""
    if isinstance(source, (str, Path)):
        if Path(source).suffix != ".npy":
            msg = (
                f"{name} must be an array or the path of a .npy file, got {str(source)!r}; "
                "open the file, and pass what can be sliced"
            )
            raise TypeError(msg)
        return np.load(source, mmap_mode="r")
    return TensorSlice(source) if hasattr(source, "get_shape") else source
