"""Threads of Python's own, which NumPy's loops and small products run in side by side."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor


def cores() -> int:
    """Return the number of cores this process may use; ``OMP_NUM_THREADS`` where it is less."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS", "")
    return max(min(count, int(given)), 1) if given.isdigit() else count


def pool(user: str, workers: int) -> ThreadPoolExecutor:
    """Return threads that stay, since to start them takes as long as a product of some MB.

    Each ``user`` has its own, so that a task of one may wait for tasks of another.
    """
    return _pool(user, workers, os.getpid())


@functools.cache
def _pool(user: str, workers: int, process: int) -> ThreadPoolExecutor:
    # Threads do not survive a fork: the process is part of what they are kept by.
    return ThreadPoolExecutor(workers, thread_name_prefix=f"mfac_core-{user}")
