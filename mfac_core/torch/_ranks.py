"""A model on several ranks: rows of all, columns shared out, the same result everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mfac_core.torch._parameters import COMPILED


def group_of(model: torch.nn.Module) -> Any:
    """Return the process group of ``DistributedDataParallel``; None for a model on one rank."""
    model = getattr(model, "_modules", {}).get(COMPILED, model)
    return model.process_group if isinstance(model, DistributedDataParallel) else None


def agreed(rows: int, group: Any) -> int:
    """Return how many rows each rank has, which must be the same number."""
    counts = [None] * dist.get_world_size(group)
    dist.all_gather_object(counts, rows, group=group)
    if len(set(counts)) > 1:
        msg = f"batches must be as many on every rank, got {counts}; give rows"
        raise ValueError(msg)
    return rows


def share(d: int, group: Any) -> int:
    """Return how many columns this rank has, of parts that ``torch.tensor_split`` makes."""
    return len(torch.empty(d, device="meta").tensor_split(dist.get_world_size(group))[_rank(group)])


def exchanged(row: Tensor, group: Any) -> Tensor:
    """Return this rank's columns of the rows that all ranks have, one of each, (R, d_r)."""
    parts = row.tensor_split(dist.get_world_size(group))
    mine = [torch.empty_like(parts[_rank(group)]) for _ in parts]
    for source in range(len(parts)):
        for target, part in enumerate(parts):
            if source == target == _rank(group):
                mine[source].copy_(part)
            elif _rank(group) == source:
                dist.send(part.contiguous(), dist.get_global_rank(group, target), group=group)
            elif _rank(group) == target:
                dist.recv(mine[source], dist.get_global_rank(group, source), group=group)
    return torch.stack(mine)


def all_rows(rows: Any, group: Any) -> Any:
    """Return the rows of all ranks, in the order of ranks; those given where there is but one."""
    if group is None:
        return rows
    if isinstance(rows, np.ndarray):
        msg = "storage must be 'device' or 'host' where a model is on several ranks, got a file"
        raise ValueError(msg)
    agreed(len(rows), group)
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, rows, group=group)
    return torch.cat(parts)


def mean(value: float, weight: float, group: Any) -> float:
    """Return the weighted mean over ranks."""
    if group is None:
        return value
    pairs: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(pairs, (value, weight), group=group)
    values, weights = zip(*pairs, strict=True)
    return float(np.average(values, weights=weights))


def same(tensors: Iterable[Tensor], group: Any) -> None:
    """Give tensors the values of the first rank."""
    if group is not None:
        for tensor in tensors:
            dist.broadcast(tensor, dist.get_global_rank(group, 0), group=group)


def _rank(group: Any) -> int:
    return int(dist.get_rank(group))
