"""Products of float32 arrays in float32, also where the process allows its libraries fewer bits.

PyTorch and CuPy have switches that let matrix products of float32 arrays run in TF32 or bfloat16,
an error of 1e-4 to 1e-3 where float32 has 1e-7. They are for networks; a Gram is not to follow.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mfac_core._arrays import Array, is_cupy_array, is_torch_array

Undo = Callable[[], None]


class _Guard:
    """Turns switches off while any thread is inside, and back when the last has left."""

    def __init__(self, turn_off: Callable[[], Undo]) -> None:
        self._turn_off = turn_off
        self._lock = threading.Lock()
        self._inside = 0
        self._undo: Undo = lambda: None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._undo = self._turn_off()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._undo()


def _torch_off() -> Undo:
    torch = sys.modules["torch"]
    backends = (torch.backends.cuda, torch.backends.mkldnn)
    switches: list[Any] = [getattr(backend, "matmul", None) for backend in backends]
    if not all(hasattr(switch, "fp32_precision") for switch in switches):  # before PyTorch 2.9
        allowed = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        return lambda: torch.set_float32_matmul_precision(allowed)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"

    def undo() -> None:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value

    return undo


def _cupy_off() -> Undo:
    linalg: Any = sys.modules["cupy"]._core._routines_linalg
    dtype = np.dtype(np.float32)
    before = linalg.get_compute_type(dtype)
    if before == linalg.COMPUTE_TYPE_DEFAULT:  # all bits, for float32
        return lambda: None
    linalg.set_compute_type(dtype, linalg.COMPUTE_TYPE_FP32)
    return lambda: linalg.set_compute_type(dtype, before)


_torch_guard, _cupy_guard = _Guard(_torch_off), _Guard(_cupy_off)


def full_float32(x: Array) -> contextlib.AbstractContextManager[None]:
    """Return a context in which products of the library of ``x`` keep the bits of float32.

    JAX has no such switch to turn: its products are told their precision one by one.
    """
    if is_torch_array(x):
        return _torch_guard()
    if is_cupy_array(x):
        return _cupy_guard()
    return contextlib.nullcontext()
