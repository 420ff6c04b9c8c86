"""Which weights of a model go together, by name: filters, rows, columns, heads, N:M."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfac_core.torch._masks import Masked

AXES = {"filter": 0, "row": 0, "channel": 1, "column": 1}
"""Named groups along an axis: what makes one output, or takes in one input."""


def period(pattern: Any) -> int | None:
    """Return M of "N:M"; None for another pattern."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    return int(match[2]) if match else None


def check_pattern(pattern: Any) -> None:
    """Refuse a pattern that nobody knows."""
    if pattern is None or (isinstance(pattern, str) and pattern in (*AXES, "head")):
        return
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if match is None or not 0 < int(match[1]) < int(match[2]):
        msg = (
            "pattern must be 'N:M' with 0 < N < M, such as '2:4', 'filter', 'row', 'channel', "
            f"'column' or 'head', got {pattern!r}"
        )
        raise ValueError(msg)


def flat(pattern: Any, x: Tensor) -> Tensor:
    """Return a parameter, or its gradient, as a vector in which N:M groups are adjacent.

    These are along input channels, as the kernels for 2:4 read them, not along memory.
    """
    return (x.movedim(1, -1) if period(pattern) and x.ndim > 1 else x).reshape(-1)


def shaped(pattern: Any, x: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo :func:`flat`."""
    if period(pattern) and len(shape) > 1:
        return x.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return x.reshape(tuple(shape))


def fitting(pattern: Any, columns: Mapping[str, Tensor], *, chosen: bool) -> dict[str, Tensor]:
    """Return the parameters that an N:M pattern can divide, or refuse one that was chosen."""
    m = period(pattern)
    if m is None:
        return dict(columns)
    fit = {n: p for n, p in columns.items() if p.ndim > 1 and p.shape[1] % m == 0}
    if chosen and len(fit) < len(columns):
        name = next(n for n in columns if n not in fit)
        msg = (
            f"pattern {pattern!r} needs a multiple of {m} input channels, and {name!r} has shape "
            f"{tuple(columns[name].shape)}; leave it out of parameters"
        )
        raise ValueError(msg)
    if not fit:
        msg = f"pattern {pattern!r} needs a multiple of {m} input channels, and no layer has one"
        raise ValueError(msg)
    return fit


def labels(pattern: str, model: torch.nn.Module, parameters: Sequence[Masked]) -> Any:
    """Return the number of each weight's group, int64 (d,); −1 for none."""
    if pattern == "head":
        parts, count = _heads(model, parameters)
        if not count:
            msg = (
                "pattern 'head' needs attention with a number of heads and projections named "
                "query, key, value or q_proj, k_proj, v_proj among the parameters, got none"
            )
            raise ValueError(msg)
        return np.concatenate([part.ravel() for part in parts])
    parts, count = [], 0
    for each in parameters:
        shape = tuple(each.parameter.shape)
        axis = min(AXES[pattern], len(shape) - 1)
        view = [1] * len(shape)
        view[axis] = shape[axis]
        numbers = count + np.arange(shape[axis]).reshape(view)
        parts.append(np.broadcast_to(numbers, shape).ravel())
        count += shape[axis]
    return np.concatenate(parts)


QUERIES = ("query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin")
OUTPUTS = ("out_proj", "o_proj", "out_lin")
NUMBERS = ("num_heads", "num_attention_heads", "n_heads")


def _heads(
    model: torch.nn.Module, parameters: Sequence[Masked]
) -> tuple[list[np.ndarray[Any, Any]], int]:
    """Return the head of each weight, −1 for none, and how many there are.

    A head is rows of the projections to queries, keys and values, columns of that of the output.
    """
    parts = [np.full(tuple(each.parameter.shape), -1) for each in parameters]
    own = {id(each.parameter): part for each, part in zip(parameters, parts, strict=True)}
    count = 0
    for module in model.modules():
        heads = next((n for key in NUMBERS if (n := getattr(module, key, None))), None)
        if not isinstance(heads, int):
            continue
        numbers = count + np.arange(heads)
        found = False
        for name, p in _projections(module):
            part = own.get(id(p))
            if part is None:
                continue
            axis, times = (1, 1) if name in OUTPUTS else (0, 3 if name == "in_proj_weight" else 1)
            size = part.shape[axis] // (heads * times)
            along = np.tile(np.repeat(numbers, size), times)
            if len(along) != part.shape[axis]:  # fewer heads of keys than of queries
                continue
            part[...] = along[:, None] if axis == 0 else along[None, :]
            found = True
        count += heads if found else 0
    return parts, count


def _projections(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Return the weights of an attention's projections by name, masked or not."""
    places = [("in_proj_weight", module, "in_proj_weight")]
    places += [(n, module._modules[n], "weight") for n in QUERIES + OUTPUTS if n in module._modules]
    return [
        (name, p)
        for name, owner, attribute in places
        for key in (attribute, f"{attribute}_orig")
        if (p := owner._parameters.get(key)) is not None
    ]
