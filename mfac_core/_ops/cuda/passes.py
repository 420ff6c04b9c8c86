"""The hot loops on CUDA devices: checks, sizes and launches of ``kernels/*.cu``.

``serves`` says whether a kernel takes certain arrays; where it does not, the caller goes the
generic way. Every product is accumulated in float64 and summed in an order fixed by the sizes, so
that results do not vary from run to run. On devices with little float64, what need not be float64
is accumulated in two float32 instead, with an error of n terms below (n + 2) 2⁻⁴⁵ Σ|aᵢbᵢ|.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mfac_core._arrays import Array, Home, device, is_jax_array, is_torch_array, itemsize
from mfac_core._ops.cuda import machine as cuda_machine
from mfac_core._ops.cuda.machine import STORAGE, dtype_name, launch

MOST_COLUMNS = 4
"""Columns of x a kernel takes at a time; for more, the libraries' matrix products win."""

LOAD_BYTES = 16
"""Largest load of a thread."""

LOAD_ELEMENTS = 4
"""Most elements of a load: with eight of 16 bits, their float64 copies take too many registers."""

PROJECT_CHUNK = 2048
"""Least columns of a block of ``project``, a multiple of what its threads take at a time."""

TWOFOLD_CHUNK = 8192
"""The same for sums in two float32: the sums of the threads are added in float64."""

PROJECT_PARTS = 1024
"""Chunks a row is cut into where it is long."""

COMBINE_THREADS = 1 << 17
"""Threads that keep a large device's memory busy."""

COMBINE_ROWS = 64
"""Least rows of a slice of ``combine``, so that its parts are small beside G."""

LARGEST_GRID_Y = 65535

LARGEST_ROWS = 2**31 // MOST_COLUMNS
"""Rows that kernels count in 32 bits."""


def serves(*arrays: Array) -> bool:
    """Whether kernels take these arrays as they are."""
    return all(reaches(x) and is_contiguous(x) for x in arrays)


def serves_product(g: Array, *others: Array | None) -> bool:
    """Whether kernels take G and what it is multiplied by: a vector or a few columns.

    Only G must be C-contiguous; what is small beside it is copied where it is not.
    """
    given = [x for x in others if x is not None]
    few = all(x.ndim == 1 or x.shape[1] <= MOST_COLUMNS for x in given)
    return few and g.shape[0] < LARGEST_ROWS and serves(g) and all(map(reaches, given))


def serves_combination(g: Array, c: Array, base: Array | None) -> bool:
    """Whether kernels take G, the weights of its rows, in the home, and what is added.

    The home may be another device than that of G, where G is in parts.
    """
    few = c.ndim == 1 or 0 < c.shape[1] <= MOST_COLUMNS
    # JAX's home is NumPy: the weights are copied.
    here = is_jax_array(g) or (reaches(c) and device(c) == device(g))
    return few and here and serves_product(g, base)


def reaches(x: Array) -> bool:
    """Whether an array is on a CUDA device, of a dtype kernels know, and not empty."""
    name = dtype_name(x.dtype)
    if name not in STORAGE or 0 in x.shape or not cuda_machine.current.holds(x):
        return False
    return cuda_machine.current.compiles(name, x)


def is_contiguous(x: Array) -> bool:
    """Whether an array is C-contiguous; where a library has no strides, it is."""
    if is_torch_array(x):
        return bool(x.is_contiguous())
    flags = getattr(x, "flags", None)
    return flags is None or bool(flags.c_contiguous)


def project(g: Array, x: Array, home: Home, *, float64: bool) -> Array:
    """G x as float64 in ``home``; see :func:`mfac_core._ops.rows.project`."""
    with cuda_machine.current.at(g):
        # x in float64 would have to be cut in two by each group of rows anew.
        twofold = itemsize(x.dtype) <= 4 and _twofold(g, float64)
        return home.receive(_project(g, x, None, None, twofold=twofold))


def _twofold(g: Array, float64: bool) -> bool:
    """Whether to sum in two float32; only inside ``at``."""
    return not float64 and itemsize(g.dtype) <= 4 and cuda_machine.current.has_little_float64()


def exchange(g: Array, i: int, row: Array, home: Home) -> tuple[Array, Array]:
    """Set G[i] = row, of G's dtype; see :func:`mfac_core._ops.rows.exchange`."""
    with cuda_machine.current.at(g):
        cuda_machine.current.refuse_capture()  # before anything is written
        row = cuda_machine.current.contiguous(row)
        norm2 = _project(row[None, :], row, None, None)
        products = _project(g, row, i, norm2)
        return home.receive(products), home.receive(norm2)


def _project(
    g: Array, x: Array, slot: int | None, norm2: Array | None, *, twofold: bool = False
) -> Array:
    m, d = g.shape
    columns = _columns(x)
    held, factor = cuda_machine.current.borrow(g), cuda_machine.current.receive(x)
    chunk = _chunk(d, TWOFOLD_CHUNK if twofold else PROJECT_CHUNK)
    parts = -(-d // chunk)
    partial = cuda_machine.current.empty((parts, m * columns), "float64", g)
    macros = {
        "G_T": STORAGE[dtype_name(g.dtype)],
        "X_T": STORAGE[dtype_name(x.dtype)],
        "COLUMNS": columns,
        "WIDTH": _width(d, (held, g.dtype), (factor, x.dtype)),
    }
    if slot is not None:
        macros["EXCHANGE"] = 1
    if twofold:
        macros["TWOFOLD"] = 1
    launch(
        "project.cu",
        "project",
        macros,
        (-(-m // (8 if columns == 1 else 4)), parts),
        (256,),
        held,
        factor,
        cuda_machine.current.borrow(partial),
        np.int32(m),
        np.int64(d),
        np.int64(chunk),
        np.int32(-1 if slot is None else slot),
        cuda_machine.current.borrow(partial if norm2 is None else norm2),
    )
    return sum_parts(partial, None, 0.0, (m, *x.shape[1:]), "float64", g)


def _chunk(d: int, least: int) -> int:
    """Columns of a block of ``project``."""
    even = -(-d // PROJECT_PARTS)
    return max(1, -(-even // least)) * least


def combine(
    g: Array, c: Array, base: Array | None, alpha: float, *, dtype: Any, float64: bool
) -> Array:
    """alpha·base + Gᵀc; see :func:`mfac_core._ops.rows.combine`."""
    m, d = g.shape
    columns = _columns(c)
    name = "float64" if dtype is None else dtype_name(dtype)
    with cuda_machine.current.at(g):
        held, weights = cuda_machine.current.borrow(g), cuda_machine.current.receive(c)
        added = weights if base is None else cuda_machine.current.receive(base)
        added_dtype = weights.dtype if base is None else base.dtype
        alpha = 0.0 if base is None else alpha
        shape = (d, *c.shape[1:])
        width = _width(d, (held, g.dtype), (added, added_dtype))
        slices = _slices(m, d // width)
        rows = -(-m // slices)
        slices = -(-m // rows)  # rounding up may have left none for the last
        whole = slices == 1
        out = cuda_machine.current.empty(
            shape if whole else (slices, d * columns), name if whole else "float64", g
        )
        macros = {
            "G_T": STORAGE[dtype_name(g.dtype)],
            "X_T": STORAGE[dtype_name(added_dtype)],
            "OUT_T": STORAGE[name if whole else "float64"],
            "COLUMNS": columns,
            "WIDTH": width,
        }
        if _twofold(g, float64):
            macros["TWOFOLD"] = 1
        launch(
            "combine.cu",
            "combine",
            macros,
            (-(-d // (128 * width)), slices),
            (128,),
            held,
            weights,
            added,
            np.float64(alpha if whole else 0.0),
            cuda_machine.current.borrow(out),
            np.int32(m),
            np.int64(d),
            np.int32(rows),
        )
        if not whole:
            out = sum_parts(out, base, alpha, shape, name, g)
        return cuda_machine.current.give_back(out, g)


def _slices(m: int, threads: int) -> int:
    """Into how many slices ``combine`` cuts the rows."""
    wanted = COMBINE_THREADS // max(threads, 1)
    return max(1, min(wanted, m // COMBINE_ROWS, LARGEST_GRID_Y))


def sum_parts(
    partial: Array, base: Array | None, alpha: float, shape: tuple[int, ...], name: str, g: Array
) -> Array:
    """alpha·base + the sum of the parts, (parts, n), as an array of this shape and dtype."""
    parts, n = partial.shape
    held = cuda_machine.current.borrow(partial)
    added = held if base is None else cuda_machine.current.receive(base)
    out = cuda_machine.current.empty(shape, name, g)
    added_name = "float64" if base is None else dtype_name(base.dtype)
    launch(
        "sum.cu",
        "sum_parts",
        {"X_T": STORAGE[added_name], "OUT_T": STORAGE[name]},
        (-(-n // 32),),
        (32, 8),
        held,
        added,
        np.float64(alpha),
        cuda_machine.current.borrow(out),
        np.int32(parts),
        np.int64(n),
    )
    return out


def replace(inverse: Array, gram: Array, i: int, row: Array, shift: float) -> Array:
    """Exchange row and column i of the Gram, and of (shift·I + Gram)⁻¹, both in place.

    Returns the int32 array [0], or [1] where rounding forbade it and the inverse is as it was.
    """
    m = inverse.shape[0]
    with cuda_machine.current.at(inverse):
        scratch = cuda_machine.current.borrow(
            cuda_machine.current.empty((2, m), "float64", inverse)
        )
        failed = cuda_machine.current.empty((1,), "int32", inverse)
        held, fresh = cuda_machine.current.borrow(inverse), cuda_machine.current.borrow(row)
        size, index = np.int32(m), np.int32(i)
        groups = (-(-m // 8),)
        launch(
            "dual.cu", "dual_products", {}, groups, (256,),
            held, fresh, scratch[0], scratch[1], size, index,
        )  # fmt: skip
        launch(
            "dual.cu", "dual_update", {}, groups, (256,),
            held, cuda_machine.current.borrow(gram), fresh, scratch[0], scratch[1],
            cuda_machine.current.borrow(failed), np.float64(shift), size, index,
        )  # fmt: skip
        return failed


def later(x: Array) -> Callable[[], Any]:
    """See :func:`mfac_core._ops.rows.later`."""
    return cuda_machine.current.later(x)


def _columns(x: Array) -> int:
    return 1 if x.ndim == 1 else int(x.shape[1])


def _width(d: int, *operands: tuple[Any, Any]) -> int:
    """Elements of G a thread takes at a time: four, or less where rows do not start there."""
    (_, dtype), *_ = operands
    if any(array.data.ptr % LOAD_BYTES for array, _ in operands):
        return 1
    width = min(LOAD_ELEMENTS, LOAD_BYTES // itemsize(dtype))
    while d % width:
        width //= 2
    return width
