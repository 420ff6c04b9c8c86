"""The sliding window as pure functions, for ``jax.jit`` and everything built on it.

A window is a :class:`State` of arrays. :func:`init` makes an empty one, :func:`append`,
:func:`matvec` and :func:`append_matvec` take one and return another::

    step = jax.jit(functional.append_matvec, donate_argnums=0)
    state, y = step(state, g)

Donated, the window is written in place. :class:`mfac_core.SlidingInverseFisher` is the same
window as an object, for every array library; this module needs JAX.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from mfac_core._extras import missing

try:
    import jax
    import jax.numpy as jnp
    from jax import Array, lax
except ModuleNotFoundError as error:
    raise missing(error, "jax") from None

from mfac_core import _validate as check
from mfac_core._arrays import is_traced
from mfac_core._jax import inverse as _inverse
from mfac_core._jax import pairs as _pairs

__all__ = ["State", "append", "append_matvec", "init", "matvec"]

KEPT_FROM = 128
"""Window size from which the inverse of the dual is kept; smaller duals are factored as quickly."""

STEADY = 2.0**-16
"""Relative change of nλ under which the inverse for one is refined to that for the other."""

PATIENCE = 16
"""Steps after which an inverse is formed anew where one was not good."""


class State(NamedTuple):
    """A window of gradients, m of length d at most.

    A plain pytree: it can be donated, carried through ``lax.scan``, and saved as arrays. To change
    the damping, ``state._replace(damping=...)``.

    Attributes
    ----------
    gradients : array, shape (m, d)
        G. The i-th oldest gradient is row (oldest + i) mod m; rows not yet used are zero.
    gram : array, shape (2, m, m)
        GGᵀ as the unevaluated sum of two matrices, about twice as precise as their dtype: float32,
        or float64 for float64 gradients.
    count : array, shape ()
        Gradients held, int32.
    oldest : array, shape ()
        Row of the oldest gradient, int32.
    damping : array, shape ()
        λ > 0, in JAX's default float dtype.
    inverse : array, shape (2, m, m), or (2, 0, 0) for m < 128
        K = A⁻¹ with A = nλI + GGᵀ, a sum as ``gram`` is; of no meaning unless the next two say so.
    inverse_shift : array, shape ()
        The nλ of the last system that was solved.
    inverse_left : array, shape ()
        How many more steps ``inverse`` is good for, int32; below 0, how many steps not to form it.
    """

    gradients: Array
    gram: Array
    count: Array
    oldest: Array
    damping: Array
    inverse: Array
    inverse_shift: Array
    inverse_left: Array


def init(
    num_params: int, window_size: int, *, damping: float | Array, dtype: Any = "float32"
) -> State:
    """Return an empty window.

    Parameters
    ----------
    num_params : int
        d, the length of a gradient.
    window_size : int
        m, the most gradients held.
    damping : float
        λ > 0. A traced value is taken as it comes.
    dtype : dtype, default "float32"
        Of the gradients held. float64 needs JAX's x64 mode; a 16-bit one halves the memory between
        steps, but XLA may widen the whole window within them.

    Returns
    -------
    State
        m·d numbers of ``dtype`` and O(m²) others.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its form.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from mfac_core import functional
    >>> state = functional.init(2, 2, damping=0.5)
    >>> state = functional.append(state, jnp.array([1.0, 0.0]))
    >>> state = functional.append(state, jnp.array([0.0, 2.0]))
    >>> functional.matvec(state, jnp.array([1.0, 5.0]))
    Array([1., 2.], dtype=float32)
    """
    d = check.integer(num_params, "num_params", minimum=1)
    m = check.integer(window_size, "window_size", minimum=1)
    if not is_traced(damping):
        check.damping(damping)
    _floating(dtype)
    gradients = jnp.zeros((m, d), dtype)
    gram = jnp.zeros((2, m, m), _working_dtype(gradients))
    damping = jnp.asarray(damping, jnp.result_type(float))
    kept = m if m >= KEPT_FROM else 0
    return State(
        gradients,
        gram=gram,
        count=jnp.zeros((), jnp.int32),
        oldest=jnp.zeros((), jnp.int32),
        damping=damping,
        inverse=jnp.zeros((2, kept, kept), gram.dtype),
        inverse_shift=jnp.zeros_like(damping),
        inverse_left=jnp.zeros((), jnp.int32),
    )


def append(state: State, g: Array) -> State:
    """Return the window with a gradient added; a full one drops its oldest.

    Parameters
    ----------
    state : State
        A window.
    g : array, shape (d,)
        A gradient. Where it holds a NaN or an infinity, or its squared norm overflows the dtype of
        the Gram, nothing changes.

    Returns
    -------
    State
        The window afterwards.

    Raises
    ------
    TypeError, ValueError
        If ``g`` is not a real floating array of shape (d,).

    Notes
    -----
    One pass over the window, for the new row of the Gram.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from mfac_core import functional
    >>> state = functional.init(2, 4, damping=0.5)
    >>> state = functional.append(state, jnp.array([1.0, 2.0]))
    >>> state = functional.append(state, jnp.array([jnp.nan, 2.0]))
    >>> int(state.count)
    1
    """
    return _append_only(state, _vector(state, g, "g"))  # type: ignore[no-any-return]


def append_matvec(state: State, g: Array) -> tuple[State, Array]:
    """Return the window with a gradient added, and F⁻¹g = n Gᵀ A⁻¹ eⱼ, with j the row of g.

    Parameters
    ----------
    state : State
        A window.
    g : array, shape (d,)
        See :func:`append`.

    Returns
    -------
    state : State
        The window afterwards.
    y : array, shape (d,)
        F⁻¹g with g in the window, in the dtype of ``g``; NaN where ``g`` was not taken.

    Raises
    ------
    TypeError, ValueError
        See :func:`append`.

    See Also
    --------
    mfac_core.optax.scale_by_mfac : This step as an optax transformation.

    Notes
    -----
    Two passes over the window and, from m = 128 on, an update of A⁻¹, refined against A:
    O(dm + m²). In smaller windows, where nλ has changed, where the update's residual is too large,
    and every m steps, A is factored: O(m³); in every step under ``jax.vmap`` with x64. One pass
    less than :func:`append` and :func:`matvec`, and more accurate, since nothing is subtracted.

    Examples
    --------
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from mfac_core import functional
    >>> step = jax.jit(functional.append_matvec, donate_argnums=0)
    >>> state = functional.init(2, 2, damping=0.5)
    >>> state, y = step(state, jnp.array([0.0, 2.0]))
    >>> y
    Array([0. , 0.44444445], dtype=float32)
    """
    return _append_matvec(state, _vector(state, g, "g"))  # type: ignore[no-any-return]


def matvec(state: State, x: Array) -> Array:
    """Return F⁻¹x = (x − Gᵀ A⁻¹ G x)/λ, with F = λI + GᵀG/n and A = nλI + GGᵀ.

    Parameters
    ----------
    state : State
        A window; n is the number of gradients it holds. An empty one has F = λI.
    x : array, shape (d,)
        A vector. For several, ``jax.vmap(matvec, (None, 0))``.

    Returns
    -------
    array, shape (d,)
        In the common dtype of ``x`` and the gradients.

    Raises
    ------
    TypeError, ValueError
        If ``x`` is not a real floating array of shape (d,).

    Notes
    -----
    Two passes over the window, and O(m²) where :func:`append_matvec` has left A⁻¹, a Cholesky
    factorisation in O(m³) otherwise. The subtraction may cancel;
    for the newest gradient :func:`append_matvec` has none.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from mfac_core import functional
    >>> functional.matvec(functional.init(2, 4, damping=0.5), jnp.array([1.0, 2.0]))
    Array([2., 4.], dtype=float32)
    """
    return _matvec(state, _vector(state, x, "x"))


# Compiled here too, for those who call them one by one.


@jax.jit  # type: ignore[untyped-decorator]
def _append_matvec(state: State, g: Array) -> tuple[State, Array]:
    state, row, taken = _append(state, g)
    state, column = _renewed(state, row, taken, solve=True)
    n = _divisor(state)
    c = jnp.stack(_inverse.multiply((column[0], column[1]), (n, jnp.zeros_like(n))))
    y = _pairs.combine(state.gradients, state.gram, c)
    return state, jnp.where(taken, y, jnp.nan).astype(g.dtype)


@jax.jit  # type: ignore[untyped-decorator]
def _append_only(state: State, g: Array) -> State:
    state, row, taken = _append(state, g)
    return _renewed(state, row, taken, solve=False)[0]


@jax.jit  # type: ignore[untyped-decorator]
def _matvec(state: State, x: Array) -> Array:
    dtype = jnp.promote_types(state.gradients.dtype, x.dtype)
    wide = x.astype(state.gram.dtype)
    c = _solve(state, _pairs.project(state.gradients, wide))
    back = _pairs.combine(state.gradients, state.gram, c)
    return ((wide - back) / state.damping.astype(wide.dtype)).astype(dtype)


def _append(state: State, g: Array) -> tuple[State, Array, Array]:
    """Return the new window, the row ``g`` was meant for, and whether it was taken.

    The inverse is still that of the window before.
    """
    m = state.gradients.shape[0]
    work = state.gram.dtype
    new = g.astype(state.gradients.dtype)
    taken = jnp.isfinite(jnp.sum(jnp.square(new.astype(work))))
    row = (state.oldest + state.count) % m
    new = jnp.where(taken, new, state.gradients[row])
    gradients = lax.dynamic_update_index_in_dim(state.gradients, new, row, 0)
    products = _pairs.project(gradients, new.astype(work))
    products = jnp.where(taken, products, state.gram[:, row])
    full = state.count == m
    state = state._replace(
        gradients=gradients,
        gram=state.gram.at[:, row].set(products).at[:, :, row].set(products),
        count=jnp.where(taken & ~full, state.count + 1, state.count),
        oldest=jnp.where(taken & full, (state.oldest + 1) % m, state.oldest),
    )
    return state, row, taken


def _renewed(state: State, row: Array, taken: Array, *, solve: bool) -> tuple[State, Array]:
    """Bring the inverse up to date with a row that was replaced; return also its column of A⁻¹.

    In O(m²) where there is an inverse for this nλ. Otherwise, and where the residual says that it
    is no longer good, the system is factored, or nothing is solved and the column is of no meaning.
    An inverse is formed when nλ has been the same for a step, and anew after m steps.
    """
    shift, m = _shift(state), len(state.gradients)
    pair = _pairs.split(shift, state.gram.dtype)
    unit = jnp.zeros_like(state.gram[:, 0]).at[0, row].set(1.0)
    if not _keeps_inverse(state):
        return state, _pairs.solve(state.gram, shift, unit) if solve else unit
    steady, left = _is_steady(state), state.inverse_left

    def slide() -> tuple[Array, Array, Array]:
        inverse, column = _inverse.replaced(state.inverse, state.gram[:, :, row], row, pair)
        column, good = _inverse.refined(inverse, state.gram, pair, unit, column)
        return inverse, column, good

    usable = taken & steady & (left > 0)
    inverse, column, good = lax.cond(
        usable, slide, lambda: (state.inverse, unit, jnp.zeros((), bool))
    )
    failed = jnp.where(usable & ~good, -PATIENCE, jnp.minimum(left, 0))
    factored = taken & ~good
    if solve:
        whole = factored & steady & (left == 0)

        def factor() -> tuple[Array, Array]:
            found, formed = _pairs.column(state.gram, shift, row, factored, whole)
            return found, lax.cond(whole, lambda: formed, lambda: inverse)

        column, inverse = lax.cond(factored, factor, lambda: (column, inverse))
        waited = jnp.where(usable, failed, jnp.minimum(failed + 1, 0))
        left_after = jnp.where(whole, m, waited)
    else:
        left_after = failed
    state = state._replace(
        inverse=inverse,
        inverse_shift=jnp.where(factored, shift, state.inverse_shift),
        inverse_left=jnp.where(taken, jnp.where(good, left - 1, left_after), left),
    )
    return state, column


def _floating(dtype: Any) -> None:
    """Refuse what is not a real floating dtype."""
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except (TypeError, ValueError):
        floating = False
    if not floating:
        msg = f"dtype must be real floating point, got {dtype!r}"
        raise TypeError(msg)


def _vector(state: State, x: Any, name: str) -> Array:
    return jnp.asarray(check.vector_argument(x, name, state.gradients.shape[1]))


def _working_dtype(gradients: Array) -> Any:
    return jnp.promote_types(gradients.dtype, jnp.float32)


def _divisor(state: State) -> Array:
    """n, the number of gradients held, in the working precision."""
    return jnp.maximum(state.count, 1).astype(state.gram.dtype)


def _shift(state: State) -> Array:
    """nλ, which A has on its diagonal besides GGᵀ."""
    return _divisor(state).astype(state.damping.dtype) * state.damping


def _keeps_inverse(state: State) -> bool:
    return bool(state.inverse.shape[1])


def _is_steady(state: State) -> Array:
    """Whether nλ is that of the last system, as far as refinement does not mind."""
    shift = _shift(state)
    return jnp.abs(shift - state.inverse_shift) <= STEADY * shift


def _solve(state: State, b: Array) -> Array:
    """A⁻¹b for a pair, with A = nλI + GGᵀ."""
    shift = _shift(state)
    if not _keeps_inverse(state):
        return _pairs.solve(state.gram, shift, b)

    def by_inverse() -> tuple[Array, Array]:
        x = jnp.stack(_inverse.matvec(state.inverse, (b[0], b[1])))
        pair = _pairs.split(shift, state.gram.dtype)
        return _inverse.refined(state.inverse, state.gram, pair, b, x)

    usable = _is_steady(state) & (state.inverse_left > 0)
    x, good = lax.cond(usable, by_inverse, lambda: (b, jnp.zeros((), bool)))
    return lax.cond(good, lambda: x, lambda: _pairs.solve(state.gram, shift, b))
