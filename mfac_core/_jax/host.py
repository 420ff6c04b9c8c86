"""The m-sized system of a traced program, solved on the host: JAX by default has no float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from mfac_core._arrays import home_of
from mfac_core._dual import Dual


def solve_on_host(gram: Any, shift: float, b: Any) -> np.ndarray[Any, Any]:
    """Return (shift·I + gram)⁻¹b in float64, NaN where the shift is not finite."""
    gram, b = (np.array(a, dtype=np.float64) for a in (gram, b))
    if not np.isfinite(shift):
        return np.full_like(b, np.nan)
    solution: np.ndarray[Any, Any] = Dual(gram, shift, home_of(gram)).solve(b)
    return solution
