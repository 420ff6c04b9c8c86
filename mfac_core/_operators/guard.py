"""Around a change: several threads on one operator, Ctrl-C, and PyTorch's inference mode."""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


def serialised(method: Method) -> Method:
    """Let one thread at a time into the operator's methods that are decorated so.

    Queries are among them, for they may compute and keep what the first of them needs.
    """

    @functools.wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock, lasting_tensors():
            return method(self, *args, **kwargs)

    return alone  # type: ignore[return-value]


def lasting_tensors() -> AbstractContextManager[Any]:
    """Leave PyTorch's inference mode: what is made in it cannot be written to after it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_inference_mode_enabled():
        return nullcontext()
    return torch.inference_mode(False)  # type: ignore[no-any-return]


class Lock:
    """A re-entrant lock; copies of the operator that holds it get a new one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
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
