"""Which weights may go together, and which go next."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from mfac_core import _validate as check
from mfac_core._kept import KeptFisher, Mask, Vector


class Units:
    """Single weights, each of them free to go.

    A *unit* is what is removed as a whole. ``members`` has one row of weight indices for each.
    """

    def __init__(self, members: np.ndarray[Any, Any]) -> None:
        self.members = members

    def kept(self, mask: Mask) -> Mask:
        """Return which units have a weight left."""
        left: Mask = np.any(np.take(mask, self.members), axis=1)
        return left

    def saliencies(self, weights: Vector, fisher: KeptFisher) -> Vector:
        """Return what the loss rises when a unit is removed alone: ½ w_Qᵀ([F⁻¹]_QQ)⁻¹w_Q."""
        if self.members.shape[1] == 1:
            single: Vector = weights**2 / (2.0 * fisher.diagonal())
            return np.take(single, self.members[:, 0])
        values = weights[self.members][:, :, None]
        squares = fisher.squares(self.members)
        # Removed members have zero rows; ones in their place leave the others as they are.
        dead = np.diagonal(squares, axis1=1, axis2=2) == 0.0
        squares = squares + dead[:, :, None] * np.eye(dead.shape[1])
        rises: Vector = np.sum(values * np.linalg.solve(squares, values), axis=(1, 2))
        return rises / 2.0

    def candidates(self, saliencies: Vector, kept: Mask) -> Mask:
        """Return which units may go now."""
        return kept


class AdjacentUnits(Units):
    """N of every M adjacent weights stay."""

    def __init__(self, d: int, n: int, m: int) -> None:
        super().__init__(np.arange(d)[:, None])
        self.n, self.m = n, m

    def candidates(self, saliencies: Vector, kept: Mask) -> Mask:
        """Return the lowest of each M, as many as are above N."""
        scores = np.where(kept, saliencies, np.inf).reshape(-1, self.m)
        excess = kept.reshape(-1, self.m).sum(axis=1) - self.n
        rank = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1, kind="stable")
        lowest: Mask = rank < excess[:, None]
        return lowest.ravel()


def units_of(pattern: Any, d: int) -> Units:
    """Return the units that a pattern stands for."""
    if pattern is None:
        return Units(np.arange(d)[:, None])
    if isinstance(pattern, str):
        match = re.fullmatch(r"(\d+):(\d+)", pattern)
        if match is None or not 0 < int(match[1]) < int(match[2]):
            msg = f"pattern must be 'N:M' with 0 < N < M, such as '2:4', got {pattern!r}"
            raise ValueError(msg)
        n, m = int(match[1]), int(match[2])
        _divides(m, d)
        return AdjacentUnits(d, n, m)
    size = check.integer(pattern, "pattern", minimum=1)
    _divides(size, d)
    return Units(np.arange(d).reshape(-1, size))


def _divides(size: int, d: int) -> None:
    if d % size:
        msg = f"pattern must divide the number of weights {d} into groups of {size} without rest"
        raise ValueError(msg)


def schedule(start: int, stop: int, stages: int) -> list[int]:
    """Return how many stay after each stage, by equal ratios from ``start`` to ``stop``."""
    if stop == 0:
        return [round(start * (1 - (k + 1) / stages)) for k in range(stages)]
    ratio = stop / start
    return [round(start * ratio ** ((k + 1) / stages)) for k in range(stages)]


def remove_lowest(units: Units, saliencies: Vector, mask: Mask, within: Mask, stay: int) -> Mask:
    """Remove units of lowest saliency from those ``within``, until ``stay`` of these are left."""
    kept = units.kept(mask)
    remove = int(kept[within].sum()) - stay
    if remove <= 0:
        return mask
    eligible = units.candidates(saliencies, kept) & within
    order = np.argsort(np.where(eligible, saliencies, np.inf), kind="stable")
    smaller = mask.copy()
    smaller[units.members[order[: min(remove, int(eligible.sum()))]]] = False
    return smaller
