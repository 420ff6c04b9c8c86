"""M-FAC as optax transformations; needs optax.

optax's own parts compose with it: schedules, ``optax.chain``, ``inject_hyperparams``,
``MultiSteps``, ``apply_if_finite``, ``masked``.
"""

from __future__ import annotations

import math
from typing import Any

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
from mfac_core._jax import orthogonal, scale_free, units

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
        :class:`mfac_core.functional.State`; in the scale-free form, a ``NamedTuple`` of ``count``
        and of trees like the parameters: ``gradients``, the window, and ``inverses`` and
        ``scales``. The first dimension of their arrays is the parameter's.

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
    With a damping each update reads the window twice, takes O(dm + m²) and is
    :func:`mfac_core.functional.append_matvec`: from a gradient that is not finite it makes NaN,
    and the window stays as it was. In either form, donate the state to have the window written in
    place.

    **The scale-free step** is that of :class:`mfac_core.torch.MFAC`. Gradients enter the window at
    length 1. A parameter of two or more dimensions consists of units, the slices along its first
    one: the neurons of a layer, or the filters; a vector or a scalar is one unit. F has a block for
    each unit. With û the unit's part of a gradient at length 1, it is C = 0.6 I + Σ ûᵢûᵢᵀ over the
    window, and the unit's direction is C⁻¹ûⱼ times the length of the new gradient's part. Each
    parameter's part of the direction is then brought to a root mean square of 1 over its elements
    that are not zero; less where its gradient is below 2⁻¹² of the whole's, in root mean squares,
    and so rounding.

    The step does not change when the loss is multiplied by a constant. A gradient that is not
    finite makes NaN, one of zeros makes zeros, and the window stays as it was.

    With u units of c elements in a parameter, and k = min(c, m), an update takes O(uk²) for the
    inverses, which are of u·k² elements, and two passes over the window where c > m: O(dm) at most.

    The window and its inverse are those of the dynamic algorithm of Frantar, Kurtic and Alistarh
    (NeurIPS 2021, arXiv 2107.03356); the scale-free step has it for each unit.

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

    def init(params: optax.Params) -> functional.State | units.State:
        if is_traced(window_size):
            msg = (
                "window_size must be known when init is compiled, got a traced value; name it in "
                "static_args of optax.inject_hyperparams, or call init outside of jax.jit"
            )
            raise TypeError(msg)
        if is_scale_free:
            m = check.integer(window_size, "window_size", minimum=1)
            functional._floating(dtype)
            return units.init(jax.tree.map(_shape, params), m, dtype)
        num_params = sum(math.prod(_shape(x).shape) for x in jax.tree.leaves(params))
        state = functional.init(max(num_params, 1), window_size, damping=damping, dtype=dtype)
        # Without parameters, as for a label that nobody has or optax's placeholders, of nothing.
        return state._replace(gradients=state.gradients[:, :num_params])

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        del params
        if not jax.tree.leaves(updates):
            return updates, state
        if is_scale_free:
            return _scale_free_step(updates, state)  # type: ignore[no-any-return]
        g, unravel = ravel_pytree(jax.tree.map(_as_real, updates))
        # Not the one of init: hyperparameters may change from step to step.
        state = state._replace(damping=jnp.asarray(damping, state.damping.dtype))
        state, y = functional.append_matvec(state, g)
        return jax.tree.map(_as_before, updates, unravel(y)), state

    return optax.GradientTransformation(init, update)


@jax.jit  # type: ignore[untyped-decorator]
def _scale_free_step(
    updates: optax.Updates, state: units.State
) -> tuple[optax.Updates, units.State]:
    """Return the direction, of one size for each of the parameters, and the window with g in it."""
    leaves, structure = jax.tree.flatten(updates)
    reals = [_as_real(x) for x in leaves]
    dtype = jnp.result_type(*reals)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"gradients must be floating point, got dtype {dtype}")
    gradients, length = scale_free.normalised(reals)
    taken = jnp.isfinite(length) & (length > 0.0)
    state, directions = units.exchange(state, gradients, taken)
    otherwise = jnp.where(length == 0.0, 0.0, jnp.nan)
    parts = [
        _as_before(x, jnp.where(taken, y, otherwise).astype(real.dtype))
        for x, real, y in zip(
            leaves, reals, scale_free.of_one_size(directions, gradients), strict=True
        )
    ]
    return structure.unflatten(parts), state


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    """Return what a parameter is as real numbers; it may be abstract."""
    return jax.eval_shape(_as_real, x)


def _as_real(x: Array) -> Array:
    return jnp.stack([x.real, x.imag], axis=-1) if jnp.iscomplexobj(x) else x


def _as_before(x: Array, y: Array) -> Array:
    return jax.lax.complex(y[..., 0], y[..., 1]) if jnp.iscomplexobj(x) else y


def _evened() -> optax.GradientTransformation:
    """Make the singular values of matrices equal, see :func:`mfac`."""

    def matrix(x: Array) -> Array:
        return _as_before(x, orthogonal.evened(_as_real(x))) if x.ndim > 1 else x

    return optax.stateless(lambda updates, params: jax.tree.map(matrix, updates))


def mfac(
    learning_rate: optax.ScalarOrSchedule,
    window_size: int = 64,
    damping: float | Array | None = None,
    momentum: float | Array | None = 0.9,
    weight_decay: float | Array | None = None,
    *,
    nesterov: bool | None = None,
    mask: Any = None,
    dtype: Any = "float32",
) -> optax.GradientTransformation:
    """M-FAC: the parameters move by −lr · (v + decay · w), with v = momentum · v + F⁻¹g.

    Without a damping the step is scale-free, that of :class:`mfac_core.torch.MFAC`, and lr is how
    far parameters move, see Notes. ``mfac(schedule)`` is where to start, from 0.0125 to 0.

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
    nesterov : bool, optional
        Whether to look ahead along the momentum, as in ``optax.sgd``; by default in the scale-free
        form only.
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

    Notes
    -----
    **The scale-free step.** With y the direction of :func:`scale_by_mfac`, v = momentum · v +
    (1 − momentum) · y, and the step goes along momentum · v + (1 − momentum) · y, or along v
    without ``nesterov``. Of a parameter of two or more dimensions, as a matrix whose rows are its
    units, the step is then replaced by one whose singular values are about equal, 0.7 to 1.2 of
    one size where they were not very small, with the same Frobenius norm. That takes five
    Newton–Schulz steps aX + bXXᵀX + c(XXᵀ)²X, three products of matrices each, with the
    coefficients of K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks"
    (2024). Elements that are exactly zero stay so: a pruned network stays pruned.

    As everywhere in optax, momentum also moves a parameter whose gradient is zero in a step;
    :class:`mfac_core.torch.MFAC` leaves it where it is.

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
    if nesterov is None:
        nesterov = damping is None
    parts = [scale_by_mfac(window_size, damping, dtype=dtype)]
    if momentum is not None:
        parts.append(optax.trace(momentum, nesterov))
        if damping is None:
            parts.append(optax.scale(1.0 - momentum))
    if damping is None:
        parts.append(_evened())
    if weight_decay is not None:
        parts.append(optax.add_decayed_weights(weight_decay, mask))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))
