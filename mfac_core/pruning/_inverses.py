"""Inverses of many small F_RR at once, in the form that is cheapest: float64 stacks in a home."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

from mfac_core._arrays import Array, Home
from mfac_core._ops import blocks as ops
from mfac_core.pruning._groups import form

Pieces: TypeAlias = tuple[Array, Array]
"""Some members of blocks: the blocks (p, 1), and the positions within them (p, k)."""


class Inverses(Protocol):
    """What is asked of the inverses of n matrices of size w."""

    doubtful: bool

    def diagonal(self) -> Array:
        """Return their diagonals, (n, w)."""

    def apply(self, x: Array) -> Array:
        """Return their products with x, (n, w)."""

    def joint(self, g: Array, z: Array) -> Array:
        """Return F_RR⁻¹ G_Rᵀz/m for the gradients (n, m, w) of these weights, and z (n, m, 1)."""

    def inner_forms(self, pieces: Pieces, x: Array) -> Array:
        """Return xᵀ([F_RR⁻¹]_QQ)⁻¹x for some members Q and x (p, k), (p,)."""


class Explicit:
    """The inverses themselves, (n, w, w)."""

    doubtful = False

    def __init__(self, home: Home, matrices: Array) -> None:
        self._home, self._matrices = home, matrices

    def diagonal(self) -> Array:
        """See :class:`Inverses`."""
        return self._home.xp.linalg.diagonal(self._matrices)

    def apply(self, x: Array) -> Array:
        """See :class:`Inverses`."""
        return ops.multiply(self._home, self._matrices, x[..., None])[..., 0]

    def joint(self, g: Array, z: Array) -> Array:
        """See :class:`Inverses`."""
        return self.apply(_combined(self._home, g, z))

    def inner_forms(self, pieces: Pieces, x: Array) -> Array:
        """See :class:`Inverses`."""
        return form(self._home, chosen_pairs(self._home, self._matrices, pieces), x)


class Primal:
    """Inverses RᵀR of F_RR = λI + G_RᵀG_R/m, from these matrices (n, w, w)."""

    def __init__(self, home: Home, matrices: Array, damping: float) -> None:
        self._home = home
        self._factor, self.doubtful = ops.inverse_factor(home, matrices, damping)

    def diagonal(self) -> Array:
        """See :class:`Inverses`."""
        return ops.dot(self._home, self._factor, self._factor)

    def apply(self, x: Array) -> Array:
        """See :class:`Inverses`."""
        half = ops.multiply(self._home, self._factor, x[..., None])
        return ops.multiply(self._home, ops.transposed(self._factor), half)[..., 0]

    def joint(self, g: Array, z: Array) -> Array:
        """See :class:`Inverses`."""
        return self.apply(_combined(self._home, g, z))

    def inner_forms(self, pieces: Pieces, x: Array) -> Array:
        """See :class:`Inverses`."""
        matrices = ops.square(self._home, chosen_columns(self._home, self._factor, pieces))
        return form(self._home, matrices, x)


class Dual:
    """Inverses (I − G_RᵀA⁻¹G_R)/λ, A = mλI + G_R G_Rᵀ, from the gradients (n, m, w)."""

    def __init__(self, home: Home, g: Array, damping: float) -> None:
        self._home, self._g, self._damping = home, g, damping
        self._m = int(g.shape[1])
        shift = self._m * damping
        dual = ops.shifted(home, ops.square(home, g), shift)
        self._factor, self.doubtful = ops.inverse_factor(home, dual, shift)
        self._white: Array = None

    def diagonal(self) -> Array:
        """See :class:`Inverses`; held to what rounding must not leave."""
        xp, white = self._home.xp, self._whitened()
        rest = 1.0 - ops.dot(self._home, white, white)
        self.doubtful = self.doubtful or bool(xp.min(rest) < ops.SMALLEST_PIVOT)
        fisher = self._damping + ops.dot(self._home, self._g, self._g) / self._m
        return xp.clip(rest / self._damping, 1.0 / fisher, 1.0 / self._damping)

    def apply(self, x: Array) -> Array:
        """See :class:`Inverses`."""
        b = ops.multiply(self._home, self._g, x[..., None])
        return (x - self.joint(self._g, b)) / self._damping

    def joint(self, g: Array, z: Array) -> Array:
        """See :class:`Inverses`: Gᵀ A⁻¹z, which subtracts nothing."""
        half = ops.multiply(self._home, self._factor, z)
        solved = ops.multiply(self._home, ops.transposed(self._factor), half)
        return ops.multiply(self._home, ops.transposed(g), solved)[..., 0]

    def inner_forms(self, pieces: Pieces, x: Array) -> Array:
        """See :class:`Inverses`.

        With V the whitened columns of Q, of k × k matrices λ(I − VᵀV)⁻¹ or, where the rows are
        fewer than k, by these: λ(I + Vᵀ(I − VVᵀ)⁻¹V).
        """
        columns = chosen_columns(self._home, self._whitened(), pieces)
        if columns.shape[1] <= self._m:
            return self._damping * form(self._home, self._rest(columns), x)
        v = ops.transposed(columns)
        z = ops.multiply(self._home, v, x[..., None])[..., 0]
        dots = self._home.xp.sum(x * x, axis=1)
        return self._damping * (dots + form(self._home, self._rest(v), z))

    def _rest(self, v: Array) -> Array:
        """Return I − vvᵀ for a stack."""
        return self._home.eye(int(v.shape[1])) - ops.square(self._home, v)

    def _whitened(self) -> Any:
        if self._white is None:
            self._white = ops.multiply(self._home, self._factor, self._g)
        return self._white


def chosen_columns(home: Home, stack: Array, pieces: Pieces) -> Array:
    """Return columns of matrices (n, i, w), as the rows of (p, k, i)."""
    blocks, at = pieces
    _, height, width = stack.shape
    flat = home.xp.reshape(ops.transposed(stack), (-1, height))
    taken = home.xp.take(flat, home.xp.reshape(blocks * width + at, (-1,)), axis=0)
    return home.xp.reshape(taken, (*at.shape, height))


def chosen_pairs(home: Home, stack: Array, pieces: Pieces) -> Array:
    """Return elements of matrices (n, w, w) for all pairs of members, (p, k, k)."""
    blocks, at = pieces
    width = int(stack.shape[1])
    places = ((blocks * width + at)[:, :, None]) * width + at[:, None, :]
    taken = home.xp.take(home.xp.reshape(stack, (-1,)), home.xp.reshape(places, (-1,)))
    return home.xp.reshape(taken, places.shape)


def _combined(home: Home, g: Array, z: Array) -> Array:
    """Return Gᵀz/m, (n, w)."""
    return ops.multiply(home, ops.transposed(g), z)[..., 0] / int(g.shape[1])
