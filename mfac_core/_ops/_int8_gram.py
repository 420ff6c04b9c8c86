"""A Gram with a certificate: float64 digits of float32 rows from products of int8 matrices.

Matrix engines multiply int8 fast and exactly, also on cards that have little float64. Here a row is
cut, 512 columns at a time, into slices of seven bits with a scale of its own, their products are
exact integers, and the products of different scales are summed in float64. What is dropped is known
to be small beforehand, from the scales alone: that is the certificate.

This is the NumPy reference, in which the exact products are float32 ones of small integers, and on
CuPy the same by int8 products of cuBLAS, a body of :func:`mfac_core._ops.rows.gram`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mfac_core._arrays import Array, Home, is_cupy_array, itemsize, widen
from mfac_core._ops._blocks import column_slices
from mfac_core._ops.cuda import machine as cuda_machine

ON_CARDS = False
"""Whether CuPy's Grams go this way: no card has shown yet that it wins over a float64 product.

By counting: for each block of 512 columns cuBLAS writes, and the sum reads, nine matrices of int32,
72 bytes for an element of the Gram, where a float64 product takes 1,024 operations. So a card wins
if its memory moves a byte in the time of 14 float64 operations: with little float64 by far, with
much of it hardly, unless the matrices stay in L2. ``examples/benchmarks/gpu.py`` measures both.
"""

COLUMNS = 512
"""Columns that share a row's scale: exact in float32 too, and few enough that scales fit well."""

BITS = 7
SLICES = 5
"""Slices of a row: of 35 bits, where float32 has 24 below each number's own scale."""

ROWS = 4
"""What cuBLAS wants the rows of an int8 product to be a multiple of; zeros fill them up."""

CUDA_R_8I, CUDA_R_32I = 3, 10
"""CUDA's numbers of the two types; CuPy names the first alone."""

DROPPED = (SLICES + 2) * 2.0 ** (-BITS * SLICES)
"""Error of a product of two numbers relative to their scales; see :func:`gram`."""

Multiply = Callable[[Array, Array], Array]


def serves(g: Array) -> bool:
    """Whether a Gram goes this way: CuPy's, of at most 32 bits, where it is known to win."""
    return ON_CARDS and is_cupy_array(g) and itemsize(g.dtype) <= 4


def gram(g: Array, home: Home) -> tuple[Array, Array]:
    """G Gᵀ as float64 in ``home``, and a bound on its error.

    Parameters
    ----------
    g : (m, d) array
        Of NumPy or CuPy, and at most 32 bits a number.
    home : Home
        Where the result goes.

    Returns
    -------
    (m, m) array, (m,) array
        The Gram, symmetric to the last bit, and e ≥ 0 with |computed − exact|ᵢⱼ ≤ eᵢ eⱼ. A row that
        is not finite has NaN in its row and column, and in e.

    Notes
    -----
    In a block of n ≤ 512 columns, σᵢ is the smallest power of two above all |gᵢₖ|. Slice s = 1 … p
    takes what the slices before have left, in units of w_s = σ 2^(1−7s), to the nearest integer
    q_s. What is then left is |R_s| ≤ w_s/2 = σ 2^(−7s), so that |q_s| ≤ 64 and |a_s| = |w_s q_s| ≤
    σ 2^(−7(s−1)); all of it is exact in float64. Kept are the products of slices s of row i and t
    of row j with s + t ≤ p + 1. They add up to Σ_s a_s (gⱼ − R_{p+1−s}), and gᵢ gⱼ misses

        R_p gⱼ + Σ_{s=1}^p a_s R_{p+1−s},   at most (p + 1) 2^(−7p) σᵢ σⱼ,

    since each of its p + 1 terms is at most σᵢ σⱼ 2^(−7p).
    Products of slices are integers, of at most 512·64² = 2²¹; up to five of equal weight are
    added, which is less than 2²⁴; and all of them together, brought to one scale, are less than
    2⁵³: exact in int32, float32 and float64 in turn. The sum over b blocks, each of at most
    2nσᵢσⱼ, is rounded, and off by at most b 2⁻⁵² Σ nσᵢσⱼ. By Cauchy's inequality Σ nσᵢσⱼ ≤ SᵢSⱼ
    with Sᵢ² = Σ nσᵢ²: hence e = S √((p + 2) 2^(−7p) + b 2⁻⁵²), with a unit for its own rounding.

    Nine products of slices take the place of fifteen, since that of (t, s) is the transpose of that
    of (s, t). Cutting by rounding, so that no product has an error, is S. M. Rump, T. Ogita and
    S. Oishi's splitting; for matrix engines H. Ootomo, K. Ozaki and R. Yokota, "DGEMM on integer
    matrix multiplication unit", arXiv 2306.11975.
    """
    if not is_cupy_array(g):
        total, bound = summed(g, np, exact_float32, "float32")
    else:
        xp: Any = importlib.import_module("cupy")
        with cuda_machine.current.at(g):
            total, bound = summed(
                g, xp, lambda a, b: int8_product(a, b, xp.empty((len(a), len(b)), "int32")), "int8"
            )
    return home.receive(total), home.receive(bound)


def summed(g: Array, xp: Any, multiply: Multiply, dtype: str) -> tuple[Array, Array]:
    """Return the Gram and the bound, by exact products of slices that are held in a dtype."""
    m, d = g.shape
    total, squares, blocks = xp.zeros((m, m)), xp.zeros(m), 0
    for columns in column_slices(d, COLUMNS):
        slices, scale = cut(widen(g[:, columns]), xp, dtype)
        total += whole(slices, multiply)[:m, :m] * scale[:, None] * scale
        squares += (columns.stop - columns.start) * scale**2
        blocks += 1
    total *= 2.0 ** (2 - BITS * (SLICES + 1))  # the last weight that is kept, beside σᵢσⱼ
    return total, xp.sqrt(squares) * (DROPPED + blocks * 2.0**-52) ** 0.5


def cut(block: Array, xp: Any, dtype: str) -> tuple[Array, Array]:
    """Cut a block, (m, n) in float64, into integers, (SLICES, m or more, 512), and σ, (m,)."""
    m, n = block.shape
    peak = abs(block).max(axis=1)
    finite = xp.isfinite(peak)
    exponent = xp.frexp(xp.where(finite, peak, 0.0))[1]
    one = xp.ones(m)
    rest = xp.where(finite[:, None], block, 0.0) * xp.ldexp(one, BITS - 1 - exponent)[:, None]
    slices = xp.zeros((SLICES, -(-m // ROWS) * ROWS, COLUMNS), dtype)
    for s in range(SLICES):
        nearest = xp.rint(rest)
        slices[s, :m, :n] = nearest
        rest = (rest - nearest) * 2.0**BITS
    scale = xp.where(peak == 0.0, 0.0, xp.ldexp(one, exponent))
    return slices, xp.where(finite, scale, xp.nan)


def whole(slices: Array, multiply: Multiply) -> Array:
    """Return the sum of the products that are kept, an integer in units of the last of them."""
    total: Any = 0.0
    for order in range(SLICES):
        # Of equal weight; of a pair and its reverse only one is multiplied.
        pairs = [multiply(slices[s], slices[order - s]) for s in range((order + 1) // 2)]
        alike = [multiply(slices[order // 2], slices[order // 2])] if order % 2 == 0 else []
        total = total * 2.0**BITS + sum([*pairs, *(pair.T for pair in pairs), *alike])
    return total


def exact_float32(a: Array, b: Array) -> Array:
    """Return a bᵀ, of integers whose sums stay below 2²⁴, as float64."""
    return (a @ b.T).astype("float64")


def int8_product(a: Array, b: Array, out: Array) -> Array:
    """Write a bᵀ to ``out``, int32, for CuPy's C-contiguous a and b of int8; and return it.

    cuBLAS counts along columns: what it sees are aᵀ, bᵀ and outᵀ, and outᵀ = (bᵀ)ᵀ (aᵀ), the form
    that its int8 engines take, with rows that start at multiples of four bytes.
    """
    cupy: Any = importlib.import_module("cupy")
    cublas: Any = importlib.import_module("cupy_backends.cuda.libs.cublas")
    one, zero = np.ones(1, "int32"), np.zeros(1, "int32")
    handle = cupy.cuda.device.get_cublas_handle()
    cublas.gemmEx(
        handle, cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, len(b), len(a), a.shape[1],
        one.ctypes.data, b.data.ptr, CUDA_R_8I, b.shape[1],
        a.data.ptr, CUDA_R_8I, a.shape[1], zero.ctypes.data, out.data.ptr, CUDA_R_32I, len(b),
        cublas.CUBLAS_COMPUTE_32I, cublas.CUBLAS_GEMM_DEFAULT,
    )  # fmt: skip
    return out
