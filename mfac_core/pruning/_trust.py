"""How far to trust the quadratic model, asked of the real loss."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mfac_core.pruning._kept import Vector
from mfac_core.pruning._model import QuadraticModel

STEPS = (0.25, 0.5, 0.75, 1.0)
"""Parts of a joint update that are tried on the real loss."""

RIDGES = (10.0, 100.0)
"""Multiples of the damping under which the joint update is tried on the real loss as well."""


def lowest(model: QuadraticModel, current: Vector, loss: Callable[[Vector], float]) -> Vector:
    """Return the candidate of lowest loss: ``current``, parts of it, and simpler updates."""
    alone = model.alone()
    targets = [current, *(model.damped(ridge).optimum() for ridge in RIDGES)]
    candidates = [alone]  # the first wins where all are equal, or none is finite
    candidates += [alone + step * (target - alone) for target in targets for step in STEPS]
    candidates.append(_in_one_step(model))
    losses = [float(loss(candidate)) for candidate in candidates]
    finite = [value if np.isfinite(value) else np.inf for value in losses]
    return candidates[int(np.argmin(finite))]


def _in_one_step(model: QuadraticModel) -> Vector:
    """Return the independent update of all removed weights at once."""
    kept = model.kept
    model.restrict(np.ones_like(kept))
    pruned = model.without(model.newton(model.weights), kept)
    model.restrict(kept)
    return pruned
