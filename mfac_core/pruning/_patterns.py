"""Which weights may go together, and which go next."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Home, to_numpy
from mfac_core._rows.base import Reduce
from mfac_core._rows.plan import indices
from mfac_core.pruning._groups import Labels, Rises, add_rises
from mfac_core.pruning._kept import Mask, Part, Vector
from mfac_core.pruning._layers import Layer
from mfac_core.pruning._select import lowest, lowest_on_ranks

UNIT_WEIGHTS = 1 << 21
"""Weights whose places within their M are found at a time."""


class Budget(NamedTuple):
    """How many weights are to be left of a stretch, and at least in each of its layers."""

    part: slice
    stay: int
    floors: list[tuple[slice, int]]


class Pattern(ABC):
    """What may be removed.

    Parameters
    ----------
    home : Home
        Where scores and masks are.
    layers : sequence of Layer
        All of the weights; those of vectors always stay.
    reduce : callable, optional
        Sum over ranks, where the layers are this rank's and budgets are for all ranks.
    """

    largest = 1
    """Most weights of a group."""

    def __init__(self, home: Home, layers: Sequence[Layer], reduce: Reduce | None) -> None:
        self._home, self._layers, self._reduce = home, layers, reduce
        self._d = layers[-1].part.stop

    def restrict(self, kept: Mask) -> None:  # noqa: B027 -- most have nothing to note
        """Take note of what is kept at first."""

    @abstractmethod
    def scores(self) -> Vector:
        """Return zeros for the saliencies to come."""

    @abstractmethod
    def look(self, scores: Vector, part: Part, here: slice, x: Vector) -> list[Rises]:
        """Set the saliencies of a part at its weights x, or return addends of them."""

    @abstractmethod
    def fewest(self, kept: Mask, layer: Layer) -> int:
        """Return how many of the kept weights in a layer can never go."""

    @abstractmethod
    def dense(self, layer: Layer) -> int:
        """Return how many weights of a layer it does not take."""

    @abstractmethod
    def remove(self, scores: Vector, kept: Mask, budget: Budget) -> Mask:
        """Remove by lowest saliency a weight until about ``stay`` are left of a budget's part."""

    def sum(self, scores: Vector, found: Sequence[list[Rises]]) -> None:
        """Add what looking at all parts returned."""
        for rises in found:
            for some in rises:
                add_rises(self._home, scores, some)

    def count(self, mask: Mask) -> int:
        """Return how many are marked."""
        return int(self._home.xp.sum(self._home.xp.astype(mask, self._home.xp.int64)))

    def to_go(self, kept: Mask, budget: Budget) -> float:
        """Return how many of a budget's weights have to go now, of all ranks."""
        now = float(self.count(kept[budget.part]))
        if self._reduce is not None:
            now = float(self._reduce(np.array([now]))[0])
        return now - budget.stay


class SingleWeights(Pattern):
    """Every weight by itself."""

    def scores(self) -> Vector:
        """See :class:`Pattern`."""
        return self._home.zeros(self._d)

    def look(self, scores: Vector, part: Part, here: slice, x: Vector) -> list[Rises]:
        """See :class:`Pattern`; wᵢ²/(2 [F⁻¹]ᵢᵢ)."""
        scores[here] = x * x / (2.0 * part.diagonal())
        return []

    def fewest(self, kept: Mask, layer: Layer) -> int:
        """See :class:`Pattern`."""
        return self.count(kept[layer.part]) if layer.is_vector else 0

    def dense(self, layer: Layer) -> int:
        """See :class:`Pattern`."""
        return layer.size if layer.is_vector else 0

    def remove(self, scores: Vector, kept: Mask, budget: Budget) -> Mask:
        """See :class:`Pattern`."""
        count = self.to_go(kept, budget)
        if count <= 0:
            return kept
        free = self._candidates(scores, kept)
        for part, floor in budget.floors:
            spare = max(self.count(kept[part]) - floor, 0)
            if self.count(free[part]) > spare:
                free[part] = lowest(self._home, scores[part], free[part], spare)
        part = budget.part
        if self._reduce is None:
            gone = lowest(self._home, scores[part], free[part], int(count))
        else:
            gone = lowest_on_ranks(self._home, scores[part], free[part], count, self._reduce)
        kept = self._home.xp.asarray(kept, copy=True)
        kept[part] = kept[part] & ~gone
        return kept

    def _candidates(self, scores: Vector, kept: Mask) -> Mask:
        """Return which weights may go now."""
        free = self._home.xp.asarray(kept, copy=True)
        for layer in self._layers:
            if layer.is_vector:
                free[layer.part] = False
        return free


class AdjacentWeights(SingleWeights):
    """Single weights, of which N of every M neighbours stay.

    Neighbours along axis 1 where shapes are known: input channels, as sparse tensor cores read
    them; else those that follow one another.
    """

    def __init__(
        self, home: Home, layers: Sequence[Layer], reduce: Reduce | None, n: int, m: int
    ) -> None:
        super().__init__(home, layers, reduce)
        self._n, self._m = n, m
        if len(layers) == 1 and layers[0].shape is None:
            _divides(m, layers[0].size)
        for i, layer in enumerate(layers):
            if layer.shape is None and layer.size % m:
                _refuse_across(layer.part.stop if i + 1 < len(layers) else layer.part.start, i)

    def _shape(self, layer: Layer) -> tuple[int, int, int]:
        """Return a layer's shape as rows, neighbours, and what lies between neighbours."""
        if layer.is_vector:
            return 0, 0, 1
        if layer.shape is None:
            return layer.size // self._m, self._m, 1
        return layer.shape[0], layer.shape[1], math.prod(layer.shape[2:])

    def _units(self, layer: Layer) -> Iterator[tuple[slice, tuple[int, int, int], int]]:
        """Yield stretches of whole rows, their shape, and how many of its neighbours take part."""
        rows, neighbours, inner = self._shape(layer)
        whole = neighbours // self._m * self._m
        if not whole:
            return
        step = max(UNIT_WEIGHTS // (neighbours * inner), 1)
        for row in range(0, rows, step):
            last = min(row + step, rows)
            first = layer.part.start + row * neighbours * inner
            width = (last - row) * neighbours * inner
            yield slice(first, first + width), (last - row, neighbours, inner), whole

    def dense(self, layer: Layer) -> int:
        """See :class:`Pattern`."""
        rows, neighbours, inner = self._shape(layer)
        return layer.size - rows * (neighbours // self._m * self._m) * inner

    def fewest(self, kept: Mask, layer: Layer) -> int:
        """See :class:`Pattern`."""
        xp = self._home.xp
        total = self.count(kept[layer.part])
        for here, shape, whole in self._units(layer):
            left = xp.sum(xp.astype(self._split(kept[here], shape, whole), xp.int64), axis=2)
            total -= int(xp.sum(xp.where(left > self._n, left - self._n, 0)))
        return total

    def _split(self, x: Any, shape: tuple[int, int, int], whole: int) -> Any:
        """Return (rows, units, M, inner) of a stretch's vector."""
        xp = self._home.xp
        rows, _, inner = shape
        x = xp.reshape(x, shape)[:, :whole, :]
        return xp.reshape(x, (rows, whole // self._m, self._m, inner))

    def _candidates(self, scores: Vector, kept: Mask) -> Mask:
        """Return the lowest of each M, as many as are above N."""
        xp = self._home.xp
        free = xp.zeros_like(kept)
        for layer in self._layers:
            for here, shape, whole in self._units(layer):
                own = self._split(kept[here], shape, whole)
                keys = xp.where(own, self._split(scores[here], shape, whole), xp.inf)
                excess = xp.sum(xp.astype(own, xp.int64), axis=2, keepdims=True) - self._n
                order = xp.argsort(keys, axis=2, stable=True)
                rank = xp.argsort(order, axis=2, stable=True)
                inside = xp.zeros(shape, dtype=xp.bool, device=self._home.device)
                flat = xp.reshape(rank < excess, (shape[0], whole, shape[2]))
                inside[:, :whole, :] = flat
                free[here] = xp.reshape(inside, (-1,))
        return free


class Groups(Pattern):
    """Groups of weights, each of them free to go as a whole.

    Parameters
    ----------
    labels : array, shape (d,)
        NumPy: the number of each weight's group, from 0 on without gaps; −1 for one that stays.
    """

    def __init__(
        self, home: Home, layers: Sequence[Layer], reduce: Reduce | None, labels: Labels
    ) -> None:
        super().__init__(home, layers, reduce)
        for layer in layers:
            if layer.is_vector:
                labels[layer.part] = -1
        labels = _numbered(labels)
        self._labels = labels
        self._live = self._labels
        self._count = int(self._labels.max(initial=-1)) + 1
        self._owner = np.zeros(self._count, np.int64)
        for i, layer in enumerate(layers):
            own = self._labels[layer.part]
            self._owner[own[own >= 0]] = i
        for i, layer in enumerate(layers):
            own = self._labels[layer.part]
            across = np.flatnonzero((own >= 0) & (self._owner[own] != i))
            if len(across):  # the owner is the last
                later = layers[int(self._owner[own[across[0]]])].part
                first = np.flatnonzero(self._labels[later] == own[across[0]])[0]
                _refuse_across(later.start + int(first), i)
        self._there = indices(home, self._labels)
        self.largest = int(self._sizes().max(initial=1))

    def restrict(self, kept: Mask) -> None:
        """See :class:`Pattern`."""
        if self.count(kept) < self._d:
            self._live = np.where(to_numpy(kept), self._live, -1)

    def scores(self) -> Vector:
        """See :class:`Pattern`."""
        return self._home.zeros(self._count)

    def look(self, scores: Vector, part: Part, here: slice, x: Vector) -> list[Rises]:
        """See :class:`Pattern`; ½ w_Qᵀ([F⁻¹]_QQ)⁻¹w_Q."""
        return part.rises(x, self._live[here])

    def fewest(self, kept: Mask, layer: Layer) -> int:
        """See :class:`Pattern`."""
        live = int(np.sum(self._live[layer.part] >= 0))
        return self.count(kept[layer.part]) - live

    def dense(self, layer: Layer) -> int:
        """See :class:`Pattern`."""
        return int(np.sum(self._labels[layer.part] < 0))

    def remove(self, scores: Vector, kept: Mask, budget: Budget) -> Mask:
        """See :class:`Pattern`.

        The number of weights left is the nearest that whole groups allow; of two as near, the
        larger.
        """
        count = self.to_go(kept, budget)
        sizes = self._sizes()
        each = to_numpy(scores) / np.maximum(sizes, 1)
        free = sizes > 0
        inside = [i for i, layer in enumerate(self._layers) if _within(layer.part, budget.part)]
        free &= np.isin(self._owner, inside)
        for part, floor in budget.floors:
            self._protect(free, each, sizes, part, self.count(kept[part]) - floor)
        if self._reduce is None:
            order = np.flatnonzero(free)[np.argsort(each[free], kind="stable")]
            gone = np.cumsum(sizes[order])
            leave = np.zeros(self._count + 1, dtype=np.bool_)  # the last for those without a group
            leave[order[gone - sizes[order] / 2.0 < count]] = True
        else:
            there = Home(np, "cpu")
            marked = lowest_on_ranks(there, each, free, count, self._reduce, sizes)
            leave = np.append(marked, False)
        self._live = np.where(leave[self._live], -1, self._live)
        xp = self._home.xp
        left = ~xp.take(xp.asarray(leave, device=self._home.device), self._there, axis=0)
        return kept & left

    def _protect(self, free: Mask, each: Vector, sizes: Any, part: slice, spare: int) -> None:
        """Leave only so many groups of a layer free that what they have is at most ``spare``."""
        layer = next(i for i, layer in enumerate(self._layers) if layer.part == part)
        own = np.flatnonzero(free & (self._owner == layer))
        order = own[np.argsort(each[own], kind="stable")]
        free[order[np.cumsum(sizes[order]) > spare]] = False

    def _sizes(self) -> np.ndarray[Any, Any]:
        """Return how many weights are left in each group."""
        return np.bincount(self._live[self._live >= 0], minlength=self._count)


def pattern_of(pattern: Any, layers: Sequence[Layer], home: Home, reduce: Reduce | None) -> Pattern:
    """Return what a pattern stands for."""
    d = layers[-1].part.stop
    if pattern is None:
        return SingleWeights(home, layers, reduce)
    if isinstance(pattern, str):
        match = re.fullmatch(r"(\d+):(\d+)", pattern)
        if match is None or not 0 < int(match[1]) < int(match[2]):
            msg = f"pattern must be 'N:M' with 0 < N < M, such as '2:4', got {pattern!r}"
            raise ValueError(msg)
        return AdjacentWeights(home, layers, reduce, int(match[1]), int(match[2]))
    if isinstance(pattern, (list, tuple)) or getattr(pattern, "ndim", 0) > 0:
        return Groups(home, layers, reduce, _labels_argument(pattern, d))
    size = check.integer(pattern, "pattern", minimum=1)
    _divides(size, d)
    return Groups(home, layers, reduce, np.arange(d) // size)


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
    return labels.astype(np.int64)


def _numbered(labels: Labels) -> Labels:
    """Return labels from 0 on, and −1 for weights without a group; int32 where that is enough."""
    if int(labels.max(initial=-1)) < 4 * len(labels):  # a table of the labels beats sorting them
        present = np.bincount(labels[labels >= 0], minlength=1) > 0
        table = np.append(np.cumsum(present) - 1, -1)
        numbers = table.astype(np.int32 if len(labels) < 2**31 else np.int64)
        return np.take(numbers, np.maximum(labels, -1), mode="wrap")
    free = labels >= 0
    numbered = np.full(len(labels), -1)
    numbered[free] = np.unique(labels[free], return_inverse=True)[1]
    return numbered


def _divides(size: int, d: int) -> None:
    if d % size:
        msg = f"pattern must divide the number of weights {d} into groups of {size} without rest"
        raise ValueError(msg)


def _refuse_across(weight: int, layer: int) -> None:
    msg = (
        f"pattern must not have a group across layers, and weight {weight} is of a group that "
        f"begins in layers[{layer}]; change the pattern, give the layers' shapes, or leave them out"
    )
    raise ValueError(msg)


def _within(inner: slice, outer: slice) -> bool:
    return bool(outer.start <= inner.start and inner.stop <= outer.stop)
