"""Gram matrices of a model's gradients, layer by layer, from tiles of batches within a budget."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from mfac_core._rows import tiles
from mfac_core.torch._factors import Factor, Full, added
from mfac_core.torch._layers import Recorder
from mfac_core.torch._losses import Losses, Values, backward

REST = "*"
"""Name of the gradients by all parameters that no layer explains, side by side."""


class LayerGrams:
    """Products of rows by what goes into the layers and what comes back to them.

    Parameters
    ----------
    losses : Losses
        Of the rows.
    columns : mapping of str to torch.nn.Parameter
        The parameters, by name.
    memory : int
        Twice what factors may take while others pass by them, in bytes.
    dtype : torch.dtype
        Of rows that are computed one by one.
    """

    def __init__(
        self, losses: Losses, columns: Mapping[str, Tensor], memory: int, dtype: Any
    ) -> None:
        self._losses, self._memory, self._dtype = losses, memory, dtype
        self._names = list(columns)
        self._device = next(iter(columns.values())).device
        self._recorder = Recorder(losses.model, columns)
        self.stops_gradients = self._recorder.stops_gradients
        self.rest: list[str] | None = None
        """The parameters that no layer explains; None until a batch has been seen."""

    def gram(self) -> Tensor:
        """Return G Gᵀ, float64."""
        m = len(self._losses.recorded)
        gram = torch.zeros(m, m, dtype=torch.float64, device=self._device)
        batches = len(self._losses.slices)
        for rows, held, at, factors in tiles.pairs(self._passes, batches, _size, self._memory):
            block = self._block(held, factors)
            gram[rows, at], gram[at, rows] = block, block.T
        return (gram + gram.T) / 2

    def cross(self, other: LayerGrams) -> Tensor:
        """Return G Hᵀ for the rows H of the other, float64."""
        self._agree_on_rest(other)
        shape = len(self._losses.recorded), len(other._losses.recorded)
        products = torch.zeros(shape, dtype=torch.float64, device=self._device)
        crossings = tiles.crossings(self._passes, other._passes, _size, self._memory)
        for at, factors, columns, others in crossings:
            products[at, columns] = self._block(factors, others)
        return products

    def _passes(self, start: int) -> Generator[tuple[int, slice, dict[str, Factor]]]:
        with closing(self._losses.each(start)) as each:
            for i, at, batch in each:
                yield i, at, self._factors(batch, at)

    def explain_nothing(self) -> bool:
        """Compute all rows one by one from now on; whether that is a change."""
        before, self.rest = self.rest, self._names
        return before != self._names

    def _agree_on_rest(self, other: LayerGrams) -> None:
        for grams in (self, other):
            if grams.rest is None:
                with closing(grams._losses.each()) as each:
                    _, at, batch = next(each)
                    grams._factors(batch, at)
        rest = {*(self.rest or []), *(other.rest or [])}
        self.rest = other.rest = [name for name in self._names if name in rest]

    def _block(self, factors: dict[str, Factor], others: dict[str, Factor]) -> Tensor:
        return sum(f.cross(others[n]).to(self._device) for n, f in factors.items())

    def _factors(self, batch: Any, at: slice) -> dict[str, Factor]:
        """Return the gradients of a batch's rows by name of the parameter, rest side by side."""
        values, rows = self._losses.leaves(), at.stop - at.start
        with torch.enable_grad(), self._recorder.recording() as (calls, lost):
            losses = self._losses.rows(values, batch)
        self._losses.check(at, losses, batch)
        summed = backward(losses, values, torch.ones_like(losses), keep=True)
        found: dict[str, list[Factor]] = {}
        skipped = lost if self.rest is None else {*self.rest}
        for call in calls:
            owned = {*self._recorder.owned[call.module].values()}
            if call.back is None or not owned - skipped:
                continue
            try:
                for name, factor in self._recorder.factors(call, rows, values):
                    found.setdefault(name, []).append(factor)
            except Exception as error:  # no vectorised form, samples that are not apart, ...
                if self.rest is not None or isinstance(error, torch.OutOfMemoryError):
                    raise
                lost.update(owned)
        used = {n for n, part in zip(values, summed, strict=True) if part is not None}
        if self.rest is None:
            self.rest = self._unexplained(found, lost, losses, values, used)
        result = {n: added(f) for n, f in found.items() if n not in self.rest}
        for name in values.keys() - {*self.rest} - result.keys():  # of no effect on these losses
            result[name] = Full(values[name].new_zeros(rows, values[name].numel()))
        if self.rest:
            result[REST] = Full(self._one_by_one(losses, values, self.rest, summed))
        return result

    def _unexplained(
        self,
        found: dict[str, list[Factor]],
        lost: set[str],
        losses: Tensor,
        values: Values,
        used: set[str],
    ) -> list[str]:
        """Return the parameters whose gradients are not what the layers say, on two rows."""
        wrong = {n for n in values if n in lost or (n not in found and n in used)}
        for i in {0, len(losses) - 1}:
            unit = torch.zeros_like(losses)
            unit[i] = 1.0
            parts = backward(losses, values, unit, keep=True)
            size = sum(float(p.norm()) ** 2 for p in parts if p is not None) ** 0.5
            for (name, value), part in zip(values.items(), parts, strict=True):
                if name in wrong or name not in found:
                    continue
                expected = value.new_zeros(value.numel()) if part is None else part.reshape(-1)
                try:
                    row = added(found[name]).row(i)
                    error = float((row - expected).norm())
                except RuntimeError:  # of another shape, or gradients that would not fit
                    error = float("inf")
                if not error <= self._losses.tolerance() * max(float(expected.norm()), 1e-3 * size):
                    wrong.add(name)
        return [name for name in values if name in wrong]

    def _one_by_one(
        self, losses: Tensor, values: Values, names: list[str], summed: tuple[Tensor | None, ...]
    ) -> Tensor:
        """Return gradients by some parameters, (rows, their number), by a backward pass each."""
        if len(losses) == 1:
            all_parts = dict(zip(values, summed, strict=True))
            rows = [[all_parts[name] for name in names]]
        else:
            some = {name: values[name] for name in names}
            rows = []
            for i in range(len(losses)):
                unit = torch.zeros_like(losses)
                unit[i] = 1.0
                rows.append(list(backward(losses, some, unit, keep=i + 1 < len(losses))))
        return torch.stack(
            [
                torch.cat(
                    [
                        (torch.zeros_like(values[n]) if p is None else p)
                        .reshape(-1)
                        .to(self._dtype)
                        for n, p in zip(names, row, strict=True)
                    ]
                )
                for row in rows
            ]
        )


def _size(factors: dict[str, Factor]) -> int:
    return sum(factor.nbytes for factor in factors.values())
