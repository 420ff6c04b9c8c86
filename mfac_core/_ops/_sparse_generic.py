"""The passes over the entries of PyTorch's and JAX's rows: a gather, and a scatter of their own."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import array_api_extra as xpx

from mfac_core._arrays import (
    Array,
    Home,
    array_namespace,
    device,
    has_float64,
    is_jax_array,
    is_torch_array,
    send,
)
from mfac_core._ops._entries import Entries, flat, passes


def serves(values: Array, float64: bool) -> bool:
    """Whether the library has a scatter, and the precision that is asked."""
    scatters = is_torch_array(values) or is_jax_array(values)
    return scatters and (has_float64(values) or not float64)


def project(entries: Entries, x: Array, home: Home) -> Array:
    """See :func:`mfac_core._ops.sparse.project`; x is a vector."""
    products = run(_products, *entries.within(slice(None)), x, width=entries.width)
    return home.xp.sum(home.receive(products)[:, : entries.m], axis=0)


def _products(indices: Array, values: Array, x: Array, *, width: int) -> Array:
    """Multiply each block of the rows with its part of x, (d,): the results are (n, m)."""
    xp, work = array_namespace(x), _work(values)
    parts = []
    for blocks, columns in passes(values.shape, x.shape[0], width):
        some = xp.astype(values[blocks, ...], work, copy=False)
        piece = padded(xp.astype(x[columns], work, copy=False), some.shape[0] * width)
        factors = xp.take(piece, flat(indices[blocks, ...], width), axis=0)
        parts.append(xp.sum(xp.reshape(factors, some.shape) * some, axis=2))
    return xp.concat(parts, axis=0)


def combine(entries: Entries, c: Array, base: Array | None, alpha: float, dtype: Any) -> Array:
    """See :func:`mfac_core._ops.sparse.combine`; c is a vector."""
    weights = padded(c, entries.rows)  # nothing of the rows that are not in use
    weights = send(weights, entries.values, _work(entries.values))
    return run(
        _combination,
        *entries.within(slice(None)),
        weights,
        base,
        alpha,
        d=entries.d,
        width=entries.width,
        dtype=dtype,
    )


def _combination(
    indices: Array,
    values: Array,
    weights: Array,
    base: Array | None,
    alpha: float,
    *,
    d: int,
    width: int,
    dtype: Any,
) -> Array:
    xp = array_namespace(values)
    parts = []
    for blocks, columns in passes(values.shape, d, width):
        some = xp.astype(values[blocks, ...], weights.dtype, copy=False)
        terms = xp.reshape(weights[:, None] * some, (-1,))
        sums = _sums(terms, flat(indices[blocks, ...], width), some.shape[0] * width)
        sums = sums[: columns.stop - columns.start]
        if base is not None:
            sums = sums + alpha * xp.astype(base[columns], weights.dtype, copy=False)
        parts.append(sums if dtype is None else xp.astype(sums, dtype, copy=False))
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=0)


def _sums(terms: Array, indices: Array, size: int) -> Array:
    """Add each term up in its place."""
    xp = array_namespace(terms)
    zeros = xp.zeros(size, dtype=terms.dtype, device=device(terms))
    if is_jax_array(terms):
        return zeros.at[indices].add(terms)
    return zeros.index_add_(0, indices, terms)


def _work(values: Array) -> Any:
    xp = array_namespace(values)
    return xp.float64 if has_float64(values) else xp.float32


def padded(x: Array, length: int) -> Array:
    """Return a vector, with zeros up to a length."""
    missing = length - x.shape[0]
    return xpx.pad(x, (0, missing), xp=array_namespace(x)) if missing else x


def run(function: Callable[..., Any], first: Array, *others: Any, **fixed: Any) -> Any:
    """Call a function; for JAX, compiled as a whole for each choice of its keyword arguments."""
    if is_jax_array(first):
        return _compiled(function)(first, *others, **fixed)
    return function(first, *others, **fixed)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    keywords = inspect.getfullargspec(function).kwonlyargs
    compiled: Callable[..., Any] = sys.modules["jax"].jit(function, static_argnames=keywords)
    return compiled
