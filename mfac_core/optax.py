"""M-FAC as optax transformations; needs optax.

optax's own parts compose with it: schedules, ``optax.chain``, ``inject_hyperparams``,
``MultiSteps``, ``apply_if_finite``, ``masked``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mfac_core._extras import missing

try:
    import jax
    import jax.numpy as jnp
    import optax
    from jax import Array
    from jax.flatten_util import ravel_pytree
except ModuleNotFoundError as error:
    raise missing(error, "optax") from None

from mfac_core import _validate as check
from mfac_core import functional
from mfac_core._arrays import is_traced
from mfac_core._jax import scale_free
from mfac_core._scale_free import RIDGE

__all__ = ["mfac", "scale_by_mfac"]


def scale_by_mfac(
    window_size: int = 64, damping: float | Array | None = None, *, dtype: Any = "float32"
) -> optax.GradientTransformation:
    """Multiply the gradient by the inverse of F = λI + (1/n) Σ gᵢgᵢᵀ over a window of gradients.

    Without a damping the step is scale-free, see Notes.

    Parameters
    ----------
    window_size : int, default 64
        m, the most gradients held.
    damping : float, optional
        λ > 0. Outside the span of the window the update is g/λ, so the learning rate goes with it.
    dtype : dtype, default "float32"
        Of the window; see :func:`mfac_core.functional.init`.

    Returns
    -------
    optax.GradientTransformation
        Takes gradients of the parameters' structure, in any mixture of floating dtypes, to F⁻¹g,
        with g itself in the window; complex parameters count as pairs of real ones. Its state is a
        :class:`mfac_core.functional.State`.

    Raises
    ------
    TypeError, ValueError
        If the damping is not a positive number; by ``init``, if another argument is not of its
        form; by ``update``, if the gradients are not floating.

    See Also
    --------
    mfac : With a learning rate, momentum and weight decay.

    Notes
    -----
    Each update reads the window twice, takes O(dm + m²) and is
    :func:`mfac_core.functional.append_matvec`: from a gradient that is not finite it makes NaN,
    and the window stays as it was. Donate the state to have the window written in place.

    **The scale-free step** is that of :class:`mfac_core.torch.MFAC`: gradients enter the window at
    length 1, nλ is 0.6, and each parameter's part of F⁻¹g is brought to a root mean square of 1
    over its elements that are not zero; less where its gradient is below 2⁻¹² of the whole's, in
    root mean squares, and so rounding. It does not change when the loss is multiplied by a
    constant. A gradient of zeros gives zeros, and the window stays as it was.

    It is the dynamic algorithm of Frantar, Kurtic and Alistarh (NeurIPS 2021, arXiv 2107.03356).

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from mfac_core.optax import scale_by_mfac
    >>> transformation = scale_by_mfac(window_size=4, damping=0.5)
    >>> state = transformation.init({"w": jnp.zeros(2)})
    >>> updates, state = transformation.update({"w": jnp.array([0.0, 2.0])}, state)
    >>> updates["w"]
    Array([0. , 0.44444445], dtype=float32)
    """
    is_scale_free = damping is None
    if not is_scale_free and not is_traced(damping):
        check.positive_number(damping, "damping")

    def init(params: optax.Params) -> functional.State:
        if is_traced(window_size):
            msg = (
                "window_size must be known when init is compiled, got a traced value; name it in "
                "static_args of optax.inject_hyperparams, or call init outside of jax.jit"
            )
            raise TypeError(msg)
        num_params = sum(map(_size, jax.tree.leaves(params)))
        first = RIDGE if is_scale_free else damping
        state = functional.init(max(num_params, 1), window_size, damping=first, dtype=dtype)
        # Without parameters, as for a label that nobody has or optax's placeholders, of nothing.
        return state._replace(gradients=state.gradients[:, :num_params])

    def update(
        updates: optax.Updates, state: functional.State, params: optax.Params | None = None
    ) -> tuple[Array, functional.State]:
        del params
        if not jax.tree.leaves(updates):
            return updates, state
        reals = jax.tree.map(_as_real, updates)
        g, unravel = ravel_pytree(reals)
        if is_scale_free:
            state, y = _scale_free_step(state, g, reals)
        else:
            # Not the one of init: hyperparameters may change from step to step.
            state = state._replace(damping=jnp.asarray(damping, state.damping.dtype))
            state, y = functional.append_matvec(state, g)
        return jax.tree.map(_as_before, updates, unravel(y)), state

    return optax.GradientTransformation(init, update)


def _scale_free_step(
    state: functional.State, g: Array, parameters: Any
) -> tuple[functional.State, Array]:
    """Return the window with g in it, and the direction, of one size for each of the parameters."""
    number = jnp.minimum(state.count + 1, len(state.gradients))
    unit = scale_free.normalised(g)
    state = state._replace(damping=(RIDGE / number).astype(state.damping.dtype))
    state, y = functional.append_matvec(state, unit)
    cuts = np.cumsum([x.size for x in jax.tree.leaves(parameters)])[:-1]
    parts = scale_free.of_one_size(jnp.split(y, cuts), jnp.split(unit, cuts))
    direction = jnp.concatenate([jnp.ravel(part) for part in parts])
    return state, jnp.where(jnp.any(g != 0.0), direction, 0.0).astype(g.dtype)


def _size(x: Any) -> int:
    """Return how many real numbers a parameter has; it may be abstract."""
    return math.prod(jnp.shape(x)) * (2 if jnp.iscomplexobj(x) else 1)


def _as_real(x: Array) -> Array:
    return jnp.stack([x.real, x.imag], axis=-1) if jnp.iscomplexobj(x) else x


def _as_before(x: Array, y: Array) -> Array:
    return jax.lax.complex(y[..., 0], y[..., 1]) if jnp.iscomplexobj(x) else y


def mfac(
    learning_rate: optax.ScalarOrSchedule,
    window_size: int = 64,
    damping: float | Array | None = None,
    momentum: float | Array | None = 0.9,
    weight_decay: float | Array | None = None,
    *,
    nesterov: bool = False,
    mask: Any = None,
    dtype: Any = "float32",
) -> optax.GradientTransformation:
    """M-FAC: the parameters move by −lr · (v + decay · w), with v = momentum · v + F⁻¹g.

    Without a damping the step is scale-free, and v = momentum · v + (1 − momentum) · direction, so
    that lr is how far parameters move, as in :class:`mfac_core.torch.MFAC`.
    ``mfac(schedule)`` is where to start, from about 0.01 to 0.

    Parameters
    ----------
    learning_rate : float or schedule
        The factor lr, or a function from the step's number to it.
    window_size : int, default 64
        See :func:`scale_by_mfac`.
    damping : float, optional
        See :func:`scale_by_mfac`.
    momentum : float or None, default 0.9
        Decay rate of the sum of past steps, as in ``optax.sgd``, or of their mean in the scale-free
        form; None for none.
    weight_decay : float, optional
        Decoupled decay, times lr; none by default. With it, ``update`` needs the parameters.
    nesterov : bool, default False
        Whether to look ahead along the momentum, as in ``optax.sgd``.
    mask : pytree of bool, or a function from the parameters to one, optional
        What the decay is for, see ``optax.add_decayed_weights``; all by default.
    dtype : dtype, default "float32"
        Of the window; see :func:`mfac_core.functional.init`.

    Returns
    -------
    optax.GradientTransformation
        A chain of :func:`scale_by_mfac` and optax's ``trace``, ``add_decayed_weights`` and
        ``scale_by_learning_rate``. Chain them yourself for another order.

    Raises
    ------
    TypeError, ValueError
        See :func:`scale_by_mfac`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from mfac_core.optax import mfac
    >>> optimiser = mfac(learning_rate=0.1, window_size=4, damping=0.5, momentum=0.9)
    >>> w = jnp.zeros(2)
    >>> state = optimiser.init(w)
    >>> updates, state = optimiser.update(jnp.array([0.0, 2.0]), state)
    >>> optax.apply_updates(w, updates)
    Array([ 0.        , -0.04444445], dtype=float32)
    """
    parts = [scale_by_mfac(window_size, damping, dtype=dtype)]
    if momentum is not None:
        parts.append(optax.trace(momentum, nesterov))
        if damping is None:
            parts.append(optax.scale(1.0 - momentum))
    if weight_decay is not None:
        parts.append(optax.add_decayed_weights(weight_decay, mask))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))
