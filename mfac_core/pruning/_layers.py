"""Layers: stretches of the weights with a shape, or a length alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mfac_core import _validate as check


class Layer(NamedTuple):
    """One layer.

    Attributes
    ----------
    part : slice
        Its weights.
    shape : tuple of int or None
        As the parameter has it; None where only the length is known.
    """

    part: slice
    shape: tuple[int, ...] | None

    @property
    def size(self) -> int:
        """Number of weights."""
        return int(self.part.stop - self.part.start)

    @property
    def is_vector(self) -> bool:
        """Whether it is known to be a bias, a scale of a norm, or a number: not to be pruned."""
        return self.shape is not None and len(self.shape) < 2


class LayerShare(NamedTuple):
    """What pruning has left of a layer.

    Attributes
    ----------
    shape : tuple of int
        As given, or the length.
    size : int
        Number of weights.
    kept : int
        How many of them are kept.
    sparsity : float
        Share of them that is removed.
    dense : int
        How many of them the pattern could not take: those of one-dimensional shapes, what "N:M"
        leaves over where M does not divide axis 1, and groups of negative label.
    """

    shape: tuple[int, ...]
    size: int
    kept: int
    sparsity: float
    dense: int


def layers_argument(layers: Sequence[Any] | None, d: int) -> list[Layer]:
    """Check lengths or shapes that sum to d; one layer of that length by default."""
    if layers is None:
        return [Layer(slice(0, d), None)]
    shapes = check.layer_shapes(layers, d)
    stops = np.cumsum([math.prod(shape) for shape in shapes])
    return [
        Layer(slice(int(stop) - math.prod(shape), int(stop)), shape if known else None)
        for shape, stop, known in zip(
            shapes, stops, (isinstance(given, Sequence) for given in layers), strict=True
        )
    ]
