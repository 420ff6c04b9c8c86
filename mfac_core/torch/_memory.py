"""The flat memory of the optimiser, and its parts by parameter.

One window holds the gradients of all parameters side by side. Everything d-sized is one flat array,
in which each parameter has its columns; the parts in the parameters' shapes are views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mfac_core._arrays import array_namespace
from mfac_core._operators.sliding import SlidingInverseFisher
from mfac_core._operators.sparse import SparseSlidingInverseFisher
from mfac_core._rows.base import Reduce
from mfac_core._rows.ring import ArrayRing
from mfac_core._rows.shared_ring import SharedRing
from mfac_core._scale_free import shape_of_units
from mfac_core.torch._sharding import (
    Sharding,
    as_pairs,
    is_dtensor,
    is_flattened,
    length_of_units,
    local,
)
from mfac_core.torch._units import Units, UnitWise


class Flat:
    """A vector with an element for each weight, and its parts in the parameters' shapes.

    The parts are views made once: making them in each step takes as long as what is done to them.
    """

    def __init__(self, vector: Tensor, columns: Sequence[slice], shapes: Sequence[Any]) -> None:
        self.vector = vector
        self.parts = [vector[c].view(s) for c, s in zip(columns, shapes, strict=True)]


class Memory:
    """A window for some parameters, with its velocity and room to work in.

    Parameters
    ----------
    params : sequence of torch.Tensor
        The parameters that have columns.
    window_size, damping, density, reduce : optional
        Of the window; without ``damping`` it takes gradients of length 1, see :class:`MFAC`.
    dtype, device : torch.dtype, torch.device
        Of the window.
    wide : torch.dtype
        Of what is not kept in the window.
    ridge : float
        mλ of a window of gradients of length 1.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        *,
        window_size: int,
        damping: float | None,
        density: float | None,
        dtype: Any,
        device: Any,
        wide: Any,
        ridge: float,
        reduce: Reduce | None,
    ) -> None:
        self.params, self.scale_free = list(params), damping is None
        self.numbers = {p: i for i, p in enumerate(self.params)}
        self.sharding = Sharding(self.params, reduce)
        self.shapes = [as_pairs(local(p)).shape for p in self.params]
        self.columns, counted = _columns(self.shapes, self.sharding.counted)
        d = max((c.stop for c in self.columns), default=counted)
        sizes = [float(shape.numel()) for shape in self.shapes]
        sums, total = self.sharding.totals(torch.tensor([sizes], dtype=torch.float64))
        self.sizes: list[float] = sums[0].tolist()
        """Elements of each parameter, on all ranks together."""
        self.size = float(total)
        """Elements of all parameters."""

        options: dict[str, Any] = {"reduce": self.sharding.reduce}
        if damping is not None:
            options["damping"] = damping
        else:  # the divisor changes only F's scale, and one that grew would cost O(m³) a step
            options |= {"damping": ridge / window_size, "normalization": "window"}
        self.rows: Tensor | None = None
        """The flat window, (m, d); None where it is sparse."""
        if density is not None:
            if any(is_dtensor(p) or is_flattened(p) for p in self.params):
                msg = (
                    "density needs parameters that are whole on their rank, as it compresses each "
                    "rank's columns by themselves; leave it out for DTensors and FSDP"
                )
                raise ValueError(msg)
            options |= {"dtype": dtype, "xp": array_namespace(torch.empty(0)), "device": device}
            self.window: SlidingInverseFisher = SparseSlidingInverseFisher(
                d, window_size, density=density, **options
            )
        else:
            self.window = SlidingInverseFisher(d, window_size, **options)
            self.rows = torch.zeros((window_size, d), dtype=dtype, device=device)
            if self.sharding.replicates:
                ring: ArrayRing = SharedRing(self.rows, counted, self.sharding.reduce)
            else:
                ring = ArrayRing(self.rows, self.sharding.reduce)
            self.window._work_in(ring)
        self.wide = wide
        self.work = self.vector(wide)
        """The gradient, then the direction of a step: it holds nothing between them."""
        self.velocity: Flat | None = None
        self.units: UnitWise | None = None
        """The inverses of the scale-free step; None where the window's own is asked instead."""
        if self.rows is not None and self.scale_free:
            self.units = self._unit_wise()
        self.step = torch.zeros((), dtype=torch.int64)
        """How many gradients the window has been given; one number, shared by all states."""
        self.known_steps = 0
        """How many of them the window's own Gram was computed after."""
        self.published: list[Tensor | None] = []
        """What the optimizer's state holds of the rows, by parameter."""

    def vector(self, dtype: Any) -> Flat:
        """Return zeros beside the window."""
        zeros = torch.zeros(self.window.num_params, dtype=dtype, device=self.window.device)
        return Flat(zeros, self.columns, self.shapes)

    def rows_of(self, i: int) -> Tensor:
        """Return the rows of parameter i, (m, *shape): a view."""
        assert self.rows is not None
        return self.rows[:, self.columns[i]].view(len(self.rows), *self.shapes[i])

    def _unit_wise(self) -> UnitWise:
        """Return the inverses of the units of an empty window."""
        m = self.window.window_size
        units = []
        for i, p in enumerate(self.params):
            rows = self.rows_of(i).view(m, *shape_of_units(self.shapes[i]))
            units.append(Units(rows, self.wide, *length_of_units(p)))
        return UnitWise(units, self.sharding.cuts)

    def by_unit(self, i: int) -> Tensor:
        """Return the part of ``work`` that is of parameter i, a row a unit: a view."""
        return self.work.parts[i].view(shape_of_units(self.shapes[i]))

    def squares(self) -> tuple[Tensor, Tensor]:
        """Return ‖·‖² of the parts of ``work``, and of all of it, over all ranks, in float64."""
        parts = self.work.parts
        norms = torch._foreach_norm(parts, dtype=torch.float64) if parts else []
        squares = torch.stack(norms).square() if norms else self._no_numbers()
        sums, total = self.sharding.totals(squares[None])
        return sums[0], total[0]

    def squares_and_counts(self) -> tuple[Tensor, Tensor]:
        """Return ‖·‖² of the parts of ``work`` and how many elements of each are not zero."""
        parts, vector = self.work.parts, self.work.vector
        if not parts:
            squares = counts = self._no_numbers()
        else:
            squares = torch.stack(torch._foreach_norm(parts, dtype=torch.float64)).square()
            if vector.is_cpu and int(torch.count_nonzero(vector)) == len(vector):
                # One look is cheap; a device would wait.
                counts = squares.new_tensor([float(part.numel()) for part in parts])
            else:
                counts = torch.stack([torch.count_nonzero(part) for part in parts]).double()
        sums = self.sharding.sums(torch.stack([squares, counts]))
        return sums[0], sums[1]

    def _no_numbers(self) -> Tensor:
        return torch.zeros(0, dtype=torch.float64, device=self.work.vector.device)


def _columns(shapes: Sequence[Any], counted: Sequence[bool]) -> tuple[list[slice], int]:
    """Place parameters side by side, those first that this rank counts; and say how many columns.

    Where it counts none there is one column in front that stays zero: a window is never empty.
    """
    columns: list[slice] = [slice(0, 0)] * len(shapes)
    sizes = [shape.numel() for shape in shapes]
    stop = int(not any(n for n, c in zip(sizes, counted, strict=True) if c))
    first = stop
    for wanted in (True, False):
        for i, size in enumerate(sizes):
            if counted[i] == wanted:
                columns[i] = slice(stop, stop + size)
                stop += size
        first = stop if wanted else first
    return columns, first
