"""Steps of matrices that go as far in every direction."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from mfac_core._scale_free import NEWTON_SCHULZ


def evened(x: Tensor) -> Tensor:
    """Return x with its singular values made about equal, at the length that x has.

    Elements that are exactly zero stay so; those that are far below rounding beside the whole, as
    the mean's are of a neuron that is dead, become so.

    Parameters
    ----------
    x : torch.Tensor, shape (r, ...)
        Taken as a matrix (r, c).
    """
    length = torch.linalg.vector_norm(x, dtype=torch.float64)
    y = hardshrink(x.flatten(1) * _inverse(length).to(x.dtype), _faintest(x.dtype))
    is_tall = y.shape[0] > y.shape[1]
    y = y.mT if is_tall else y
    for a, b, c in NEWTON_SCHULZ:
        gram = y @ y.mT
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    y = (y.mT if is_tall else y).reshape(x.shape) * (x != 0.0)
    return y * (length * _inverse(torch.linalg.vector_norm(y, dtype=torch.float64))).to(x.dtype)


def _faintest(dtype: torch.dtype) -> float:
    """Return what squares of squares of elements at length 1 are no subnormal numbers above.

    With these a processor takes ten times as long.
    """
    return float(torch.finfo(dtype).tiny ** 0.25)


def _inverse(length: Tensor) -> Tensor:
    return torch.where(length > torch.finfo(torch.float32).tiny, 1.0 / length, 0.0)
