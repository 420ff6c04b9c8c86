"""Vectors and masks as NumPy arrays of their own."""

from __future__ import annotations

from typing import Any

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array, to_numpy
from mfac_core._rows.base import Rows
from mfac_core.pruning._kept import Mask, Vector


def vector_argument(x: Array, name: str, rows: Rows) -> Vector:
    """Check a finite vector beside the gradients, and return it in float64."""
    x = check.vector_argument(x, name, rows.shape[1])
    check.beside(x, name, rows.like)
    wide = to_numpy(x).astype(np.float64)
    if not np.isfinite(wide).all():
        msg = f"{name} must be finite, got {int((~np.isfinite(wide)).sum())} NaN or infinities"
        raise ValueError(msg)
    return wide


def mask_argument(mask: Any, d: int) -> Mask:
    """Check a mask of any library, and return a copy."""
    kept = np.asarray(mask) if isinstance(mask, (list, tuple)) else to_numpy(mask)
    if kept.dtype != np.bool_ or kept.shape != (d,):
        msg = (
            f"mask must be boolean of shape ({d},), True where a weight is kept, "
            f"got dtype {kept.dtype} and shape {kept.shape}"
        )
        raise ValueError(msg)
    return np.array(kept)
