"""How many weights stay, in all or in each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mfac_core import _validate as check
from mfac_core._rows.base import Reduce
from mfac_core.pruning._kept import Mask
from mfac_core.pruning._layers import Layer
from mfac_core.pruning._patterns import AdjacentWeights, Budget, Pattern


def budgets(
    sparsity: Any,
    layers: list[Layer],
    pattern: Pattern,
    kept: Mask,
    *,
    scope: str,
    floor: float,
    reduce: Reduce | None,
) -> list[Budget]:
    """Return how many weights are to be left, of all or of each layer.

    Several layers, and a ``scope`` of "layer", have a budget each: of this rank alone.
    """
    if sparsity is None and not isinstance(pattern, AdjacentWeights):
        msg = "sparsity must be given, unless pattern is 'N:M'"
        raise ValueError(msg)
    shares = None if sparsity is None else _shares(sparsity)
    alone = len(layers) == 1 and layers[0].shape is None  # none were named
    least_of = [0 if alone else _floor(layer, floor, pattern, kept) for layer in layers]
    if scope == "layer":
        given = shares if isinstance(shares, list) else [shares] * len(layers)
        if len(given) != len(layers):
            msg = f"sparsity must be one number or one for each of {len(layers)} layers"
            raise ValueError(msg)
        return [
            _of_layer(i, layer, share, least, pattern, kept, isinstance(shares, list))
            for i, (layer, share, least) in enumerate(zip(layers, given, least_of, strict=True))
        ]
    if isinstance(shares, list):
        msg = "sparsity must be one number, for all layers together, or scope 'layer'"
        raise ValueError(msg)
    whole = slice(0, layers[-1].part.stop)
    fewest = [pattern.fewest(kept, layer) for layer in layers]
    least = sum(max(a, b) for a, b in zip(fewest, least_of, strict=True))
    numbers = np.array([whole.stop, pattern.count(kept), sum(fewest), least], np.float64)
    size, now, least_pattern, least = (int(n) for n in (reduce(numbers) if reduce else numbers))
    several = [(layer.part, n) for layer, n in zip(layers, least_of, strict=True) if n]
    stay = least_pattern if shares is None else _stay(shares, size, now, least, pattern, "")
    return [Budget(whole, stay, several)]


def _of_layer(
    i: int,
    layer: Layer,
    share: float | None,
    least: int,
    pattern: Pattern,
    kept: Mask,
    own: bool,
) -> Budget:
    """Return the budget of one layer."""
    now, fewest = pattern.count(kept[layer.part]), pattern.fewest(kept, layer)
    if layer.is_vector and (not own or not share):
        return Budget(layer.part, now, [])
    stay = fewest
    if share is not None:
        of = f" of layers[{i}]" if own or layer.shape is not None else ""
        stay = _stay(share, layer.size, now, fewest, pattern, of)
    return Budget(layer.part, max(stay, min(least, now)), [])


def _floor(layer: Layer, share: float, pattern: Pattern, kept: Mask) -> int:
    """Return how many weights a layer keeps at least: one, unless it has none."""
    return min(max(math.ceil(share * layer.size), 1), pattern.count(kept[layer.part]))


def _shares(sparsity: Any) -> float | list[float]:
    many = isinstance(sparsity, Sequence) or getattr(sparsity, "ndim", 0) > 0
    given = sparsity if many else [sparsity]
    shares = [check.finite_number(share, "sparsity") for share in given]
    for share in shares:
        if not 0.0 <= share < 1.0:
            msg = f"sparsity must be in [0, 1), got {share!r}"
            raise ValueError(msg)
    return shares if many else shares[0]


def _stay(share: float, size: int, now: int, fewest: int, pattern: Pattern, of: str) -> int:
    stay = size - round(share * size)
    if stay - now >= pattern.largest:  # a mask of whole groups may be ahead by a part of one
        msg = (
            f"sparsity {share}{of} must not be below what mask already has, "
            f"{1 - now / size:.4f}; raise it or leave the mask out"
        )
        raise ValueError(msg)
    if stay < fewest:
        msg = (
            f"sparsity {share}{of} cannot be reached: pattern and floor let at most "
            f"{1 - fewest / size:.4f} of the {size} weights be removed; lower it or change them"
        )
        raise ValueError(msg)
    return stay
