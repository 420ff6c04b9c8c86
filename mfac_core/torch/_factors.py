"""Gradients of the rows by one parameter, in whatever form is smallest, and their Gram matrices.

A linear layer's gradient is Σₜ bₜ ⊗ aₜ with its inputs a and what comes back to its outputs b,
over the T places where it is applied for a row. Then ⟨gᵢ, gⱼ⟩ = Σₜₜ' ⟨aᵢₜ, aⱼₜ'⟩⟨bᵢₜ, bⱼₜ'⟩: for
T = 1 the Gram matrix is (AAᵀ) ∘ (BBᵀ), and no gradient is formed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mfac_core._ops._blocks import GRAM_COLUMNS, column_slices
from mfac_core._ops._precision import full_float32

PRODUCT_BYTES = 1 << 25
"""Size of the products between places of rows that are summed at a time."""


@dataclass
class Full:
    """The gradients themselves."""

    g: Tensor
    """(rows, n)."""

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return int(self.g.numel() * self.g.element_size())

    def cross(self, other: Factor) -> Tensor:
        """Return the products with other rows, float64; sums over blocks of columns are, too."""
        g, h = self.g, dense(other)
        if g.element_size() < 4:
            g, h = g.float(), h.float()
        total = torch.zeros(len(g), len(h), dtype=torch.float64, device=g.device)
        with full_float32(g):
            for some in column_slices(g.shape[1], GRAM_COLUMNS):
                total += (g[:, some] @ h[:, some].T).double()
        return total

    def row(self, i: int) -> Tensor:
        """Return one gradient, flat."""
        return self.g[i]


@dataclass
class Outer:
    """Σₜ bₜ ⊗ aₜ."""

    a: Tensor
    """(rows, T, inputs)."""

    b: Tensor
    """(rows, T, outputs)."""

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return sum(int(x.numel() * x.element_size()) for x in (self.a, self.b))

    def cross(self, other: Factor) -> Tensor:
        """Return the products with other rows, in float64 throughout."""
        if not isinstance(other, Outer):
            return Full(self.full()).cross(other)
        return _over_places(self.b, other.b, lambda some: _products(self.a[some], other.a))

    def row(self, i: int) -> Tensor:
        """Return one gradient, flat."""
        return (self.b[i].T @ self.a[i]).reshape(-1)

    def full(self) -> Tensor:
        """Return all of them, (rows, outputs · inputs)."""
        return torch.einsum("rto,rti->roi", self.b, self.a).flatten(1)


@dataclass
class Lookup:
    """Σₜ e_{indexₜ} ⊗ bₜ, of a table."""

    index: Tensor
    """(rows, T)."""

    b: Tensor
    """(rows, T, width)."""

    length: int
    """Of the table."""

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return sum(int(x.numel() * x.element_size()) for x in (self.index, self.b))

    def cross(self, other: Factor) -> Tensor:
        """Return the products with other rows, in float64 throughout."""
        if not isinstance(other, Lookup):
            return Full(self.full()).cross(other)
        return _over_places(self.b, other.b, lambda some: _equal(self.index[some], other.index))

    def row(self, i: int) -> Tensor:
        """Return one gradient, flat."""
        table = self.b.new_zeros(self.length, self.b.shape[2])
        return table.index_add_(0, self.index[i], self.b[i]).reshape(-1)

    def full(self) -> Tensor:
        """Return all of them, (rows, length · width)."""
        return torch.stack([self.row(i) for i in range(len(self.b))])


@dataclass
class Tied:
    """The sum of a table's gradients as it is looked up, and as the weight of a linear layer."""

    table: Lookup
    layer: Outer

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return self.table.nbytes + self.layer.nbytes

    def cross(self, other: Factor) -> Tensor:
        """Return the products with other rows, in float64 throughout."""
        if not isinstance(other, Tied):
            return Full(self.full()).cross(other)
        return (
            self.table.cross(other.table)
            + self.layer.cross(other.layer)
            + _looked_up(self.table, other.layer)
            + _looked_up(other.table, self.layer).T
        )

    def row(self, i: int) -> Tensor:
        """Return one gradient, flat."""
        return self.table.row(i) + self.layer.row(i)

    def full(self) -> Tensor:
        """Return all of them, (rows, length · width)."""
        return self.table.full() + self.layer.full()


Factor: TypeAlias = Full | Outer | Lookup | Tied


def dense(factor: Factor) -> Tensor:
    """Return the gradients themselves, (rows, n)."""
    return factor.g if isinstance(factor, Full) else factor.full()


def outer(a: Tensor, b: Tensor) -> Outer | Full:
    """Return Σₜ bₜ ⊗ aₜ for a (rows, T, inputs) and b (rows, T, outputs), as what is smaller."""
    factor = Outer(a, b)
    _, places, inputs = a.shape
    return factor if is_smaller_outer(places, inputs, b.shape[2]) else Full(factor.full())


def is_smaller_outer(places: int, inputs: int, outputs: int) -> bool:
    """Whether two factors are smaller than their product."""
    return places * (inputs + outputs) < inputs * outputs


def added(factors: list[Factor]) -> Factor:
    """Return the sum of a parameter's gradients, of all the places where it is used."""
    if len(factors) == 1:
        return factors[0]
    layers = [f for f in factors if isinstance(f, Outer)]
    tables = [f for f in factors if isinstance(f, Lookup)]
    if len(layers) + len(tables) < len(factors):
        return Full(sum((dense(f) for f in factors[1:]), start=dense(factors[0])))
    a, b = (torch.cat([getattr(f, part) for f in layers], 1) if layers else None for part in "ab")
    if not tables:
        return outer(a, b)
    index, back = (torch.cat([getattr(f, part) for f in tables], 1) for part in ("index", "b"))
    table = Lookup(index, back, tables[0].length)
    return Tied(table, Outer(a, b)) if layers else table


def _looked_up(table: Lookup, layer: Outer) -> Tensor:
    """Return the products of rows of a table and rows of a layer: Σₜₜ' b'ₜ'[indexₜ] ⟨bₜ, a'ₜ'⟩."""

    def outputs(some: slice) -> Tensor:
        index = table.index[some]
        at = layer.b[:, :, index.flatten()].double()  # (j, t', i·t)
        return at.permute(2, 0, 1).view(*index.shape, *at.shape[:2])

    return _over_places(table.b, layer.a, outputs)


def _over_places(b: Tensor, other: Tensor, weights: Any) -> Tensor:
    """Return Σₜₜ' weights · ⟨bᵢₜ, bⱼₜ'⟩, shape (rows, other rows), some rows at a time."""
    places = b.shape[1] * other.shape[0] * other.shape[1]
    height = max(PRODUCT_BYTES // (8 * max(places, 1)), 1)
    parts = [
        (weights(some) * _products(b[some], other)).sum((1, 3))
        for some in column_slices(len(b), height)
    ]
    return torch.cat(parts)


def _products(x: Tensor, y: Tensor) -> Tensor:
    """Return ⟨xᵢₜ, yⱼₜ'⟩, shape (i, t, j, t'), in float64."""
    products = x.flatten(0, 1).double() @ y.flatten(0, 1).double().T
    return products.view(*x.shape[:2], *y.shape[:2])


def _equal(x: Tensor, y: Tensor) -> Tensor:
    return (x.flatten()[:, None] == y.flatten()).view(*x.shape, *y.shape)
