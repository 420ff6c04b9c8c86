"""How many weights stay, in all or in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mfac_core import _validate as check
from mfac_core.pruning._kept import Mask
from mfac_core.pruning._patterns import AdjacentWeights, Groups


def weights_to_stay(
    sparsity: Any, layers: Sequence[int] | None, groups: Groups, kept: Mask
) -> list[tuple[slice, int]]:
    """Return how many weights are to be left, of all or of each layer."""
    d = len(kept)
    if sparsity is None:
        if not isinstance(groups, AdjacentWeights):
            msg = "sparsity must be given, unless pattern is 'N:M'"
            raise ValueError(msg)
        return [(slice(0, d), groups.fewest(kept, slice(0, d)))]
    shares = _shares(sparsity)
    lengths = [d] if layers is None else [check.integer(n, "layers", minimum=1) for n in layers]
    if sum(lengths) != d:
        msg = f"layers must sum to the number of weights {d}, got {sum(lengths)}"
        raise ValueError(msg)
    if not isinstance(shares, list):
        shares, lengths = [shares], [d]
    if len(shares) != len(lengths):
        msg = f"sparsity must be one number or one for each of {len(lengths)} layers"
        raise ValueError(msg)
    stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    parts = [slice(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
    groups.check_layers(parts)
    return [
        (part, _stay(share, part, groups, kept)) for part, share in zip(parts, shares, strict=True)
    ]


def _shares(sparsity: Any) -> float | list[float]:
    many = isinstance(sparsity, Sequence) or getattr(sparsity, "ndim", 0) > 0
    given = sparsity if many else [sparsity]
    shares = [check.finite_number(share, "sparsity") for share in given]
    for share in shares:
        if not 0.0 <= share < 1.0:
            msg = f"sparsity must be in [0, 1), got {share!r}"
            raise ValueError(msg)
    return shares if many else shares[0]


def _stay(share: float, part: slice, groups: Groups, kept: Mask) -> int:
    size: int = part.stop - part.start
    stay = size - round(share * size)
    now = int(kept[part].sum())
    if stay - now >= groups.largest:  # a mask of whole groups may be ahead by a part of one
        msg = (
            f"sparsity {share} must not be below what mask already has, "
            f"{1 - now / size:.4f}; raise it or leave the mask out"
        )
        raise ValueError(msg)
    fewest = groups.fewest(kept, part)
    if stay < fewest:
        msg = (
            f"sparsity {share} cannot be reached: pattern lets at most {1 - fewest / size:.4f} "
            f"of the {size} weights be removed; lower it or change the pattern"
        )
        raise ValueError(msg)
    return stay
