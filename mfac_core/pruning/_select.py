"""Which scores are lowest: one selection where they are, whatever the library."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from array_api_compat import is_cupy_namespace, is_torch_namespace

from mfac_core._arrays import Array, Home, to_numpy
from mfac_core._rows.base import Reduce

DIGIT_BITS = 16
"""Bits of a float64 that are looked at in one round over ranks."""


def lowest(home: Home, scores: Array, free: Array, count: int) -> Array:
    """Mark the ``count`` lowest scores among those that are ``free``; of equal ones the first."""
    xp = home.xp
    total = int(xp.sum(xp.astype(free, xp.int64)))
    if count >= total:
        return xp.asarray(free, copy=True)
    if count <= 0:
        return xp.zeros_like(free)
    keys = xp.where(free & ~xp.isnan(scores), scores, xp.inf)
    limit = _nth_lowest(home, keys, count)
    marked = free & (keys < limit)
    equal = free & (keys == limit)
    missing = count - int(xp.sum(xp.astype(marked, xp.int64)))
    if missing < int(xp.sum(xp.astype(equal, xp.int64))):
        equal = equal & (xp.cumulative_sum(xp.astype(equal, xp.int64)) <= missing)
    return marked | equal


def _nth_lowest(home: Home, keys: Array, n: int) -> Array:
    """Return the n-th lowest, counted from 1."""
    xp = home.xp
    if home.is_numpy or is_cupy_namespace(xp):
        return xp.partition(keys, n - 1)[n - 1]
    if is_torch_namespace(xp):
        return sys.modules["torch"].kthvalue(keys, n).values
    return xp.sort(keys)[n - 1]


def lowest_on_ranks(
    home: Home, scores: Array, free: Array, count: float, reduce: Reduce, sizes: Any = None
) -> Array:
    """Mark the lowest scores among those free on all ranks, about ``count`` of them.

    Those of equal score go together, up to the nearest number: ranks know of no order. The limit
    is found 16 bits a round, from counts that are summed over ranks.

    Parameters
    ----------
    sizes : array of int, optional
        How much each counts; one by default.
    """
    xp = home.xp
    keys = to_numpy(_bits(home, xp.where(free, scores, xp.inf)))[to_numpy(free)]
    weights = None if sizes is None else to_numpy(sizes)[to_numpy(free)].astype(np.float64)
    below, prefix = 0.0, 0
    for shift in range(64 - DIGIT_BITS, -1, -DIGIT_BITS):
        inside = keys >> (shift + DIGIT_BITS) == prefix if shift + DIGIT_BITS < 64 else slice(None)
        digits = (keys[inside] >> shift) & (2**DIGIT_BITS - 1)
        some = None if weights is None else weights[inside]
        counts = np.bincount(digits, some, minlength=2**DIGIT_BITS).astype(np.float64)
        sums = np.cumsum(np.asarray(reduce(counts)))
        digit = min(int(np.searchsorted(sums, count - below)), 2**DIGIT_BITS - 1)
        before = float(sums[digit - 1]) if digit else 0.0
        equal, below = float(sums[digit]) - before, below + before
        prefix = (prefix << DIGIT_BITS) | digit
    limit = prefix + (below + equal / 2.0 < count)
    return free & (_bits(home, scores) < limit)


def _bits(home: Home, scores: Array) -> Array:
    """Return float64 numbers, none negative, as integers of the same order."""
    if home.is_numpy or is_cupy_namespace(home.xp):
        return scores.view(home.xp.int64)
    if is_torch_namespace(home.xp):
        return scores.view(sys.modules["torch"].int64)
    return home.xp.asarray(to_numpy(scores).view(np.int64))
