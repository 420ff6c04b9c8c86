"""Around a change: several threads on one operator, Ctrl-C, and PyTorch's inference mode."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any


class Lock:
    """A re-entrant lock; copies of the operator that holds it get a new one.

    Within it PyTorch is not in its inference mode: what is made in it cannot be written to after.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._modes: list[AbstractContextManager[Any] | None] = []

    def __enter__(self) -> None:
        self._lock.acquire()
        torch, mode = sys.modules.get("torch"), None
        if torch is not None and torch.is_inference_mode_enabled():
            mode = torch.inference_mode(False)
            mode.__enter__()
        self._modes.append(mode)

    def __exit__(self, *exception: object) -> None:
        mode = self._modes.pop()
        if mode is not None:
            mode.__exit__(None, None, None)
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return Lock, ()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done; outside of the main thread it never comes."""
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is None:  # or set by something else than Python
        yield
        return
    came = []
    previous = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if came:
            signal.raise_signal(signal.SIGINT)
