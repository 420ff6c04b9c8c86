"""The inverse of the unit-wise Fisher of a window: a block for each unit of each parameter.

A unit is a slice along a parameter's first dimension: a neuron of a linear layer, a filter of a
convolution; a vector is one. Gradients enter a unit's block at length 1, so that its Fisher, but
for its scale, is C = ridge·I + Σ ûᵢûᵢᵀ over the window's m gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mfac_core._scale_free import RIDGE

Sum = Callable[[Tensor], Tensor]

CAST = 2**22
"""Elements of a window in another dtype that are cast at a time."""


class Units:
    """The units of one parameter: the window's rows, and the inverses of the blocks.

    With units of c elements the inverse is that of C itself for c ≤ m, else that of the dual
    A = ridge·I + ÛÛᵀ, by which C⁻¹ûⱼ = ÛᵀA⁻¹eⱼ. Either is brought up to date by what a row that is
    exchanged changes, of rank two. As all eigenvalues of C and A are between ridge and ridge + m,
    errors of rounding do not grow: each row that is exchanged takes its own along.

    Parameters
    ----------
    rows : torch.Tensor, shape (m, u, c)
        The window's gradients of u units, a view.
    wide : torch.dtype
        Of the inverses, and of what is computed.
    length : int, optional
        Elements of a unit on all ranks together; not known of the flat parts of FSDP's first
        version, which go by the dual.
    columns : torch.Tensor, optional
        Which of them this rank has; all by default.
    """

    def __init__(
        self, rows: Tensor, wide: torch.dtype, length: int | None, columns: Tensor | None = None
    ) -> None:
        m, u, _ = rows.shape
        self._rows, self._columns = rows, columns
        self._by_dual = length is None or length > m
        k = m if length is None else min(length, m)
        unit = torch.eye(k, dtype=wide, device=rows.device) / RIDGE
        self.inverse = unit.repeat(u, 1, 1)
        """A⁻¹ or C⁻¹ of each unit, (u, m, m) or (u, c, c)."""
        self._scales = torch.zeros((m, u), dtype=wide, device=rows.device)
        """What brings each stored row to length 1; 0 for a row that is not there, or zero."""

    def write(self, slot: int, g: Tensor | None) -> Tensor:
        """Put the units' gradients, (u, c), into a row, or take those there; return ‖·‖², (u,)."""
        row = self._rows[slot]
        if not self._by_dual:
            self._leaving = self._spread(self._unit(row, slot))
        if g is not None:
            row.copy_(g)
        return torch.linalg.vector_norm(row, dim=1, dtype=torch.float64).square_()

    def measure(self, slot: int, squares: Tensor) -> None:
        """Take the sums over ranks of what :meth:`write` returned."""
        lengths = squares.sqrt().to(self._scales.dtype)
        there = lengths > torch.finfo(lengths.dtype).tiny
        self._lengths = torch.where(there, lengths, 0.0)
        self._scales[slot] = torch.where(there, 1.0 / lengths, 0.0)

    def project(self, slot: int) -> Tensor:
        """Return what is to be summed over ranks, of a row that has been written.

        Its products with the others, all at length 1, (u, m); or, without the dual, the row that
        leaves beside the one that enters, (u, 2c).
        """
        entering = self._unit(self._rows[slot], slot)
        if not self._by_dual:
            return torch.cat([self._leaving, self._spread(entering)], dim=1)
        products = [
            torch.bmm(entering[units, None, :], rows.mT)[:, 0] for units, rows in self._stretches()
        ]
        return torch.cat(products) * self._scales.T

    def direction(self, slot: int, found: Tensor) -> Tensor:
        """Bring the inverses up to date; return F⁻¹g but for its scale, (u, c)."""
        if self._by_dual:
            c = self._exchange(slot, found) * self._scales.T
            y = torch.cat(
                [torch.bmm(c[units, None, :], rows)[:, 0] for units, rows in self._stretches()]
            )
        else:
            y = self._turn(*found.chunk(2, dim=1))
            y = y if self._columns is None else y[:, self._columns]
        return y * self._lengths[:, None]

    def _exchange(self, slot: int, products: Tensor) -> Tensor:
        """Exchange a row and column of A: delete by K − kkᵀ/kⱼ, insert by the Schur complement."""
        inverse = self.inverse
        k = inverse[:, :, slot] / inverse[:, slot, slot, None].sqrt()
        corner = products[:, slot] + RIDGE
        b = products.clone()
        b[:, slot] = 0.0
        w = _times(inverse, b) - k * (k * b).sum(dim=1, keepdim=True)
        schur = (corner - (b * w).sum(dim=1)).clamp_min(RIDGE)  # in exact arithmetic it is
        w[:, slot] = -1.0
        w /= schur.sqrt()[:, None]
        inverse.baddbmm_(torch.stack([-k, w], dim=2), torch.stack([k, w], dim=1))
        column = w / -schur.sqrt()[:, None]
        inverse[:, :, slot] = column
        inverse[:, slot, :] = column
        return column

    def _turn(self, old: Tensor, new: Tensor) -> Tensor:
        """Exchange a row by C itself, and return C⁻¹û."""
        q, h = _times(self.inverse, old), _times(self.inverse, new)
        left = (1.0 - (old * q).sum(dim=1, keepdim=True)).clamp_min(RIDGE / (1.0 + RIDGE))
        q /= left.sqrt()
        h += q * (q * new).sum(dim=1, keepdim=True)
        added = 1.0 + (new * h).sum(dim=1, keepdim=True)
        y = h / added
        h /= added.sqrt()
        self.inverse.baddbmm_(torch.stack([q, -h], dim=2), torch.stack([q, h], dim=1))
        return y

    def _unit(self, row: Tensor, slot: int) -> Tensor:
        return row.to(self._scales.dtype) * self._scales[slot][:, None]

    def _spread(self, x: Tensor) -> Tensor:
        """Return a row with zeros where other ranks have columns."""
        if self._columns is None:
            return x
        whole = x.new_zeros((len(x), self.inverse.shape[1]))
        whole[:, self._columns] = x
        return whole

    def _stretches(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield some units, and their rows (·, m, c) in the wide dtype."""
        m, u, c = self._rows.shape
        by_unit, step = self._rows.permute(1, 0, 2), u
        if self._rows.dtype != self._scales.dtype:
            step = max(1, CAST // max(m * c, 1))
        for start in range(0, max(u, 1), max(step, 1)):
            units = slice(start, start + step)
            yield units, by_unit[units].to(self._scales.dtype)


class UnitWise:
    """The units of all parameters of a window, exchanged together.

    Parameters
    ----------
    units : sequence of Units
        One for each parameter.
    sums : sequence of (list of int, callable)
        Numbers of the parameters whose units are cut over some ranks, and the sum over these.
    """

    def __init__(self, units: Sequence[Units], sums: Sequence[tuple[list[int], Sum]]) -> None:
        self.units, self._sums = list(units), sums

    def exchange(self, slot: int, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Put a gradient into a row, and return the direction F⁻¹g of each parameter, (u, c).

        Parameters
        ----------
        slot : int
            The row.
        gradients : sequence of torch.Tensor, shape (u, c), or None
            By parameter; None for what the row holds already, and the inverses do not know yet.
        """
        self._measure(slot, gradients)
        products = self._summed([units.project(slot) for units in self.units])
        return [units.direction(slot, x) for units, x in zip(self.units, products, strict=True)]

    def restore(self, inverses: Sequence[Tensor], slots: Sequence[int]) -> None:
        """Take up the inverses for rows that are there."""
        for units, inverse in zip(self.units, inverses, strict=True):
            units.inverse.copy_(inverse)
        for slot in slots:
            self._measure(slot, [None] * len(self.units))

    def replay(self, slots: Sequence[int]) -> None:
        """Compute the inverses of rows that are there, oldest first, from those of none."""
        for slot in slots:
            self.exchange(slot, [None] * len(self.units))

    def _measure(self, slot: int, gradients: Sequence[Tensor | None]) -> None:
        pairs = zip(self.units, gradients, strict=True)
        squares = self._summed([units.write(slot, g) for units, g in pairs])
        for units, x in zip(self.units, squares, strict=True):
            units.measure(slot, x)

    def _summed(self, parts: list[Tensor]) -> list[Tensor]:
        for numbers, total in self._sums:
            flat = total(torch.cat([parts[i].flatten() for i in numbers]))
            pieces = flat.split([parts[i].numel() for i in numbers])
            for i, piece in zip(numbers, pieces, strict=True):
                parts[i] = piece.view_as(parts[i])
        return parts


def _times(a: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(x[:, None, :], a)[:, 0]  # each is symmetric
