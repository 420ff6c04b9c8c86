"""What ``optimizer.state`` holds, made from the flat memory, and the memory made from that.

The state is the truth: whatever put it there, the memory is made anew from it when its entries are
no longer the memory's own views.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfac_core._operators import state as window_state
from mfac_core._operators.sliding import SlidingInverseFisher
from mfac_core.torch._memory import Memory
from mfac_core.torch._sharding import (
    is_flattened,
    local_rows,
    local_units,
    local_vector,
    rows_like,
    units_like,
    vector_like,
)

State = dict[str, Any]

COUNTERS = (
    *("step", "size", "used", "replaced", "factored", "exact", "exact_steps", "checked"),
    *("has_inverse", "has_probe", "skipped_steps"),
)
"""What the integers of "counters" are."""

SPARSE = ("indices", "values", "error")
"""Entries of a sparse window, whose rows are of all parameters at once."""


def publish(memory: Memory, state: Any) -> None:
    """Put the memory's views into ``state``, and room for what is m-sized."""
    memory.published = []
    for i, p in enumerate(memory.params):
        entry: State = {"step": memory.step}
        if memory.rows is not None:
            rows = memory.rows_of(i)
            if is_flattened(p):  # FSDP can join and cut only what has the parameter's own shape
                entry |= {f"gradient_{j}": row for j, row in enumerate(rows)}
            else:
                entry["window"] = rows_like(rows, p)
                if memory.units is not None:
                    entry["unit_inverse"] = units_like(memory.units.units[i].inverse, p)
        state[p] = entry
        memory.published.append(entry.get("window"))
    publish_velocity(memory, state)
    for p in _keeper(memory):
        state[p] |= {name: x.to(memory.window.device) for name, x in _numbers(memory, 0).items()}
        if memory.rows is None:
            state[p] |= {name: getattr(memory.window._rows, name) for name in SPARSE}


def publish_velocity(memory: Memory, state: Any) -> None:
    """Put the velocity's views into ``state``."""
    if memory.velocity is not None:
        for p, part in zip(memory.params, memory.velocity.parts, strict=True):
            state[p]["velocity"] = vector_like(part, p)


def refresh(memory: Memory, state: Any, skipped_steps: int) -> None:
    """Bring what is m-sized up to date in ``state``."""
    for p in _keeper(memory):
        for name, x in _numbers(memory, skipped_steps).items():
            state[p][name].copy_(x)
        if memory.rows is None:
            state[p]["error"] = memory.window._rows.error  # type: ignore[attr-defined]


def is_published(memory: Memory, state: Any) -> bool:
    """Whether the entries of ``state`` are the memory's."""
    entries = [state.get(p) for p in memory.params]
    return all(
        entry is not None and entry.get("step") is memory.step and entry.get("window") is rows
        for entry, rows in zip(entries, memory.published, strict=True)
    )


def _keeper(memory: Memory) -> list[Tensor]:
    """Return the parameter in whose state the m-sized numbers are, if any.

    FSDP would take them for parts of a flat parameter; without them the Gram is computed anew.
    """
    return [p for p in memory.params if not is_flattened(p)][:1]


def _numbers(memory: Memory, skipped_steps: int) -> State:
    """Return what is m-sized, in shapes that do not change as the window fills."""
    window = memory.window
    if memory.units is not None:
        return {"skipped_steps": torch.tensor(skipped_steps)}
    numbers = window._do(window_state.numbers, window)
    return packed(
        numbers,
        window.window_size,
        slots=window._rows.slots,
        step=int(memory.step),
        size=int(memory.size),
        skipped_steps=skipped_steps,
    )


def packed(numbers: Mapping[str, Any], m: int, *, slots: Any, **more: int) -> State:
    """Return the numbers of a window, and ``more`` counters, as tensors of fixed shapes."""
    used = int(numbers["gram"].shape[0])
    found = {
        **{name: int(numbers[name]) for name in COUNTERS if name in numbers},
        "used": used,
        "has_inverse": int(numbers["inverse"].shape[0] > 0),
        "has_probe": int(numbers["probe"].shape[0] > 0),
        **more,
    }
    return {
        "gram": _padded(numbers["gram"], (m, m)),
        "inverse": _padded(numbers["inverse"], (m, m)),
        "probe": _padded(numbers["probe"], (m,)),
        "slots": torch.tensor([*slots, *[-1] * (m - len(slots))], dtype=torch.int64),
        "counters": torch.tensor([found[name] for name in COUNTERS], dtype=torch.int64),
    }


def _padded(x: Any, shape: tuple[int, ...]) -> Tensor:
    full = torch.zeros(shape, dtype=torch.float64)
    full[tuple(slice(n) for n in x.shape)] = torch.as_tensor(np.asarray(x))
    return full


def counters_of(entry: State) -> dict[str, int]:
    """Return the counters by name."""
    return dict(zip(COUNTERS, entry["counters"].tolist(), strict=True))


def rows_in(entry: State) -> Tensor | list[Tensor] | None:
    """Return the rows of a parameter's state: one tensor, or a list of them; or None."""
    if "window" in entry:
        return entry["window"]
    count = sum(name.startswith("gradient_") for name in entry)
    return [entry[f"gradient_{j}"] for j in range(count)] or None


def dtype_of(entry: State) -> Any:
    """Return the dtype of the rows in a parameter's state, or None."""
    rows = rows_in(entry)
    if rows is None:
        return entry["values"].dtype if "values" in entry else None
    return rows[0].dtype if isinstance(rows, list) else rows.dtype


def fill(memory: Memory, states: Mapping[Tensor, State]) -> int | None:
    """Copy states into new memory; parameters without one have zeros in the past.

    The Gram is computed from the rows where the state's own is missing, or is that of other rows
    or of rows in another dtype. Returns how many steps the state says were skipped, if it
    does.
    """
    window, rows = memory.window, memory.window._rows
    m, same_dtype = window.window_size, True
    elements = torch.zeros((1, len(memory.params)), dtype=torch.float64)
    steps = [int(states[p]["step"]) for p in memory.params if p in states]
    for i, p in enumerate(memory.params):
        if p not in states:
            continue
        elements[0, i] = memory.shapes[i].numel()
        saved = rows_in(states[p])
        if saved is not None and memory.rows is not None:
            own = memory.rows_of(i)
            same_dtype &= dtype_of(states[p]) == own.dtype
            if isinstance(saved, list):
                for to, row in zip(own, saved, strict=True):
                    to.copy_(row)
            else:
                saved = local_rows(saved, p)
                own[: len(saved)].copy_(saved)
        if "velocity" in states[p]:
            if memory.velocity is None:
                memory.velocity = memory.vector(memory.work.vector.dtype)
            memory.velocity.parts[i].copy_(local_vector(states[p]["velocity"], p))
    size = float(memory.sharding.totals(elements)[1])
    ranks, total = rows.summed_numbers(float(bool(steps)), float(max(steps, default=0)))
    memory.step.fill_(round(total / ranks) if ranks else 0)
    step = int(memory.step)
    if memory.units is not None:
        _fill_units(memory, states, same_dtype)
        entries = [states[p] for p in memory.params if p in states]
        return next((n for n in map(_skipped_steps, entries) if n is not None), None)
    entry = next((states[p] for p in memory.params if "counters" in states.get(p, {})), None)
    counters = counters_of(entry) if entry is not None else {}
    fits = same_dtype and counters.get("step") == step and counters.get("size") == int(size)
    if rows.anywhere(not fits) or entry is None:
        if step and memory.rows is None:
            msg = "the state of a sparse window is that of its parameters together, none may lack"
            raise ValueError(msg)
        if step:
            window_state.recompute(window, min(step, m), slots_after(step, m))
        return counters.get("skipped_steps")
    used = counters["used"]
    slots = [slot for slot in entry["slots"].tolist() if slot >= 0]
    if memory.rows is None:
        state = {name: entry[name] for name in SPARSE}
        rows.restore(state | {name: state[name][:, :used, :] for name in SPARSE[:2]})
    rows.used = used
    gram, inverse = entry["gram"][:used, :used], entry["inverse"][:used, :used]
    probe = entry["probe"][:used]
    numbers = counters | {
        "gram": gram,
        "inverse": inverse if counters["has_inverse"] else inverse[:0, :0],
        "probe": probe if counters["has_probe"] else probe[:0],
    }
    window_state.restore(window, numbers, slots)
    return counters["skipped_steps"]


def _fill_units(memory: Memory, states: Mapping[Tensor, State], same_dtype: bool) -> None:
    """Take up the inverses of the units, or compute them from the rows where one lacks."""
    assert memory.units is not None
    step, m = int(memory.step), memory.window.window_size
    saved: list[Tensor | None] = []
    fits = same_dtype
    for p, units in zip(memory.params, memory.units.units, strict=True):
        inverse = states[p].get("unit_inverse") if p in states else units.inverse
        if inverse is not None and p in states:
            right = tuple(inverse.shape[1:]) == tuple(units.inverse.shape[1:])
            inverse = local_units(inverse, p) if right else None
        fits &= inverse is not None
        saved.append(inverse)
    slots = slots_after(step, m)
    if memory.window._rows.anywhere(not fits):
        memory.units.replay(slots)
    else:
        memory.units.restore([x for x in saved if x is not None], slots)


def _skipped_steps(entry: State) -> int | None:
    if "skipped_steps" in entry:
        return int(entry["skipped_steps"])
    return counters_of(entry)["skipped_steps"] if "counters" in entry else None


def up_to_date(memory: Memory) -> SlidingInverseFisher[Tensor]:
    """Return the window, which the scale-free step writes to without its knowledge."""
    step, m = int(memory.step), memory.window.window_size
    if memory.units is not None and memory.known_steps != step:
        window_state.recompute(memory.window, min(step, m), slots_after(step, m))
        memory.known_steps = step
    return memory.window


def slots_after(step: int, m: int) -> list[int]:
    """Return the rows that hold gradients, oldest first, after so many were appended."""
    return list(range(step)) if step < m else [(step + j) % m for j in range(m)]
