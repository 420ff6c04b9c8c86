"""The state of a sliding window as plain arrays, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from mfac_core._arrays import send

if TYPE_CHECKING:
    from mfac_core.sliding import SlidingInverseFisher

VERSION = 1
"""Version of the state's form."""


def save(window: SlidingInverseFisher) -> dict[str, Any]:
    """Return copies of everything later results depend on."""
    state: dict[str, Any] = {
        "version": VERSION,
        "num_params": window.num_params,
        "window_size": window.window_size,
        "damping": window.damping,
        "normalization": window.normalization,
        "slots": np.asarray(window._rows.slots, dtype=np.int64),
    }
    if window._allocated:
        rows = window._rows
        state["gradients"] = rows.xp.asarray(rows.array[: rows.used, :], copy=True)
        state["exact"] = rows.exact
        state["exact_steps"] = window._exact_steps
        state["checked"] = window._checked
        state |= window._dual.state()
    return state


def load(window: SlidingInverseFisher, state: Mapping[str, Any]) -> SlidingInverseFisher:
    """Return a new window like ``window``, with the state in it."""
    try:
        expected = (VERSION, window.num_params, window.window_size)
        sizes = tuple(int(state[key]) for key in ("version", "num_params", "window_size"))
        if sizes != expected:
            msg = (
                f"state must have (version, num_params, window_size) {expected}, got {sizes}; "
                "load it into a window of its own sizes"
            )
            raise ValueError(msg)
        xp, dtype, device = window._given
        new = type(window)(
            window.num_params,
            window.window_size,
            damping=float(state["damping"]),
            dtype=dtype,
            xp=xp,
            device=device,
            normalization=str(state["normalization"]),
            reduce=window._reduce,
        )
        if "gradients" in state:
            if not new._allocated:
                new._allocate(window._rows.array if window._allocated else state["gradients"])
            _fill(new, state)
        elif len(state["slots"]):
            raise KeyError("gradients")
    except KeyError as error:
        msg = f"state has no entry {error}; it is not a complete state_dict()"
        raise ValueError(msg) from None
    return new


def _fill(window: SlidingInverseFisher, state: Mapping[str, Any]) -> None:
    gradients, slots = state["gradients"], [int(slot) for slot in state["slots"]]
    shapes = (tuple(gradients.shape), tuple(state["gram"].shape), tuple(state["inverse"].shape))
    used = shapes[0][0]
    shapes_fit = shapes in (
        ((used, window.num_params), (used, used), (used, used)),
        ((used, window.num_params), (used, used), (0, 0)),
    )
    slots_fit = len(set(slots)) == len(slots) and set(slots) <= set(range(used))
    if not (shapes_fit and slots_fit and used <= window.window_size):
        msg = (
            "state must have consistent gradients, gram, inverse and slots, got shapes "
            f"{shapes} and slots {slots}; it is damaged"
        )
        raise ValueError(msg)
    rows = window._rows
    for i in range(used):
        rows.write(i, send(gradients[i, :], rows.array, rows.dtype))
    rows.exact = bool(state["exact"]) or rows.always_exact
    rows.slots = slots
    window._exact_steps = int(state["exact_steps"])
    window._reshift()
    window._dual.restore(state)
    window._checked = bool(state["checked"])
