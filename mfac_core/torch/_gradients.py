"""The gradient of one batch after another, by plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfac_core import _validate as check
from mfac_core._progress import track
from mfac_core.torch import _batches
from mfac_core.torch._parameters import Choice, bare, chosen, with_gradient
from mfac_core.torch._sharding import Sharding, is_dtensor, local, local_vector
from mfac_core.torch._unchanged import unchanged

Loss = Callable[[Any, Any], Tensor]


def columns_of(model: torch.nn.Module, parameters: Choice | None) -> dict[str, Tensor]:
    """Return the parameters that are the columns, by name."""
    model = bare(model)
    if parameters is None:
        return with_gradient(model)
    return chosen(model, parameters, "parameters")


def dtype_argument(dtype: Any, name: str = "dtype") -> None:
    """Check a dtype for rows, which may be None."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        msg = f"{name} must be a real floating dtype of PyTorch, got {dtype!r}"
        raise TypeError(msg)


def refuse_sharded(columns: Mapping[str, Tensor]) -> None:
    """Refuse parameters of which each rank has a part."""
    name = next((name for name, p in columns.items() if is_dtensor(p)), None)
    if name is not None:
        msg = (
            f"model must have whole parameters, and {name!r} is a DTensor; do this before "
            "fully_shard, or use gradient_rows and the operators' reduce="
        )
        raise NotImplementedError(msg)


def rows_of_batches(
    model: torch.nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    columns: Mapping[str, Tensor],
    wanted: int | None,
    *,
    skip: int = 0,
    arrange: Callable[[Tensor], Tensor] = torch.flatten,
) -> Generator[tuple[Tensor, float]]:
    """Yield the gradient (d,) and the loss of each batch; ``arrange`` flattens a parameter's.

    Of a sharded model, what this rank has of it.
    """
    model = bare(model)
    parameters, every = list(columns.values()), list(model.parameters())
    device, dtype = parameters[0].device, common_dtype(parameters)
    sharded = any(map(is_dtensor, parameters))
    # Gradients of shards come about in the backward pass alone, when it has summed over ranks.
    backward = _by_backward if sharded else _by_autograd
    ranks = Sharding(parameters, None).reduce if sharded else None
    if ranks is not None and wanted is not None:
        number, total, squares = ranks(np.array([1.0, wanted, wanted**2]))
        if number * squares != total**2:
            msg = f"batches must be as many on every rank, got {wanted} here; give rows"
            raise ValueError(msg)
    with unchanged(model) as restore:
        for i, batch in enumerate(_batches.first(batches, wanted)):
            if i < skip:
                continue
            batch = _batches.moved(batch, device)
            with requiring_gradient(parameters):
                loss = scalar(loss_fn(model, batch), i)
                try:
                    parts = backward(loss, parameters, every)
                except RuntimeError as error:
                    if "checkpoint" not in str(error) or backward is _by_backward:
                        raise
                    backward = _by_backward
                    loss = scalar(loss_fn(model, batch), i)
                    parts = backward(loss, parameters, every)
            if not sharded and all(part is None for part in parts):
                msg = "loss_fn must return a loss that depends on the chosen parameters"
                raise ValueError(msg)
            row = torch.cat(
                [
                    arrange(
                        torch.zeros_like(local(p)) if part is None else local_vector(part, p)
                    ).to(device, dtype)
                    for part, p in zip(parts, parameters, strict=True)
                ]
            )
            bad = not bool(torch.isfinite(row).all())
            if ranks is not None:  # if one rank stops, all do
                bad = bool(ranks(np.array([float(bad)]))[0])
            if bad:
                raise _not_finite(i, row, columns)
            value = float(loss.detach())
            del parts, loss
            restore()
            yield row, value


@contextmanager
def requiring_gradient(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let parameters require a gradient, and gradients be computed, meanwhile."""
    flags = [(p, p.requires_grad) for p in parameters]
    with torch.inference_mode(False), torch.enable_grad():
        for p, _ in flags:
            p.requires_grad_(True)
        try:
            yield
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)


def scalar(loss: Any, i: int | None = None) -> Tensor:
    """Check a loss."""
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        got = (
            f"a {loss.dtype} tensor of shape {tuple(loss.shape)}"
            if isinstance(loss, torch.Tensor)
            else type(loss).__name__
        )
        msg = (
            f"loss_fn(model, batch) must return a scalar, the loss of the batch, got {got} "
            f"{'' if i is None else f'for batch {i}'}; return its mean"
        )
        raise TypeError(msg) if not isinstance(loss, torch.Tensor) else ValueError(msg)
    if torch.is_grad_enabled() and not loss.requires_grad:
        msg = (
            "loss_fn must return a loss that depends on the chosen parameters, got one without "
            "a graph; compute it without no_grad(), detach() or item()"
        )
        raise ValueError(msg)
    return loss.reshape(())


def bar(items: Iterable[Any], total: int | None, shown: bool) -> Iterator[Any]:
    """Go through rows behind a bar."""
    return track(items, "gradients", total) if shown else iter(items)


def common_dtype(parameters: Iterable[Tensor]) -> Any:
    """Return the dtype that holds the values of all."""
    return reduce(torch.promote_types, (p.dtype for p in parameters))


def _by_autograd(
    loss: Tensor, parameters: list[Tensor], every: list[Tensor]
) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


def _by_backward(
    loss: Tensor, parameters: list[Tensor], every: list[Tensor]
) -> list[Tensor | None]:
    """Go through ``grad`` of every parameter: reentrant checkpoints refuse the other way.

    What others have hung onto the accumulation of gradients, such as a step of an optimiser,
    must not run.
    """
    hooks = [p._post_accumulate_grad_hooks or {} for p in every]
    kept = [dict(each) for each in hooks]
    try:
        for p, each in zip(every, hooks, strict=True):
            p.grad = None
            each.clear()
        loss.backward()
        return [p.grad for p in parameters]
    finally:
        for p, each, before in zip(every, hooks, kept, strict=True):
            p.grad = None
            each.update(before)


def _not_finite(i: int, row: Tensor, columns: Mapping[str, Tensor]) -> check.NonFiniteError:
    parts = row.split([local(p).numel() for p in columns.values()])
    names = [n for n, x in zip(columns, parts, strict=True) if not bool(torch.isfinite(x).all())]
    names = names or ["what other ranks have"]
    more = ", ..." if len(names) > 3 else ""
    return check.NonFiniteError(
        f"gradients must be finite, got NaN or infinity for batch {i} in {', '.join(names[:3])}"
        f"{more}; look at that batch and its loss, or leave it out"
    )
