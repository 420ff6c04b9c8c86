"""The scale-free step: gradients of length 1 in, steps of one size out."""

from __future__ import annotations

import jax.numpy as jnp

from mfac_core._arrays import Array
from mfac_core._scale_free import FAINT


def normalised(g: Array) -> Array:
    """Return g at length 1, whatever length it has in float32; NaN of what is not finite, or zeros.

    By a power of two first, so that no square leaves float32.
    """
    g = g.astype(jnp.promote_types(g.dtype, jnp.float32))
    exponent = jnp.frexp(jnp.max(jnp.abs(g)))[1]
    half = -exponent // 2  # 2⁻ᵉ itself may be outside of float32
    g = jnp.ldexp(jnp.ldexp(g, half), -exponent - half)
    return g / jnp.linalg.norm(g)


def of_one_size(directions: list[Array], gradients: list[Array]) -> list[Array]:
    """Scale each parameter's direction to a root mean square of min(1, r/FAINT).

    Over its elements that are not zero. Here r is the root mean square of its gradient beside that
    of all; gradients are those of length 1.
    """
    size = sum(g.size for g in gradients)
    scaled = []
    for y, g in zip(directions, gradients, strict=True):
        r = jnp.linalg.norm(jnp.ravel(g)) * (size / max(g.size, 1)) ** 0.5
        largest = jnp.max(jnp.abs(y), initial=0.0)
        unit = y / jnp.where(largest == 0.0, 1.0, largest)  # no square of it leaves float32
        length = jnp.linalg.norm(jnp.ravel(unit))
        height = jnp.sqrt(jnp.count_nonzero(unit)) * jnp.minimum(r / FAINT, 1.0)
        scaled.append((unit * (height / jnp.where(length == 0.0, 1.0, length))).astype(y.dtype))
    return scaled
