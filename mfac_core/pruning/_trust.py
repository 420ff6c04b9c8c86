"""How far to trust the quadratic model, asked of the real loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from mfac_core.pruning._kept import Vector
from mfac_core.pruning._model import QuadraticModel

STEPS = (0.25, 0.5, 0.75, 1.0)
"""Parts of a joint update that are tried on the real loss."""

RIDGES = (10.0, 100.0)
"""Multiples of the damping under which the joint update is tried on the real loss as well."""


def lowest(model: QuadraticModel, current: Vector, loss: Callable[[Vector], float]) -> Vector:
    """Return the candidate of lowest loss: ``current``, parts of it, and simpler updates."""
    best, least = current, math.nan
    for candidate in _candidates(model, current):
        value = float(loss(candidate))
        value = value if math.isfinite(value) else math.inf
        if not least <= value:  # the first wins where all are equal, or none is finite
            best, least = candidate, value
    return best


def _candidates(model: QuadraticModel, current: Vector) -> Iterator[Vector]:
    """Yield them one at a time: the mask alone, parts of joint updates, the independent one."""
    alone = model.masked()
    yield alone
    for ridge in (1.0, *RIDGES):
        target = current if ridge == 1.0 else model.damped(ridge).optimum()[0]
        for step in STEPS:
            yield alone + step * (target - alone)
    yield _in_one_step(model)


def _in_one_step(model: QuadraticModel) -> Vector:
    """Return the independent update of all removed weights at once."""
    kept = model.kept
    model.restrict(model.home.xp.ones_like(kept))
    pruned = model.without(model.alone(), kept)
    model.restrict(kept)
    return pruned
