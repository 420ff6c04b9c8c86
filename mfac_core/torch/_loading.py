"""States before they are taken up: matched to the parameters, or refused with nothing changed.

``torch.optim.Optimizer.load_state_dict`` casts what it loads to the parameters' dtypes, which would
take digits from the window and leave its Gram that of other rows. So entries go through it closed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mfac_core.torch._sharding import as_pairs, local
from mfac_core.torch._state import SPARSE, State, packed, rows_in


class Closed:
    """A parameter's state, which torch neither looks into nor copies."""

    def __init__(self, entry: State) -> None:
        self.entry = entry


def closed(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    *,
    window_size: int,
    density: float | None,
    dtype: Any,
) -> dict[str, Any]:
    """Return a state dict with the states of its parameters checked and closed.

    Parameters
    ----------
    state_dict : mapping
        As given to ``load_state_dict``.
    groups : sequence of mapping
        The optimizer's parameter groups.
    window_size, density : int, float or None
        Of the optimizer's window.
    dtype : torch.dtype or None
        Of the optimizer's window, where the user has chosen it.

    Returns
    -------
    dict
        For ``torch.optim.Optimizer.load_state_dict``.

    Raises
    ------
    ValueError
        If it is not of such an optimizer.
    """
    state_dict = dict(state_dict)
    if "mfac" in state_dict:
        state_dict = _of_0_1_0(state_dict, groups, window_size, density)
    for group in state_dict["param_groups"]:
        if "damping" not in group:
            msg = (
                "loaded state dict is not of MFAC: its parameter groups have no 'damping'; load "
                "it into an optimizer of the class that saved it"
            )
            raise ValueError(msg)
    state_dict["param_groups"] = _in_order_of_names(state_dict["param_groups"], groups)
    ids = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
    params = list(chain.from_iterable(group["params"] for group in groups))
    names = list(chain.from_iterable(group.get("param_names", ()) for group in groups))
    if len(ids) == len(params):  # else torch says what differs
        states = [state_dict["state"].get(i) or None for i in ids]
        for i, (p, entry) in enumerate(zip(params, states, strict=True)):
            if entry is not None:
                name = names[i] if names else f"params[{i}]"
                _check(entry, p, name, window_size, density, dtype)
        steps = {int(entry["step"]) for entry in states if entry is not None}
        if len(steps) > 1:
            msg = f"loaded parameters must have taken the same number of steps, got {sorted(steps)}"
            raise ValueError(msg)
        _check_sparse([entry for entry in states if entry is not None], density)
    state_dict["state"] = {
        key: Closed(dict(entry)) if isinstance(entry, Mapping) else entry
        for key, entry in state_dict["state"].items()
        if entry  # ZeroRedundancyOptimizer has None for what other ranks hold
    }
    return state_dict


def _check(
    entry: State, p: Tensor, name: str, window_size: int, density: float | None, dtype: Any
) -> None:
    if "step" not in entry:
        msg = f"loaded state of {name} is not MFAC's: it has {sorted(entry)} and no 'step'"
        raise ValueError(msg)
    rows, wanted = rows_in(entry), tuple(as_pairs(p).shape)
    if rows is not None and density is None:
        shape = tuple(rows[0].shape if isinstance(rows, list) else rows.shape[1:])
        m = len(rows)
        if m != window_size and not int(entry["step"]) <= m < window_size:
            msg = (
                f"loaded state has a window_size of {m}, this optimizer {window_size}; make one "
                "with the window_size of the state"
            )
            raise ValueError(msg)
        if shape != wanted:
            msg = f"loaded gradients of {name} have shape {shape}, the parameter {wanted}"
            raise ValueError(msg)
        if dtype is not None and not _fits(rows, dtype):
            msg = f"loaded gradients of {name} overflow the window_dtype {dtype}"
            raise ValueError(msg)
    velocity = entry.get("velocity")
    if velocity is not None and tuple(velocity.shape) != wanted:
        msg = f"loaded velocity of {name} has shape {tuple(velocity.shape)}, the parameter {wanted}"
        raise ValueError(msg)


def _check_sparse(entries: Sequence[State], density: float | None) -> None:
    if not entries or not int(entries[0]["step"]):
        return
    sparse = any(name in entry for entry in entries for name in SPARSE)
    if sparse != (density is not None):
        found = "a sparse window" if sparse else "a dense window"
        msg = f"loaded state is of {found}, this optimizer has density={density}"
        raise ValueError(msg)


def _fits(rows: Any, dtype: Any) -> bool:
    """Whether rows stay finite in a dtype."""
    if isinstance(rows, list):
        return all(_fits(row, dtype) for row in rows)
    rows, limit = local(rows), torch.finfo(dtype).max
    narrows = torch.finfo(rows.dtype).max > limit and rows.numel()
    return not narrows or max(rows.max().item(), -rows.min().item()) <= limit


def _in_order_of_names(
    saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the saved groups with their parameters as the optimizer's of the same names."""
    given = [group.get("param_names") for group in (*saved, *groups)]
    result = [dict(group) for group in saved]
    if len(saved) != len(groups) or any(names is None for names in given):
        return result
    ids = {
        name: i
        for group in saved
        for name, i in zip(group["param_names"], group["params"], strict=True)
    }
    names = {name for group in groups for name in group["param_names"]}
    if names != set(ids):
        msg = (
            f"loaded state dict lacks parameters {sorted(names - set(ids))} and has besides "
            f"{sorted(set(ids) - names)}; load it into an optimizer for parameters of its names"
        )
        raise ValueError(msg)
    for group, own in zip(result, groups, strict=True):
        group["param_names"] = list(own["param_names"])
        group["params"] = [ids[name] for name in own["param_names"]]
    return result


def _of_0_1_0(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    window_size: int,
    density: float | None,
) -> dict[str, Any]:
    """Return a state dict of mfac_core 0.1.0, which had one flat window, as one of today."""
    own = state_dict["mfac"]
    states: dict[int, State] = {}
    more = {"damping": own["damping"], "nesterov": False}
    saved = [{**group, **more} for group in state_dict["param_groups"]]
    new = {"state": states, "param_groups": saved}
    window = own["window"]
    if window is None:
        return new
    params = list(chain.from_iterable(group["params"] for group in groups))
    ids = list(chain.from_iterable(group["params"] for group in saved))
    size = sum(p.numel() for p in params)
    expected = {"num_params": size, "window_size": window_size}
    expected |= {} if density is None else {"density": density}
    found = {name: window.get(name) for name in expected}
    if found != expected or ("density" in window) != (density is not None):
        msg = f"loaded state is of a window with {found}, this optimizer has {expected}"
        raise ValueError(msg)
    used = int(window["gram"].shape[0]) if "gram" in window else 0
    slots = [int(slot) for slot in window["slots"]]
    step = used if used < window_size or not slots else window_size + slots[0]
    start = 0
    for i, p in zip(ids, params, strict=True):
        columns, start = slice(start, start + p.numel()), start + p.numel()
        entry: State = {"step": torch.tensor(step)}
        if density is None and used:
            entry["window"] = window["gradients"][:, columns].view(used, *p.shape)
        if own["velocity"] is not None:
            entry["velocity"] = own["velocity"][columns].view(p.shape)
        states[i] = entry
    if used:
        first = states[ids[0]]
        counters = {"step": step, "size": size, "skipped_steps": own["skipped_steps"]}
        first |= packed(window, window_size, slots=slots, **counters)
        if density is not None:
            first |= {name: window[name] for name in SPARSE}
    return new
