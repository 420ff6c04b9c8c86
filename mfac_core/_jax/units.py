"""The inverse of the unit-wise Fisher of a window: a block for each unit of each parameter.

A unit is a slice along a parameter's first dimension: a neuron of a linear layer, a filter of a
convolution; a vector is one. Gradients enter a unit's block at length 1, so that its Fisher, but
for its scale, is C = ridge·I + Σ ûᵢûᵢᵀ over the window's m gradients.

With units of c elements what is kept is C⁻¹ for c ≤ m, else the inverse of the dual
A = ridge·I + ÛÛᵀ, by which C⁻¹ûⱼ = ÛᵀA⁻¹eⱼ. Either is brought up to date by what a row that is
exchanged changes, of rank two. As all eigenvalues of C and A are between ridge and ridge + m,
errors of rounding do not grow: each row that is exchanged takes its own along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mfac_core._arrays import Array
from mfac_core._scale_free import RIDGE, shape_of_units


class State(NamedTuple):
    """A window of m gradients at most, and the inverses of its units.

    A plain pytree. But for ``count`` each field has the structure of the parameters, with an array
    for each, whose first dimension is that of its u units.

    Attributes
    ----------
    count : array, shape ()
        Gradients so far, int32; the next one goes into row count mod m.
    gradients : pytree of array, shape (u, m, c)
        The rows, unit by unit; those not yet used are zero. So products with a unit's rows are
        those of matrices as they lie in memory.
    inverses : pytree of array, shape (u, c, c) or (u, m, m)
        C⁻¹ for c ≤ m, else A⁻¹: float32, or float64 for float64 gradients.
    scales : pytree of array, shape (u, m)
        What brings each row to length 1; 0 for one that is not there, or zero.
    """

    count: Array
    gradients: Any
    inverses: Any
    scales: Any


def init(shapes: Any, window_size: int, dtype: Any) -> State:
    """Return an empty window.

    Parameters
    ----------
    shapes : pytree
        Of the parameters, with a ``jax.ShapeDtypeStruct`` for each.
    window_size : int
        m.
    dtype : dtype
        Of the gradients held.
    """
    m, wide = window_size, jnp.promote_types(dtype, jnp.float32)

    def inverse(x: Any) -> Array:
        u, c = shape_of_units(x.shape)
        k = min(c, m)
        return jnp.broadcast_to(jnp.eye(k, dtype=wide) / RIDGE, (u, k, k))

    def rows(x: Any) -> Array:
        u, c = shape_of_units(x.shape)
        return jnp.zeros((u, m, c), dtype)

    return State(
        jnp.zeros((), jnp.int32),
        gradients=jax.tree.map(rows, shapes),
        inverses=jax.tree.map(inverse, shapes),
        scales=jax.tree.map(lambda x: jnp.zeros((shape_of_units(x.shape)[0], m), wide), shapes),
    )


def exchange(state: State, gradients: Sequence[Array], taken: Array) -> tuple[State, list[Array]]:
    """Return the window with a gradient in place of its oldest, and the directions F⁻¹g.

    Parameters
    ----------
    state : State
        The window.
    gradients : sequence of array
        The gradient, in the order of the window's parameters; one at least.
    taken : array, shape ()
        Whether the gradient is taken; if not, nothing changes, and the directions mean nothing.

    Returns
    -------
    state : State
        The window afterwards.
    directions : list of array
        F⁻¹g but for its scale, in the shapes of the gradients.
    """
    structure = jax.tree.structure(state.scales)
    columns = [structure.flatten_up_to(field) for field in state[1:]]
    slot = state.count % columns[2][0].shape[1]
    parts = [
        _exchange(rows, inverse, scales, g, slot, taken)
        for rows, inverse, scales, g in zip(*columns, gradients, strict=True)
    ]
    *after, directions = zip(*parts, strict=True)
    count = state.count + taken.astype(jnp.int32)
    return State(count, *map(structure.unflatten, after)), list(directions)


def _exchange(
    rows: Array, inverse: Array, scales: Array, g: Array, slot: Array, taken: Array
) -> tuple[Array, Array, Array, Array]:
    u, m, c = rows.shape
    wide = inverse.dtype
    row, scale = _at(rows, slot), _at(scales, slot)
    old = row.astype(wide) * scale[:, None]
    given = jnp.where(taken, g.reshape(u, c), 0.0).astype(rows.dtype)
    stored = given.astype(wide)
    lengths = _lengths(stored)
    is_there = lengths > jnp.finfo(jnp.float32).tiny
    factor = jnp.where(is_there, 1.0 / jnp.where(is_there, lengths, 1.0), 0.0)
    new = stored * factor[:, None]
    rows = lax.dynamic_update_index_in_dim(rows, jnp.where(taken, given, row), slot, 1)
    scales = lax.dynamic_update_index_in_dim(scales, jnp.where(taken, factor, scale), slot, 1)
    if c > m:
        products = jnp.einsum("umc,uc->um", rows, new, precision="highest") * scales
        after, column = _by_dual(inverse, products, slot)
        y = jnp.einsum("um,umc->uc", column * scales, rows, precision="highest")
    else:
        after, y = _by_itself(inverse, old, new)
    y = (y * jnp.where(is_there, lengths, 0.0)[:, None]).reshape(g.shape)
    return rows, jnp.where(taken, after, inverse), scales, y


def _by_dual(inverse: Array, products: Array, slot: Array) -> tuple[Array, Array]:
    """Exchange a row and column of A: delete by K − kkᵀ/kⱼ, insert by the Schur complement.

    Return the inverse, and its column j.
    """
    is_slot = jnp.arange(inverse.shape[1]) == slot
    k = _at(inverse, slot)
    k = k / jnp.sqrt(_at(k, slot))[:, None]
    b = jnp.where(is_slot, 0.0, products)
    w = _times(inverse, b) - k * _dot(k, b)
    corner = _at(products, slot)[:, None] + RIDGE
    schur = jnp.maximum(corner - _dot(b, w), RIDGE)  # in exact arithmetic it is
    w = jnp.where(is_slot, -1.0, w) / jnp.sqrt(schur)
    column = -w / jnp.sqrt(schur)
    inverse = inverse + (_outer(w, w) - _outer(k, k))
    inverse = jnp.where(is_slot[:, None], column[:, None, :], inverse)
    return jnp.where(is_slot, column[:, :, None], inverse), column


def _by_itself(inverse: Array, old: Array, new: Array) -> tuple[Array, Array]:
    """Exchange a row by C itself; return the inverse, and C⁻¹û."""
    q, h = _times(inverse, old), _times(inverse, new)
    left = jnp.maximum(1.0 - _dot(old, q), RIDGE / (1.0 + RIDGE))
    q = q / jnp.sqrt(left)
    h = h + q * _dot(q, new)
    added = 1.0 + _dot(new, h)
    y = h / added
    h = h / jnp.sqrt(added)
    return inverse + (_outer(q, q) - _outer(h, h)), y


def _lengths(x: Array) -> Array:
    """Return the length of each row, also where squares of it leave float32."""
    largest = jnp.max(jnp.abs(x), axis=1, initial=0.0)
    unit = x / jnp.where(largest == 0.0, 1.0, largest)[:, None]
    return largest * jnp.sqrt(jnp.sum(jnp.square(unit), axis=1))


def _at(x: Array, slot: Array) -> Array:
    return lax.dynamic_index_in_dim(x, slot, 1, keepdims=False)


def _times(a: Array, x: Array) -> Array:
    return jnp.einsum("ukl,ul->uk", a, x, precision="highest")


def _dot(x: Array, y: Array) -> Array:
    return jnp.sum(x * y, axis=1, keepdims=True)


def _outer(x: Array, y: Array) -> Array:
    return x[:, :, None] * y[:, None, :]
