"""The scale-free step: gradients of length 1 in, steps of one size out."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp

from mfac_core._arrays import Array
from mfac_core._scale_free import FAINT


def normalised(gradients: Sequence[Array]) -> tuple[list[Array], Array]:
    """Return gradients at length 1 together, whatever length they have in float32.

    By a power of two first, so that no square leaves float32. Return also the length after that:
    0 of zeros, and not finite where a gradient is not; the gradients then mean nothing.
    """
    dtype = jnp.promote_types(jnp.result_type(*gradients), jnp.float32)
    wide = [g.astype(dtype) for g in gradients]
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(g), initial=0.0) for g in wide])
    exponent = jnp.frexp(largest)[1]
    half = -exponent // 2  # 2⁻ᵉ itself may be outside of float32
    wide = [jnp.ldexp(jnp.ldexp(g, half), -exponent - half) for g in wide]
    length = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in wide))
    return [g / length for g in wide], length


def of_one_size(directions: Sequence[Array], gradients: Sequence[Array]) -> list[Array]:
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
