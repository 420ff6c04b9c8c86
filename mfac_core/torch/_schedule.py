"""The whole way from a trained model to a pruned one, in one call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypedDict, Unpack

import torch

from mfac_core import _validate as check
from mfac_core._progress import track
from mfac_core._typing import Update
from mfac_core.pruning import exponential_schedule
from mfac_core.torch._gradients import Loss
from mfac_core.torch._parameters import Choice
from mfac_core.torch._pruner import Pruner
from mfac_core.torch._solve import BlockSizeChoice, DampingChoice, LayersChoice


class Options(TypedDict, total=False):
    """Arguments of :class:`Pruner`."""

    parameters: Choice | None
    exclude: Choice | None
    pattern: str | None
    layers: LayersChoice
    rows: int | None
    damping: DampingChoice
    block_size: BlockSizeChoice
    update: Update
    storage: str | os.PathLike[str] | None
    dtype: torch.dtype | None


def prune_model(
    model: torch.nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    sparsity: float,
    *,
    steps: int = 16,
    finetune: Callable[[torch.nn.Module], Any] | None = None,
    progress: bool = False,
    **options: Unpack[Options],
) -> Pruner:
    """Prune a model in place step by step, with fresh gradients for each step.

    Parameters
    ----------
    model : torch.nn.Module
        A trained model.
    loss_fn : callable
        ``loss_fn(model, batch)`` returns the loss of a batch, a scalar.
    batches : iterable
        See :class:`Pruner`; gone through once for each step.
    sparsity : float
        Share of the weights removed in the end, in [0, 1).
    steps : int, default 16
        How many steps; each removes the same share of the weights that are left.
    finetune : callable, optional
        Called with the model after every step, to train it for a while under its masks; what it
        returns is not looked at.
    progress : bool, default False
        Show a bar over the steps, where tqdm is installed.
    **options
        As for :class:`Pruner`.

    Returns
    -------
    Pruner
        With ``report()``, ``masks`` and ``finalize()``.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its form, and what :meth:`Pruner.step` raises. After an error the
        model is as the last whole step and its training left it.

    Examples
    --------
    >>> import torch
    >>> from mfac_core.torch import prune_model
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(8, 4)
    >>> batches = [torch.randn(16, 8) for _ in range(10)]
    >>> pruner = prune_model(model, lambda m, x: m(x).square().mean(), batches, 0.75, steps=4)
    >>> int(pruner.masks["weight"].sum())
    8
    """
    check.integer(steps, "steps", minimum=1)
    if isinstance(batches, Iterator) and steps > 1:
        msg = (
            "batches must be such as can be gone through once for each step, a DataLoader or a "
            f"list, got the iterator {type(batches).__name__}"
        )
        raise TypeError(msg)
    if finetune is not None and not callable(finetune):
        msg = f"finetune must be a function of the model, got {type(finetune).__name__}"
        raise TypeError(msg)
    pruner = Pruner(model, loss_fn, batches, **options)
    shares = exponential_schedule(sparsity, steps)
    for share in track(shares, "pruning") if progress else shares:
        pruner.step(share)
        if finetune is not None:
            finetune(model)
    return pruner
