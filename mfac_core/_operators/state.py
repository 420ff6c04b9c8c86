"""The state of a sliding window as plain arrays, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mfac_core._typing import Normalization

if TYPE_CHECKING:
    from mfac_core._operators.sliding import SlidingInverseFisher

VERSION = 1
"""Version of the state's form."""


def save(window: SlidingInverseFisher) -> dict[str, Any]:
    """Return copies of everything later results depend on."""
    state: dict[str, Any] = {
        "version": VERSION,
        **window._sizes,
        "damping": window.damping,
        "normalization": window.normalization,
        "slots": np.asarray(window._rows.slots, dtype=np.int64),
    }
    if window._allocated:
        state |= window._rows.state() | numbers(window)
    return state


def numbers(window: SlidingInverseFisher) -> dict[str, Any]:
    """Return copies of what is not d-sized, but for the slots."""
    window._by_dual()
    return {
        "exact": window._rows.float64,
        "exact_steps": window._digits.float64_steps,
        "checked": window._digits.checked,
        **window._dual.state(),
    }


def load(window: SlidingInverseFisher, state: Mapping[str, Any]) -> SlidingInverseFisher:
    """Return a new window like ``window``, with the state in it."""
    if not isinstance(state, Mapping):
        msg = f"state must be a mapping, as state_dict() returns, got {type(state).__name__}"
        raise TypeError(msg)
    try:
        expected = {"version": VERSION, **window._sizes}
        found = {key: type(value)(state[key]) for key, value in expected.items()}
        if found != expected:
            names = ", ".join(expected)
            msg = (
                f"state must have ({names}) {tuple(expected.values())}, "
                f"got {tuple(found.values())}; load it into a window of its own sizes"
            )
            raise ValueError(msg)
        given = window._given
        new = type(window)(
            **window._sizes,
            damping=float(state["damping"]),
            dtype=window._given_dtype,
            xp=given and given.xp,
            device=given and given.device,
            normalization=cast("Normalization", str(state["normalization"])),
            reduce=window._reduce,
        )
        if "gram" in state:
            if not new._allocated:
                stored = state[new._rows.stored]
                new._allocate(window._rows.like if window._allocated else stored)
            _fill(new, state)
        elif len(state["slots"]):
            raise KeyError("gram")
    except KeyError as error:
        msg = f"state has no entry {error}; it is not a complete state_dict()"
        raise ValueError(msg) from None
    return new


def _fill(window: SlidingInverseFisher, state: Mapping[str, Any]) -> None:
    rows, slots = window._rows, [int(slot) for slot in state["slots"]]
    used = int(state["gram"].shape[0])
    expected = {**rows.shapes(used), "gram": (used, used), "inverse": (used, used)}
    shapes = {name: tuple(state[name].shape) for name in expected}
    if shapes["inverse"] == (0, 0):  # none is known
        del expected["inverse"]
    empty = set(range(used)) - set(slots)
    slots_fit = len(empty) + len(slots) == used and not any(state["gram"][i, i] for i in empty)
    if not (expected.items() <= shapes.items() and slots_fit and used <= window.window_size):
        msg = (
            f"state must have consistent {', '.join(shapes)} and slots, got shapes "
            f"{tuple(shapes.values())} and slots {slots}; it is damaged"
        )
        raise ValueError(msg)
    rows.restore(state)
    restore(window, state, slots)


def restore(window: SlidingInverseFisher, state: Mapping[str, Any], slots: list[int]) -> None:
    """Take up :func:`numbers` that fit the rows in the window's ring."""
    rows = window._rows
    rows.float64 = bool(state["exact"]) or rows.always_float64
    rows.slots = slots
    window._rescale()
    window._dual.restore(state)
    window._digits.float64_steps = int(state["exact_steps"])
    window._digits.checked = bool(state["checked"])


def recompute(window: SlidingInverseFisher, used: int, slots: list[int]) -> None:
    """Let the first rows of the window's ring, however they came there, be those it holds."""
    rows = window._rows
    rows.used, rows.slots = used, slots
    window._rescale()
    window._dual.set_gram(rows.gram())
