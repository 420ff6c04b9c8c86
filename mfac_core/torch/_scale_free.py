"""The scale-free step: gradients of length 1 in, steps of one size and even ones out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mfac_core._operators.guard import uninterrupted
from mfac_core._scale_free import FAINT
from mfac_core.torch._memory import Memory
from mfac_core.torch._orthogonal import evened
from mfac_core.torch._sharding import local_vector, whole

LARGEST_EXPONENT = 100
"""Of a length that numbers in float32 can be divided by without leaving it."""


def normalise(g: Tensor, length: float) -> None:
    """Divide g by its length, also where that or its inverse is outside of float32."""
    exponent = math.frexp(length)[1]
    if abs(exponent) > LARGEST_EXPONENT:
        half = 2.0 ** (-exponent // 2)
        g.mul_(half)
        length *= half
    g.div_(length)


def precondition(memory: Memory, slot: int) -> None:
    """Put the gradient into a row of the window, and its direction F⁻¹g in its place."""
    assert memory.units is not None
    parts = [memory.by_unit(i) for i in range(len(memory.params))]
    # A row and its inverses change together; but ranks that wait must be free to be stopped.
    with uninterrupted() if memory.sharding.alone else contextlib.nullcontext():
        directions = memory.units.exchange(slot, parts)
    for part, y in zip(parts, directions, strict=True):
        part.copy_(y)


def prominence(memory: Memory, squares: Tensor, total: float) -> Tensor:
    """Return min(1, r/FAINT) for each parameter, r its gradient's rms beside the whole's."""
    sizes = squares.new_tensor(memory.sizes).clamp_min(1.0)
    ratios = (squares / sizes * (memory.size / total)).sqrt()
    return (ratios / FAINT).clamp_max(1.0)


def bring_to_size(memory: Memory, sizes: Tensor) -> None:
    """Scale each parameter's part of the direction to a root mean square, over what is not zero."""
    if not memory.params:
        return
    squares, counts = memory.squares_and_counts()
    scales = torch.where(squares > 0.0, (counts / squares).sqrt() * sizes, 0.0)
    dtype = memory.work.vector.dtype
    scales = scales.clamp_max(torch.finfo(dtype).max).to(dtype)
    torch._foreach_mul_(memory.work.parts, scales.unbind())


def even_matrices(parts: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """Return parameters' steps, this rank's parts of them, with matrices' singular values equal."""
    pairs = zip(parts, params, strict=True)
    return [local_vector(evened(whole(x, p)), p) if p.ndim > 1 else x for x, p in pairs]
