"""Batches of any structure: counted, measured and moved to a device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from mfac_core import _validate as check

Batch = Any


def number_of(batches: Iterable[Batch]) -> int | None:
    """Return how many batches there are, where they can tell."""
    if not isinstance(batches, Iterable):
        msg = (
            "batches must be iterable, such as a DataLoader or a list of batches, "
            f"got {type(batches).__name__}"
        )
        raise TypeError(msg)
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a loader of an iterable data set
        return None


def rows_argument(rows: int | None, batches: Iterable[Batch]) -> int | None:
    """Return how many rows to take, which must not be more than there are batches."""
    there = number_of(batches)
    if there == 0:
        msg = "batches must hold at least one batch, got none"
        raise ValueError(msg)
    wanted = there if rows is None else check.integer(rows, "rows", minimum=1)
    if there is not None and wanted is not None and wanted > there:
        raise ran_out(there, wanted)
    return wanted


def ran_out(taken: int, wanted: int) -> ValueError:
    """Return the error for fewer batches than rows."""
    return ValueError(
        f"batches ran out after {taken} of {wanted} rows, one for each batch; "
        "lower rows, or give more batches"
    )


def first(batches: Iterable[Batch], wanted: int | None) -> Iterator[Batch]:
    """Yield as many batches as are wanted, and fetch no more; all by default."""
    taken, source = 0, iter(batches)
    while taken != wanted:
        try:
            batch = next(source)
        except StopIteration:
            break
        yield batch
        taken += 1
    if taken == 0 or (wanted is not None and taken < wanted):
        raise ran_out(taken, max(wanted or 1, 1))


def moved(batch: Batch, device: Any) -> Batch:
    """Return a batch with its tensors on ``device``."""
    if hasattr(batch, "to"):  # tensors, packed sequences, encodings of a tokenizer
        return batch.to(device)
    return _rebuilt(batch, lambda part: moved(part, device))


def widened(batch: Batch) -> Batch:
    """Return a batch with its real floating tensors in float64."""
    if isinstance(batch, torch.Tensor):
        return batch.double() if batch.is_floating_point() else batch
    return _rebuilt(batch, widened)


def size_of(batch: Batch) -> int:
    """Return how many samples are in a batch: the length of its first tensor, 1 if none has one."""
    if isinstance(batch, torch.nn.utils.rnn.PackedSequence):
        return int(batch.batch_sizes[0])
    for tensor in tensors(batch):
        if tensor.ndim:
            return len(tensor)
    return 1


def tensors(batch: Batch) -> Iterator[Any]:
    """Yield the tensors of a batch."""
    if isinstance(batch, torch.Tensor):
        yield batch
        return
    found: list[Any] = []
    _rebuilt(batch, found.append)
    for part in found:
        yield from tensors(part)


def _rebuilt(batch: Batch, change: Callable[[Any], Any]) -> Batch:
    """Return a batch of the same structure with its direct parts changed."""
    if isinstance(batch, Mapping):
        parts = {key: change(value) for key, value in batch.items()}
        if type(batch) is dict:
            return parts
        changed: Any = copy.copy(batch)
        for key, value in parts.items():
            changed[key] = value
        return changed
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(change, batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map(change, batch))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        new = copy.copy(batch)
        for field in dataclasses.fields(batch):
            object.__setattr__(new, field.name, change(getattr(batch, field.name)))
        return new
    return batch
