"""The gradients of a model as rows that are never stored: computed anew by every product."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mfac_core import _validate as check
from mfac_core._jax.pairs import add_pairs, cross
from mfac_core._rows import tiles
from mfac_core.jax._losses import Losses, NDArray, Tree

MEMORY = 1 << 28
"""Bytes that gradients may take, by default."""

DISAGREEMENT = (
    "the model's gradients must be the same in every pass, and project(combine(c)) is not "
    "gram() @ c; look at its own derivative rules, and for what is not deterministic. Where all "
    "losses are next to 0, their gradients have no digits left but in float64: in_float64()"
)


class ModelGradients:
    """Gradients of a model's losses, a row each, of which none is ever stored.

    They go wherever an array of gradients goes, as :class:`mfac_core.GradientRows`, outside of
    JAX's transformations. A product Gx differentiates the losses of all batches forward, one Gᵀc
    backward.

    Parameters
    ----------
    params : pytree of arrays
        What is differentiated by, real floating. The columns are its leaves in the order of
        ``jax.tree.leaves``, each flattened, as of ``jax.flatten_util.ravel_pytree``.
    loss_fn : callable
        ``loss_fn(params, batch)`` returns the losses of a batch: a vector, a row for each of them,
        or a scalar, one row for the batch. It is compiled by ``jax.jit``.
    batches : iterable
        Of pytrees of arrays. Gives the same batches every time that it is gone through, such as a
        list. Batches of one shape are compiled once.
    memory : int, default 2**28
        Bytes that rows may take while the Gram matrix is formed; at least those of two batches.
        Less means that the data are gone through more often.
    progress : bool, default False
        Show a bar over the batches, where tqdm is installed.

    Attributes
    ----------
    shape : tuple of int
        (m, d).
    dtype : dtype
        The parameters', where they differ the one that holds all.
    device : jax.Device or None
        Of the parameters, None where they are on several.
    losses : numpy.ndarray, shape (m,)
        The losses, float64, that every later pass is compared with.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its form, or a loss is not finite.
    RuntimeError
        By a later pass, if its losses are not those of the first: says whether ``loss_fn`` is not
        deterministic, the batches come in another order or differ.

    See Also
    --------
    mfac_core.torch.ModelGradients : The same for PyTorch.
    mfac_core.influence.Influence : Takes it for the training samples and for the queries.

    Notes
    -----
    ``project`` goes by ``jax.jvp``; for functions with a derivative of their own that knows no
    forward mode (``jax.custom_vjp``) by the derivative of Gᵀc with respect to c: twice backward.

    ``gram`` computes the rows of as many batches as ``memory`` holds, and lets all others pass by:
    ⌈2·4·m·d / memory⌉ passes for float32. Where every array of a batch has as many entries along
    its first axis as there are losses, and a sample alone has the loss and the gradient that it has
    in its batch, by ``jax.vmap``; otherwise by a backward pass over the batch for each row. The
    Gram matrix is compared with ``project(combine(c))`` for a random c in the end.

    Products of rows are summed over 4,096 columns in their own dtype, but at least float32, and
    those sums to twice its digits, an error below 2⁻²¹‖gᵢ‖‖gⱼ‖ in float32. ``in_float64()`` runs
    all in float64, also where JAX's x64 mode is off; the operators ask for it where the damping is
    too small for less.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import mfac_core as mfac
    >>> from mfac_core.jax import ModelGradients
    >>> params = {"w": jnp.ones(2)}
    >>> batches = [jnp.array([[1.0, 0.0], [0.0, 2.0]])]
    >>> rows = ModelGradients(params, lambda params, x: jnp.square(x @ params["w"]), batches)
    >>> rows.gram()  # of the rows [2, 0] and [0, 8]
    array([[ 4.,  0.],
           [ 0., 64.]])
    >>> mfac.InverseFisher(rows, damping=1.0) @ jnp.array([3.0, 33.0])
    Array([1., 1.], dtype=float32)
    """

    def __init__(
        self,
        params: Tree,
        loss_fn: Callable[[Tree, Tree], Array],
        batches: Iterable[Tree],
        *,
        memory: int = MEMORY,
        progress: bool = False,
    ) -> None:
        if not isinstance(batches, Iterable) or isinstance(batches, Iterator):
            msg = (
                "batches must give the same batches every time, such as a list, got "
                f"{type(batches).__name__}; pass list(batches)"
            )
            raise TypeError(msg)
        if not jax.tree.leaves(params):
            msg = "params must be a pytree of arrays, got none in it"
            raise ValueError(msg)
        self._arguments = (params, loss_fn, batches)
        self._memory = check.integer(memory, "memory", minimum=1)
        self._progress = progress
        self._start(wide=False)

    def _start(self, *, wide: bool) -> None:
        self._losses = Losses(*self._arguments, wide=wide, progress=self._progress)
        self.losses = self._losses.recorded
        self.shape = len(self.losses), self._losses.width
        self.dtype = self._losses.dtype
        # JAX has no float64 outside of its x64 mode: those rows are NumPy's.
        self._xp = np if wide and not jax.config.jax_enable_x64 else jnp
        (first, *_) = jax.tree.leaves(self._losses.params)
        devices = first.devices()
        self.device = None if self._xp is np or len(devices) > 1 else next(iter(devices))
        self._has_forward_mode = True
        self._are_apart: bool | None = None

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        """Return the namespace of the arrays that products take and give."""
        return self._xp

    def __repr__(self) -> str:
        m, d = self.shape
        return f"<ModelGradients of {m} rows of {d} parameters with dtype {self.dtype}>"

    def in_float64(self) -> ModelGradients:
        """Return the same rows by passes in float64, of the parameters and of the batches.

        Returns
        -------
        ModelGradients
            Of dtype float64, with products of NumPy arrays where JAX's x64 mode is off.
        """
        wide = type(self).__new__(type(self))
        wide._arguments = self._arguments
        wide._memory, wide._progress = self._memory, self._progress
        wide._start(wide=True)
        # The first pass of the one is a later pass of the other.
        for at in self._losses.slices:
            self._losses.check(at, wide.losses[at], None)
        return wide

    # -- products --------------------------------------------------------------------------

    def project(self, x: Array) -> Array:
        """Return G x, by the derivative of the losses in the direction x.

        Parameters
        ----------
        x : array, shape (d,) or (d, k)
            A vector, or columns of vectors: a forward pass each.

        Returns
        -------
        array, shape (m,) or (m, k)
            In the rows' dtype, but at least float32.
        """
        x = check.vector_argument(x, "x", self.shape[1], ndim=(1, 2))
        out = np.zeros((self.shape[0], *x.shape[1:]))
        with self._losses.precision(), closing(self._losses.each()) as batches:
            columns = jnp.asarray(x, self.dtype).reshape(len(x), -1)
            for _, at, batch in batches:
                for j in range(columns.shape[1]):
                    losses, along = self._along(columns[:, j], batch)
                    self._losses.check(at, losses, batch)
                    out.reshape(len(out), -1)[at, j] = along
            return self._sent(out)

    def combine(self, c: Array) -> Array:
        """Return Gᵀc, by a backward pass of the losses weighted by c.

        Parameters
        ----------
        c : array, shape (m,) or (m, k)
            A vector, or columns of vectors: a backward pass each.

        Returns
        -------
        array, shape (d,) or (d, k)
            In the rows' dtype, but at least float32; sums over batches have twice its digits.
        """
        c = check.vector_argument(c, "c", self.shape[0], ndim=(1, 2))
        weights = np.asarray(c).reshape(len(c), -1)
        with self._losses.precision(), closing(self._losses.each()) as batches:
            zero = jnp.zeros(self.shape[1], jnp.promote_types(self.dtype, jnp.float32))
            sums = [(zero, zero)] * weights.shape[1]
            for _, at, batch in batches:
                for j, before in enumerate(sums):
                    losses, part = self._losses.backward(self._losses.params, weights[at, j], batch)
                    self._losses.check(at, losses, batch)
                    sums[j] = _added(before, part)
            columns = [high + low for high, low in sums]
            out = jnp.stack(columns, axis=1) if c.ndim == 2 else columns[0]
            return np.asarray(out) if self._xp is np else out

    def _along(self, x: Array, batch: Tree) -> tuple[Array, Array]:
        """Return the losses of a batch, and their derivative in the direction x."""
        params = self._losses.params
        found: tuple[Array, Array]
        if self._has_forward_mode:
            try:
                found = self._losses.forward(params, x, batch)
            except (TypeError, NotImplementedError):
                found = self._losses.twice_backward(params, x, batch)
                self._has_forward_mode = False
            return found
        found = self._losses.twice_backward(params, x, batch)
        return found

    def _sent(self, values: NDArray) -> Array:
        return self._xp.asarray(values, dtype=jnp.promote_types(self.dtype, jnp.float32))

    # -- the Gram matrix -------------------------------------------------------------------

    def gram(self) -> Array:
        """Return G Gᵀ, from tiles of rows.

        Returns
        -------
        array, shape (m, m)
            In float64: of NumPy where JAX's x64 mode is off.

        Raises
        ------
        RuntimeError
            If it is not that of ``project`` and ``combine``.
        """
        m, batches = self.shape[0], len(self._losses.slices)
        gram = np.zeros((m, m))
        for rows, held, at, parts in tiles.pairs(self._passes, batches, _size, self._memory):
            block = self._block(held, parts)
            gram[rows, at], gram[at, rows] = block, block.T
        return self._agreed((gram + gram.T) / 2, self)

    def cross(self, other: ModelGradients) -> Array:
        """Return G Hᵀ for the rows H of other losses of the same parameters, as queries are.

        Parameters
        ----------
        other : ModelGradients
            Of parameters of the same structure and shapes.

        Returns
        -------
        array, shape (m, q)
            In float64: of NumPy where JAX's x64 mode is off.

        Raises
        ------
        ValueError
            If the parameters have another structure, or other shapes.
        RuntimeError
            See the class.
        """
        shapes = [jax.tree.map(jnp.shape, rows._losses.params) for rows in (self, other)]
        if shapes[0] != shapes[1]:
            msg = f"other must be of parameters of shapes {shapes[0]}, got {shapes[1]}"
            raise ValueError(msg)
        products = np.zeros((self.shape[0], other.shape[0]))
        crossings = tiles.crossings(self._passes, other._passes, _size, self._memory)
        for at, parts, columns, others in crossings:
            products[at, columns] = self._block(parts, others)
        return self._agreed(products, other)

    def _passes(self, start: int) -> Generator[tuple[int, slice, list[Array]]]:
        # The precision is set batch by batch: it would hold for whoever is in between.
        with closing(self._losses.each(start)) as batches:
            for i, at, batch in batches:
                with self._losses.precision():
                    rows = self._rows(at, batch)
                yield i, at, rows

    def _rows(self, at: slice, batch: Tree) -> list[Array]:
        """Return the gradients of a batch, (rows, n) for each parameter."""
        params, count = self._losses.params, at.stop - at.start
        rows: list[Array]
        if self._are_apart is not False and count > 1 and _has_samples(batch, count):
            try:
                losses, rows = self._losses.apart(params, batch)
            except (TypeError, ValueError, IndexError):  # a loss that takes no sample alone
                self._are_apart = False
            else:
                if self._are_apart is None:
                    self._are_apart = self._explain(rows, batch)
                if self._are_apart and self._losses.are_recorded(at, losses):
                    return rows
                self._are_apart = False
        losses, rows = self._losses.one_by_one(params, batch)
        self._losses.check(at, losses, batch)
        return rows

    def _explain(self, rows: list[Array], batch: Tree) -> bool:
        """Whether the gradients of samples alone are those of the batch, on two rows."""
        squares = sum(jnp.sum(jnp.square(part), axis=1) for part in rows)
        largest = float(jnp.sqrt(jnp.max(squares)))
        for i in (0, len(rows[0]) - 1):
            unit = np.zeros(len(rows[0]))
            unit[i] = 1.0
            _, expected = self._losses.backward(self._losses.params, unit, batch)
            found = jnp.concatenate([part[i] for part in rows])
            if not float(jnp.linalg.norm(found - expected)) <= self._losses.tolerance() * largest:
                return False
        return True

    def _block(self, rows: list[Array], others: list[Array]) -> NDArray:
        with self._losses.precision():
            parts = np.asarray(_crossed(rows, others), np.float64)
        block: NDArray = parts.sum(axis=(0, 1))
        return block

    def _agreed(self, products: NDArray, other: ModelGradients) -> Array:
        """Return GHᵀ if (GHᵀ)c is G(Hᵀc) for a random c.

        Errors are relative to ‖gᵢ‖‖Hᵀc‖; or to that of a typical row, for those of samples that are
        fitted to the last digit: 1 − p has none left there.
        """
        c = np.random.default_rng(0).standard_normal(products.shape[1])
        y = other.combine(c)
        expected = np.asarray(self.project(y), np.float64)
        if other is self:
            squares = np.maximum(np.diagonal(products), 0.0)
            sizes = (np.sqrt(squares) + np.sqrt(np.mean(squares))) * float(np.linalg.norm(y))
        else:
            sizes = np.linalg.norm(expected)
        allowed = 8.0 * self._losses.tolerance() * sizes + np.finfo(np.float64).tiny
        # What is not finite is for the operators to refuse, by its rows.
        if bool(np.any(np.abs(products @ c - expected) > allowed)):
            raise RuntimeError(DISAGREEMENT)
        return jnp.asarray(products) if jax.config.jax_enable_x64 else products


@jax.jit  # type: ignore[untyped-decorator]
def _added(total: tuple[Array, Array], part: Array) -> tuple[Array, Array]:
    part = part.astype(total[0].dtype)
    return add_pairs(total, (part, jnp.zeros_like(part)))


@jax.jit  # type: ignore[untyped-decorator]
def _crossed(rows: list[Array], others: list[Array]) -> Array:
    return jnp.stack([cross(g, h) for g, h in zip(rows, others, strict=True)])


def _size(rows: list[Array]) -> int:
    return sum(int(part.nbytes) for part in rows)


def _has_samples(batch: Tree, count: int) -> bool:
    """Whether all arrays of a batch have an entry for each of its losses."""
    return all(np.ndim(x) > 0 and np.shape(x)[0] == count for x in jax.tree.leaves(batch))
