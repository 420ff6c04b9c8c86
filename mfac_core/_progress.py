"""A progress bar where tqdm is installed."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from mfac_core._warn import warn


def track(items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
    """Go through ``items`` behind a bar that disappears when done."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        _say_once()
        return iter(items)
    return iter(tqdm(items, desc=label, total=total, leave=False))


@functools.cache
def _say_once() -> None:
    warn("progress=True shows nothing without tqdm: python -m pip install tqdm", UserWarning)
