"""A progress bar where tqdm is installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def track(items: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
    """Go through ``items`` behind a bar that disappears when done."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return iter(items)
    return iter(tqdm(items, desc=label, total=total, leave=False))
