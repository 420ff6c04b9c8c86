"""From rows and weights to new weights: where a model meets :func:`mfac_core.pruning.prune`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mfac_core._typing import Update
from mfac_core.pruning import prune
from mfac_core.torch import _groups
from mfac_core.torch._masks import Masked

BLOCK_ROWS, BLOCK = 4, 1024
"""Weights in a block of the Fisher matrix, for each row and at most, unless somebody says how many.

A block has as many directions of its own as there are rows. Shorter ones leave out pairs of
weights that the rows know of; in longer ones the saliency nears the magnitude.
"""

DAMPING = 0.1
"""λ in mean squares of the gradients' entries, unless somebody says otherwise."""

SLICE = 1 << 22
"""Entries of the rows that are widened at a time."""


LayersChoice: TypeAlias = Literal["global", "uniform"]

DampingChoice: TypeAlias = float | Literal["auto", "leave-one-out"]

BlockSizeChoice: TypeAlias = int | Literal["auto"] | None


@dataclass(frozen=True)
class Settings:
    """How to prune: see :class:`Pruner`."""

    pattern: str | None
    layers: LayersChoice
    damping: DampingChoice
    block_size: BlockSizeChoice
    update: Update


@dataclass(frozen=True)
class Solution:
    """New weights and masks, parameter by parameter, and what the model predicts of them."""

    weights: list[Tensor]
    kept: list[Tensor]
    rises: list[float]
    rise: float
    damping: float


def _wide(weights: Tensor) -> Tensor:
    """Return weights in float32, or float64 where they are of it."""
    return weights.to(torch.promote_types(weights.dtype, torch.float32))


def solve(
    rows: Any,
    parameters: Sequence[Masked],
    labels: Any,
    sparsity: float | list[float] | None,
    settings: Settings,
    samples: float,
) -> Solution:
    """Prune by rows (m, d) that are means over ``samples`` samples each."""
    pattern = settings.pattern
    lengths = [each.parameter.numel() for each in parameters]
    weights = torch.cat([_wide(_groups.flat(pattern, x.parameter.detach())) for x in parameters])
    kept = torch.cat([_groups.flat(pattern, x.kept) for x in parameters])
    weights = torch.where(kept, weights, torch.zeros_like(weights))
    on = weights.numpy(force=True) if isinstance(rows, np.ndarray) else weights.to(rows.device)
    pruned = prune(
        on,
        rows,
        sparsity=sparsity,
        pattern=pattern if labels is None else labels,
        mask=kept.cpu().numpy(),
        layers=lengths if settings.layers == "uniform" else None,
        damping=_damping(settings.damping, rows, kept),
        block_size=_block_sizes(settings.block_size, lengths, rows.shape[0]),
        stages=1,
        update=settings.update,
    )
    new = torch.as_tensor(pruned.weights)
    change = new - torch.as_tensor(on)
    products = _products(rows, change, lengths)
    shapes = [tuple(each.parameter.shape) for each in parameters]
    half = samples / 2.0
    return Solution(
        [
            _groups.shaped(pattern, x, s).contiguous()
            for x, s in zip(new.split(lengths), shapes, strict=True)
        ],
        [
            _groups.shaped(pattern, x, s).contiguous()
            for x, s in zip(torch.as_tensor(pruned.mask).split(lengths), shapes, strict=True)
        ],
        [half * float(p.square().mean()) for p in products],
        half * float(torch.stack(products).sum(0).square().mean()),
        pruned.damping,
    )


def _damping(damping: float | str, rows: Any, kept: Tensor) -> Any:
    """Return λ: as given, by the rule, or "auto" to have :func:`prune` choose it by the rows."""
    if not isinstance(damping, str):
        return damping
    return DAMPING * _mean_square(rows, kept) if damping == "auto" else "auto"


def _block_sizes(block_size: int | str | None, lengths: Sequence[int], m: int) -> list[int] | None:
    """Return lengths of blocks, none of which lies across parameters."""
    if block_size is None:
        return None
    size = min(BLOCK_ROWS * m, BLOCK) if isinstance(block_size, str) else block_size
    return [min(size, n - start) for n in lengths for start in range(0, n, size)]


def _mean_square(rows: Any, kept: Tensor) -> float:
    """Return the mean square of the entries of kept weights."""
    total: float = 0.0
    for start, part in _slices(rows):
        inside = kept[start : start + part.shape[1]].to(part.device)
        total += float(part.square().sum(0, dtype=torch.float64)[inside].sum())
    number = max(int(kept.sum()), 1) * rows.shape[0]
    tiny = torch.finfo(torch.float32).tiny  # where all gradients are zero, any λ will do
    return float(max(total / number, tiny))


def _products(rows: Any, change: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Return G_l δ_l for every parameter l, each (m,)."""
    products = []
    start = 0
    for n in lengths:
        parts = [
            (part @ change[first : first + part.shape[1]].to(part)).double()
            for first, part in _slices(rows, start, start + n)
        ]
        products.append(torch.stack(parts).sum(0))
        start += n
    return products


def _slices(rows: Any, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield column slices in float32 at least, with their place."""
    stop = rows.shape[1] if stop is None else stop
    width = max(SLICE // rows.shape[0], 1)
    for first in range(start, stop, width):
        part = rows[:, first : min(first + width, stop)]
        part = torch.tensor(np.array(part)) if isinstance(part, np.ndarray) else part
        yield first, part.to(torch.promote_types(part.dtype, torch.float32))
