"""Means and variances of batch normalisation, taken anew from batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

BatchNorm = torch.nn.modules.batchnorm._BatchNorm


def buffers(model: torch.nn.Module) -> list[Tensor]:
    """Return the tensors that hold statistics."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, BatchNorm)
        for buffer in module._buffers.values()
        if buffer is not None
    ]


def saved(model: torch.nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Return the statistics, each with a copy."""
    return [(buffer, buffer.clone()) for buffer in buffers(model)]


def put_back(copies: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set the statistics to the copies."""
    with torch.no_grad():
        for buffer, value in copies:
            buffer.copy_(value)


def re_estimate(
    model: torch.nn.Module, batches: Iterable[Any], run: Callable[[torch.nn.Module, Any], Any]
) -> None:
    """Set the statistics to their means over the batches; ``run`` calls the model on one.

    The model is in evaluation mode, and meanwhile batch normalisation alone is not, so that
    dropout draws nothing.
    """
    update_bn(((batch,) for batch in batches), _Caller(model, run))


class _Caller(torch.nn.Module):  # type: ignore[misc]  # torch has no types here
    """What ``update_bn`` calls with a batch: it looks for batch normalisation in its modules."""

    def __init__(self, model: torch.nn.Module, run: Callable[[torch.nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model, self._run, self.training = model, run, False

    def train(self, mode: bool = True) -> _Caller:
        """Set the mode of batch normalisation alone."""
        for module in self.model.modules():
            if isinstance(module, BatchNorm):
                module.train(mode)
        return self

    def forward(self, batch: Any) -> None:
        """Run the model, for its statistics alone."""
        self._run(self.model, batch)
