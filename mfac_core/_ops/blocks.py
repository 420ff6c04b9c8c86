"""Many small diagonal blocks at once: their columns, products and inverses, float64, in stacks.

NumPy arrays, and JAX's and PyTorch's on the host, go by tiles and Python threads; arrays on a
device by its library's stacked products, and blocks of up to 128 columns by a kernel where there
is one.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import numpy as np
from array_api_compat import is_torch_namespace

from mfac_core._arrays import Array, Home, home_of, is_jax_array, is_torch_array, to_numpy
from mfac_core._ops import _block_host, _threads
from mfac_core._ops.cuda import blocks as cuda_blocks
from mfac_core._ops.cuda import machine as cuda_machine

HOST_BYTES = 1 << 21
"""Size of a batch on the host: what is computed of it stays in a core's cache."""

DEVICE_BYTES = 1 << 26
"""Size of a batch on a device: enough blocks to fill it."""

SMALLEST_PIVOT = 2.0**-44
"""What elimination must leave of a diagonal element for three right digits."""


class NotFinite(Exception):
    """A matrix that was to be inverted holds a NaN or an infinity."""


Item = TypeVar("Item")
Result = TypeVar("Result")


def home(like: Array) -> Home:
    """Return where blocks of gradients like these are worked on."""
    on_host = is_torch_array(like) and like.device.type == "cpu"
    if on_host and not cuda_machine.current.holds(like):
        return Home(np, "cpu")  # where its numbers are seen without a copy
    return home_of(like)


def view(where: Home, array: Array) -> Array:
    """Return an array as slices of it are cheapest: NumPy's where its memory is the host's."""
    if not where.is_numpy:
        return array
    on_cpu = is_jax_array(array) and {d.platform for d in array.devices()} == {"cpu"}
    return to_numpy(array) if on_cpu else array


def batch_bytes(where: Home) -> int:
    """Return how much to work on at a time."""
    return HOST_BYTES if where.is_numpy else DEVICE_BYTES


def each(where: Home, items: Iterable[Item], work: Callable[[Item], Result]) -> list[Result]:
    """Return ``work`` of each item in order; on the host by threads, a few items ahead.

    The items themselves, which may come out of a file, are made in the caller's thread.
    """
    workers = _threads.cores() if where.is_numpy else 1
    if workers == 1:
        return [work(item) for item in items]
    results: list[Result] = []
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            if len(waiting) > 2 * workers:
                results.append(waiting.popleft().result())
            waiting.append(_threads.pool("blocks", workers).submit(work, item))
        return results + [future.result() for future in waiting]
    except BaseException:
        for future in waiting:
            future.cancel()
        wait(waiting)
        raise


def split(where: Home, block: Array, size: int, positions: Any = None) -> Array:
    """Return columns of blocks, float64 (n, m, size), of an (m, width) array of any library.

    All of them in order, or those at ``positions`` (n, size).
    """
    m = int(block.shape[0])
    if where.is_numpy:
        narrow = to_numpy(block)
        if positions is not None:
            narrow = np.take(narrow, positions.ravel(), axis=1)
        wide = np.empty((narrow.shape[1] // size, m, size))
        np.copyto(wide, narrow.reshape(m, -1, size).transpose(1, 0, 2))
        return wide
    if positions is not None:
        flat = where.xp.asarray(positions.ravel(), device=where.device)
        block = where.xp.take(block, flat, axis=1)
    stacked = where.xp.permute_dims(where.xp.reshape(block, (m, -1, size)), (1, 0, 2))
    return where.receive(stacked)


def received(where: Home, x: Array) -> Array:
    """Return an array of whatever home in this one."""
    return to_numpy(x) if where.is_numpy else where.receive(x)


def multiply(where: Home, a: Array, b: Array) -> Array:
    """Return the products of two stacks."""
    return _block_host.multiply(a, b) if where.is_numpy else a @ b


def stream(where: Home, stack: Array, x: Array) -> Array:
    """Return the products of a stack that has to come from memory."""
    if where.is_numpy and x.shape[2] == 1:
        return _block_host.stream(stack, x)
    return multiply(where, stack, x)


def square(where: Home, a: Array) -> Array:
    """Return a aᵀ for a stack."""
    return _block_host.square(a) if where.is_numpy else a @ transposed(a)


def shifted(where: Home, a: Array, shift: float) -> Array:
    """Return a + shift·I for a stack that nobody else holds: one of NumPy is overwritten."""
    n, size, _ = a.shape
    if not where.is_numpy:
        return a + shift * where.eye(int(size))
    a = np.ascontiguousarray(a)
    a.reshape(n, size * size)[:, :: size + 1] += shift
    return a


def transposed(a: Array) -> Array:
    """Return the transposes of a stack."""
    return a.swapaxes(-1, -2) if isinstance(a, np.ndarray) else a.mT


def dot(where: Home, a: Array, b: Array) -> Array:
    """Return Σᵢ aᵢⱼ bᵢⱼ for each matrix and column of two stacks, (n, j)."""
    if where.is_numpy:
        return np.einsum("nij,nij->nj", a, b)
    return where.xp.sum(a * b, axis=1)


def inverse_factor(where: Home, a: Array, lowest: float) -> tuple[Array, bool]:
    """Return R with a⁻¹ = RᵀR for a stack of matrices, and whether some have few digits.

    No eigenvalue is below ``lowest``, but for rounding; where that makes a matrix indefinite its
    eigenvalues are raised to it.
    """
    diagonal = where.xp.linalg.diagonal(a)
    if not bool(where.xp.all(where.xp.isfinite(diagonal))):
        raise NotFinite
    factor = _triangles(where, a)
    if factor is None:
        values, vectors = where.xp.linalg.eigh(a)
        values = where.xp.clip(values, lowest, None)
        return transposed(vectors) / where.xp.sqrt(values)[..., None], True
    pivots = where.xp.linalg.diagonal(factor)
    smallest = where.xp.min(1.0 / (pivots * pivots * diagonal))
    return factor, bool(smallest < SMALLEST_PIVOT)


def _triangles(where: Home, a: Array) -> Array | None:
    """Return the inverses of the Cholesky factors, or None where there are none."""
    if where.is_numpy:
        try:
            return _block_host.inverse_factor(a)
        except np.linalg.LinAlgError:
            return None
    eye = where.eye(int(a.shape[1]))
    if is_torch_namespace(where.xp):
        linalg = sys.modules["torch"].linalg
        lower, info = linalg.cholesky_ex(a)
        if bool((info != 0).any()):
            return None
        return linalg.solve_triangular(lower, eye.expand(a.shape), upper=False)
    try:
        lower = where.xp.linalg.cholesky(a)
    except Exception as error:  # each library has its own LinAlgError
        if "LinAlgError" in type(error).__name__:
            return None
        raise
    if not bool(where.xp.all(where.xp.isfinite(lower))):  # as CuPy marks a failure
        return None
    return where.xp.linalg.solve(lower, where.xp.broadcast_to(eye, a.shape))


def inverts(where: Home, like: Array, size: int) -> bool:
    """Whether :func:`inverses` takes blocks of this size of gradients like these."""
    if where.is_numpy or not cuda_machine.current.holds(like):
        return False
    some = where.xp.zeros((1, size), dtype=like.dtype, device=where.device)
    return cuda_blocks.serves_blocks(some, size)


def inverses(where: Home, block: Array, size: int, damping: float) -> Array | None:
    """Return (λI + GᵀG/m)⁻¹ for blocks of columns of one size by a kernel.

    None where there is none for them, or rounding forbids it.
    """
    if where.is_numpy or not cuda_machine.current.holds(block):
        return None
    block = cuda_machine.current.contiguous(block)
    if not cuda_blocks.serves_blocks(block, size):
        return None
    m, width = (int(n) for n in block.shape)
    result, failed = cuda_blocks.inverses(block, np.full(width // size, size), damping, m)
    xp = where.xp
    sound = bool(xp.all(xp.isfinite(result))) and not bool(xp.any(failed != 0))
    return result if sound else None


def product(where: Home, matrices: Array, x: Array, dtype: Any) -> Array | None:
    """Return the product of one stack with a vector by a kernel, where it serves."""
    if where.is_numpy or x.ndim != 1 or not cuda_blocks.serves_product(matrices, x):
        return None
    n, size, _ = matrices.shape
    return cuda_blocks.product(matrices, np.full(n, size), x, dtype=dtype)
