"""Warnings that name the caller's line, however deep in the library they are issued."""

from __future__ import annotations

import sys
import warnings

INNER = ("mfac_core", "torch", "jax", "contextlib")
"""Packages whose lines a warning does not name: ours, and those that call us back."""


def warn(message: str, category: type[Warning]) -> None:
    """Issue a warning at the innermost line outside of this library and of what wraps it.

    PyTorch wraps ``Optimizer.step``, JAX calls the host back: their lines say no more to the
    reader than ours.
    """
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INNER:
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(message, category, stacklevel=level)
