"""The small blocks of the block-diagonal form on CUDA devices: ``kernels/blocks.cu``."""

from __future__ import annotations

from typing import Any

import numpy as np

from mfac_core._arrays import Array, is_jax_array
from mfac_core._ops.cuda import machine as cuda_machine
from mfac_core._ops.cuda import passes as cuda_passes
from mfac_core._ops.cuda.machine import STORAGE, dtype_name, launch

WIDTHS = (32, 64, 128)
"""The widths of blocks the kernels are compiled for; a narrower block takes the next."""

STAGED_ROWS = 8
"""Rows of G in shared memory, as the kernel has them."""


def serves_blocks(g: Array, widest: int) -> bool:
    """Whether kernels take G in blocks of columns of at most this width.

    They do up to 128, as far as the device's shared memory goes.
    """
    if is_jax_array(g) or not 0 < widest <= WIDTHS[-1] or not cuda_passes.serves(g):
        return False
    with cuda_machine.current.at(g):
        return _shared_bytes(_width(widest)) <= cuda_machine.current.shared_bytes()


def serves_product(inverses: Array, x: Array) -> bool:
    """Whether kernels multiply a vector by these inverses."""
    return (
        not is_jax_array(x) and inverses.shape[1] <= WIDTHS[-1] and cuda_passes.serves(inverses, x)
    )


def inverses(
    g: Array, lengths: np.ndarray[Any, Any], damping: float, divisor: float
) -> tuple[Array, Array]:
    """Invert damping·I + GᵀG/divisor block by block.

    Returns the inverses, float64 (blocks, B, B) with B the largest of ``lengths``, each in its
    leading part and the rest undefined; and for each block an int32, 1 where rounding has left it
    indefinite.
    """
    m, d = g.shape
    count, widest = len(lengths), int(max(lengths))
    width = _width(widest)
    with cuda_machine.current.at(g):
        result = cuda_machine.current.empty((count, widest, widest), "float64", g)
        failed = cuda_machine.current.empty((count,), "int32", g)
        launch(
            "blocks.cu",
            "block_inverses",
            {"G_T": STORAGE[dtype_name(g.dtype)], **_macros(width, "float64", "float64")},
            (count,),
            (16, 16),
            cuda_machine.current.borrow(g),
            _starts(lengths),
            cuda_machine.current.borrow(result),
            cuda_machine.current.borrow(failed),
            np.int32(m),
            np.int64(d),
            np.int32(widest),
            np.float64(damping),
            np.float64(divisor),
            shared_bytes=_shared_bytes(width),
        )
        return result, failed


def product(inverses: Array, lengths: np.ndarray[Any, Any], x: Array, *, dtype: Any) -> Array:
    """Multiply a vector by the inverses, block by block; the result is of a dtype kernels know."""
    count, widest, _ = inverses.shape
    name = dtype_name(dtype)
    with cuda_machine.current.at(inverses):
        out = cuda_machine.current.empty((int(sum(lengths)),), name, inverses)
        launch(
            "blocks.cu",
            "block_product",
            {"G_T": "double", **_macros(_width(widest), dtype_name(x.dtype), name)},
            (count,),
            (256,),
            cuda_machine.current.borrow(inverses),
            _starts(lengths),
            cuda_machine.current.receive(x),
            cuda_machine.current.borrow(out),
            np.int32(widest),
        )
        return out


def _macros(width: int, x: str, out: str) -> dict[str, Any]:
    return {"BLOCK": width, "X_T": STORAGE[x], "OUT_T": STORAGE[out]}


def _starts(lengths: np.ndarray[Any, Any]) -> Any:
    """Return where each block begins, and the end, on the device."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return cuda_machine.current.receive(starts)


def _width(widest: int) -> int:
    return next(width for width in WIDTHS if width >= widest)


def _shared_bytes(width: int) -> int:
    return 8 * (width * (width + 1) // 2 + width + STAGED_ROWS * width)
