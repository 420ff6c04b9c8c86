"""Derivatives of a model's losses in a direction, by the first way that the model allows."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from mfac_core.torch._losses import Losses, Values, backward


class Directions:
    """Products of the rows of a batch with a vector of their columns.

    By forward mode; or by the derivative of Gᵀc with respect to c, twice backward; or, where an
    operation knows neither, by a backward pass for each row.

    Parameters
    ----------
    losses : Losses
        Of the rows.
    has_forward_mode : bool
        Whether forward mode is to be tried.
    """

    def __init__(self, losses: Losses, *, has_forward_mode: bool) -> None:
        self._losses = losses
        self._first = 0 if has_forward_mode else 1

    @property
    def has_forward_mode(self) -> bool:
        """Whether forward mode is what is used."""
        return self._first == 0

    @has_forward_mode.setter
    def has_forward_mode(self, value: bool) -> None:
        self._first = 0 if value else max(self._first, 1)

    def along(self, values: Values, direction: Values, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the losses of a batch, and their derivative in a direction."""
        errors: list[Exception] = []
        for way in (self._forward, self._twice_backward, self._row_by_row)[self._first :]:
            try:
                found = way(values, direction, batch)
            except torch.OutOfMemoryError:
                raise
            except (NotImplementedError, RuntimeError) as error:
                errors.append(error)
            else:
                self._first += len(errors)
                return found
        raise errors[0]  # not of the ways, but of the model

    def _forward(self, values: Values, direction: Values, batch: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), warnings.catch_warnings():
            # What PyTorch compiles when forward mode is first used it deprecates itself.
            warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
            return torch.func.jvp(  # type: ignore[no-any-return]
                lambda values: self._losses.rows(values, batch), (values,), (direction,)
            )

    def _twice_backward(self, _: Values, direction: Values, batch: Any) -> tuple[Tensor, Tensor]:
        leaves = self._losses.leaves()
        with torch.enable_grad():
            losses = self._losses.rows(leaves, batch)
            c = torch.zeros_like(losses, requires_grad=True)
            parts = backward(losses, leaves, c, create_graph=True)
            (along,) = torch.autograd.grad(_inner(parts, direction, losses), c)
        return losses, along

    def _row_by_row(self, _: Values, direction: Values, batch: Any) -> tuple[Tensor, Tensor]:
        leaves = self._losses.leaves()
        with torch.enable_grad():
            losses = self._losses.rows(leaves, batch)
        units = torch.eye(len(losses), dtype=losses.dtype, device=losses.device)
        rows = (backward(losses, leaves, unit, keep=True) for unit in units)
        return losses, torch.stack([_inner(row, direction, losses) for row in rows])


def _inner(parts: tuple[Tensor | None, ...], direction: Values, losses: Tensor) -> Tensor:
    pairs = zip(parts, direction.values(), strict=True)
    products = ((p * x).sum().to(losses) for p, x in pairs if p is not None)
    return sum(products, start=losses.new_zeros(()))
