"""Steps of matrices that go as far in every direction."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from mfac_core._arrays import Array
from mfac_core._scale_free import NEWTON_SCHULZ


@jax.jit  # type: ignore[untyped-decorator]
def evened(x: Array) -> Array:
    """Return x with its singular values made about equal, at the length that x has.

    Elements that are exactly zero stay so; those that are far below rounding beside the whole
    become so.

    Parameters
    ----------
    x : array, shape (r, ...)
        Real; taken as a matrix (r, c).
    """
    if not x.size:
        return x
    whole = x.reshape(x.shape[0], -1).astype(jnp.promote_types(x.dtype, jnp.float32))
    y, largest, length = _at_length_one(whole)
    y = jnp.where(jnp.abs(y) > jnp.finfo(y.dtype).tiny ** 0.25, y, 0.0)  # as in PyTorch
    is_tall = y.shape[0] > y.shape[1]
    y = y.T if is_tall else y

    def turn(y: Array, coefficients: Array) -> tuple[Array, None]:
        a, b, c = coefficients
        gram = jnp.matmul(y, y.T, precision="highest")
        polynomial = b * gram + c * jnp.matmul(gram, gram, precision="highest")
        return a * y + jnp.matmul(polynomial, y, precision="highest"), None

    y, _ = lax.scan(turn, y, jnp.asarray(NEWTON_SCHULZ, y.dtype))  # compiled once, not five times
    y = (y.T if is_tall else y) * (whole != 0.0)
    return (_at_length_one(y)[0] * length * largest).reshape(x.shape).astype(x.dtype)


def _at_length_one(x: Array) -> tuple[Array, Array, Array]:
    """Return x/‖x‖, largest and ‖x/largest‖: by the largest first, so no square leaves float32."""
    largest = jnp.max(jnp.abs(x))
    largest = jnp.where(largest > jnp.finfo(jnp.float32).tiny, largest, 1.0)
    x = x / largest
    length = jnp.sqrt(jnp.sum(jnp.square(x)))
    return x / jnp.where(length == 0.0, 1.0, length), largest, length
