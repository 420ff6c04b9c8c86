"""What is said where a later pass over a model's batches is not like the first."""

from __future__ import annotations

from typing import Any

import numpy as np

NDArray = np.ndarray[Any, Any]


def difference(at: slice, now: NDArray, recorded: NDArray) -> str:
    """Say where the losses of the rows ``at`` are farthest from those of the first pass."""
    then = recorded[at]
    if len(now) != len(then):
        return f"the loss of row {at.start} was {recorded[at.start]:.6g}"
    i = int(np.argmax(np.abs(now - then)))
    return f"the loss of row {at.start + i} was {then[i]:.6g} and is now {now[i]:.6g}"
