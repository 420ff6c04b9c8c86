"""Which weights may go together, and which go next."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import to_numpy
from mfac_core.pruning._groups import Labels
from mfac_core.pruning._kept import KeptFisher, Mask, Vector


class Groups:
    """Groups of weights, each of them free to go as a whole.

    Parameters
    ----------
    labels : array, shape (d,)
        The number of each weight's group, from 0 on without gaps; −1 for a weight that stays.
    """

    def __init__(self, labels: Labels) -> None:
        self._labels = labels
        self._grouped = labels >= 0
        self._count = int(labels.max(initial=-1)) + 1
        self.largest = int(self._sizes(self._grouped).max(initial=1))

    def saliencies(self, weights: Vector, kept: Mask, fisher: KeptFisher) -> Vector:
        """Return what the loss rises when a group is removed alone: ½ w_Qᵀ([F⁻¹]_QQ)⁻¹w_Q."""
        if self.largest > 1:
            return fisher.rises(weights, self._labels, self._count)
        rises = np.zeros(self._count)
        single = weights**2 / (2.0 * fisher.diagonal())
        rises[self._labels[self._grouped]] = single[self._grouped]
        return rises

    def fewest(self, kept: Mask, within: slice) -> int:
        """Return how many of the kept weights in a layer can never go."""
        return int(np.sum((kept & ~self._grouped)[within]))

    def remove(self, saliencies: Vector, kept: Mask, within: slice, stay: int) -> Mask:
        """Remove groups of a layer by lowest saliency a weight, until about ``stay`` are left.

        The number of weights left is the nearest that whole groups allow; of two as near, the
        larger.
        """
        inside = np.zeros_like(kept)
        inside[within] = kept[within]
        sizes = self._sizes(inside & self._grouped)
        free = np.flatnonzero(self._candidates(saliencies, kept) & (sizes > 0))
        order = free[np.argsort(saliencies[free] / sizes[free], kind="stable")]
        gone = np.cumsum(sizes[order])
        halfway = gone - sizes[order] / 2.0
        leave = np.zeros(self._count + 1, dtype=np.bool_)  # the last for those without a group
        leave[order[halfway < inside.sum() - stay]] = True
        return kept & ~(leave[self._labels] & inside)

    def check_layers(self, layers: Sequence[slice]) -> None:
        """Refuse a group that lies across layers with budgets of their own."""
        owner = np.repeat(np.arange(len(layers)), [layer.stop - layer.start for layer in layers])
        units = self._units()
        inside = np.flatnonzero(units >= 0)
        _, first, unit = np.unique(units[inside], return_index=True, return_inverse=True)
        across = owner[inside[first]][unit] != owner[inside]
        if across.any():
            weight = int(inside[across][0])
            msg = (
                f"pattern must not have a group across layers with a sparsity each, and weight "
                f"{weight} is of a group that is; give one sparsity for all layers"
            )
            raise ValueError(msg)

    def _units(self) -> Labels:
        """Return which weights the pattern looks at together."""
        return self._labels

    def _candidates(self, saliencies: Vector, kept: Mask) -> Mask:
        """Return which groups may go now."""
        return np.ones(self._count, dtype=np.bool_)

    def _sizes(self, of: Mask) -> np.ndarray[Any, Any]:
        """Return how many weights that ``of`` marks are in each group."""
        return np.bincount(self._labels[of], minlength=self._count)


class AdjacentWeights(Groups):
    """Single weights, of which N of every M adjacent ones stay."""

    def __init__(self, d: int, n: int, m: int) -> None:
        super().__init__(np.arange(d))
        self._n, self._m = n, m

    def fewest(self, kept: Mask, within: slice) -> int:
        """See :class:`Groups`."""
        left = kept[within].reshape(-1, self._m).sum(axis=1)
        return int(np.minimum(left, self._n).sum())

    def _candidates(self, saliencies: Vector, kept: Mask) -> Mask:
        """Return the lowest of each M, as many as are above N."""
        scores = np.where(kept, saliencies, np.inf).reshape(-1, self._m)
        excess = kept.reshape(-1, self._m).sum(axis=1) - self._n
        rank = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1, kind="stable")
        lowest: Mask = rank < excess[:, None]
        return lowest.ravel()

    def _units(self) -> Labels:
        return np.arange(len(self._labels)) // self._m


def groups_of(pattern: Any, d: int) -> Groups:
    """Return the groups that a pattern stands for."""
    if pattern is None:
        return Groups(np.arange(d))
    if isinstance(pattern, str):
        match = re.fullmatch(r"(\d+):(\d+)", pattern)
        if match is None or not 0 < int(match[1]) < int(match[2]):
            msg = f"pattern must be 'N:M' with 0 < N < M, such as '2:4', got {pattern!r}"
            raise ValueError(msg)
        n, m = int(match[1]), int(match[2])
        _divides(m, d)
        return AdjacentWeights(d, n, m)
    if isinstance(pattern, (list, tuple)) or getattr(pattern, "ndim", 0) > 0:
        return Groups(_labels_argument(pattern, d))
    size = check.integer(pattern, "pattern", minimum=1)
    _divides(size, d)
    return Groups(np.arange(d) // size)


def schedule(start: int, stop: int, stages: int) -> list[int]:
    """Return how many stay after each stage, by equal ratios from ``start`` to ``stop``."""
    if stop == 0:
        return [round(start * (1 - (k + 1) / stages)) for k in range(stages)]
    ratio = stop / start
    return [round(start * ratio ** ((k + 1) / stages)) for k in range(stages)]


def _labels_argument(pattern: Any, d: int) -> Labels:
    labels = np.asarray(pattern) if isinstance(pattern, (list, tuple)) else to_numpy(pattern)
    if labels.dtype.kind not in "iu" or labels.shape != (d,):
        msg = (
            f"pattern must be 'N:M', an integer, or integer labels of shape ({d},), "
            f"got dtype {labels.dtype} and shape {labels.shape}"
        )
        raise ValueError(msg)
    numbered = np.full(d, -1)
    free = labels >= 0
    numbered[free] = np.unique(labels[free], return_inverse=True)[1]
    return numbered


def _divides(size: int, d: int) -> None:
    if d % size:
        msg = f"pattern must divide the number of weights {d} into groups of {size} without rest"
        raise ValueError(msg)
