"""Losses as functions of parameters, their derivatives, and whether every pass sees the same."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree

from mfac_core._progress import track
from mfac_core._rows.passes import difference
from mfac_core._validate import NonFiniteError

NDArray = np.ndarray[Any, Any]
Tree = Any


class Losses:
    """The losses of all rows, batch by batch, and their derivatives by all parameters.

    Parameters
    ----------
    params : pytree
        Of floating arrays.
    loss_fn : callable
        From parameters and batch to a scalar or a vector of losses.
    batches : iterable
        The same ones in every pass.
    wide : bool
        Whether parameters, and what is floating of the batches, are taken to float64.
    progress : bool
        Whether passes show a bar.
    """

    def __init__(
        self,
        params: Tree,
        loss_fn: Callable[[Tree, Tree], Array],
        batches: Iterable[Tree],
        *,
        wide: bool,
        progress: bool,
    ) -> None:
        self.loss_fn, self._batches = loss_fn, batches
        self._wide, self._progress = wide, progress
        with self.precision():
            self.params = jax.tree.map(self._parameter, params)
            flat, self._unravel = ravel_pytree(self.params)
            self.dtype, self.width = np.dtype(flat.dtype), len(flat)
        self._losses = jax.jit(self._of)
        self.forward = jax.jit(self._forward)
        self.twice_backward = jax.jit(self._twice_backward)
        self.backward = jax.jit(self._backward)
        self.one_by_one = jax.jit(self._one_by_one)
        self.apart = jax.jit(self._apart)
        self.recorded: NDArray = np.zeros(0)
        self.slices: list[slice] = []
        self._record()

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of all passes: products that keep the digits of their dtype."""
        stack = contextlib.ExitStack()
        stack.enter_context(jax.default_matmul_precision("highest"))
        if self._wide:
            stack.enter_context(jax.enable_x64(True))
        return stack

    def each(self, start: int = 0) -> Generator[tuple[int, slice, Tree]]:
        """Yield batches from one on, with the rows they are; checked for their number."""
        done = -1
        for done, batch in enumerate(self._tracked()):
            if done >= len(self.slices):
                break
            if done >= start:
                yield done, self.slices[done], self._taken(batch)
        if done + 1 != len(self.slices):
            msg = f"batches must be the same in every pass, got {len(self.slices)} and then others"
            raise RuntimeError(msg)

    # -- functions of the parameters -------------------------------------------------------

    def _of(self, params: Tree, batch: Tree) -> Array:
        losses = self.loss_fn(params, batch)
        is_array = isinstance(losses, jax.Array) and jnp.issubdtype(losses.dtype, jnp.floating)
        if not is_array or losses.ndim > 1:
            got = getattr(losses, "shape", type(losses).__name__)
            msg = (
                "loss_fn(params, batch) must return a real scalar, a row for the batch, or a "
                f"vector, a row for each of its losses, got {got}"
            )
            raise TypeError(msg)
        return losses.reshape(-1)

    def _forward(self, params: Tree, x: Array, batch: Tree) -> tuple[Array, Array]:
        """Return the losses of a batch, and their derivative in the direction x."""
        direction = self._unravel(x)
        found: tuple[Array, Array] = jax.jvp(lambda p: self._of(p, batch), (params,), (direction,))
        return found

    def _twice_backward(self, params: Tree, x: Array, batch: Tree) -> tuple[Array, Array]:
        """Differentiate ⟨Gᵀc, x⟩ by c."""
        losses, back = jax.vjp(lambda p: self._of(p, batch), params)
        direction = self._unravel(x)

        def product(c: Array) -> Array:
            pairs = jax.tree.map(lambda g, v: jnp.sum(g * v), back(c)[0], direction)
            return sum(jax.tree.leaves(pairs), start=jnp.zeros((), x.dtype))

        return losses, jax.grad(product)(jnp.zeros_like(losses))

    def _backward(self, params: Tree, c: Array, batch: Tree) -> tuple[Array, Array]:
        """Return the losses of a batch, and the gradient of their sum weighted by c."""
        losses, back = jax.vjp(lambda p: self._of(p, batch), params)
        return losses, ravel_pytree(back(c.astype(losses.dtype))[0])[0]

    def _one_by_one(self, params: Tree, batch: Tree) -> tuple[Array, list[Array]]:
        """Return the losses of a batch, and the gradient of each, (rows, n) for each parameter."""
        losses, back = jax.vjp(lambda p: self._of(p, batch), params)
        rows = jax.lax.map(lambda unit: back(unit)[0], jnp.eye(len(losses), dtype=losses.dtype))
        return losses, _flattened(rows)

    def _apart(self, params: Tree, batch: Tree) -> tuple[Array, list[Array]]:
        """Return the same where the samples of a batch do not know of one another."""

        def one(params: Tree, sample: Tree) -> Array:
            (loss,) = self._of(params, jax.tree.map(lambda x: x[None], sample))
            return loss

        losses, rows = jax.vmap(jax.value_and_grad(one), (None, 0))(params, batch)
        return losses, _flattened(rows)

    # -- the same in every pass ------------------------------------------------------------

    def check(self, at: slice, losses: Array, batch: Tree) -> None:
        """Raise where the losses of a batch are not those of the first pass; says why."""
        if self.are_recorded(at, losses):
            return
        now = np.asarray(losses, np.float64)
        was = difference(at, now, self.recorded)
        msg = f"batches must give the same losses in every pass, {was}: {self._why(now, batch)}"
        raise RuntimeError(msg)

    def are_recorded(self, at: slice, losses: Array) -> bool:
        """Whether losses are those of the first pass."""
        return self._same(np.asarray(losses, np.float64), self.recorded[at])

    def tolerance(self) -> float:
        """Return the difference that rounding may make, relative: half of the digits."""
        eps = float(jnp.finfo(self.dtype).eps)
        return math.sqrt(eps)

    def _same(self, now: NDArray, then: NDArray) -> bool:
        if len(now) != len(then):
            return False
        scale = np.mean(np.abs(self.recorded))
        return bool(np.all(np.abs(now - then) <= self.tolerance() * (np.abs(then) + scale)))

    def _why(self, now: NDArray, batch: Tree) -> str:
        if batch is None:
            return "the passes in float64 and in the parameters' own dtype differ"
        # Not compiled: what is random by other means than JAX's was drawn once for all.
        again = [np.asarray(self._of(self.params, batch), np.float64) for _ in range(2)]
        if not self._same(*again):
            return "loss_fn is not deterministic; two calls with one batch differ"
        known = np.min(np.abs(now[:, None] - self.recorded), axis=1)
        if self._same(known, np.zeros_like(known)):
            return "they come in another order; shuffle them once, before"
        return "the data, or what loss_fn reads beside them, differ; use no random augmentation"

    def _record(self) -> None:
        found: list[NDArray] = []
        start = 0
        with self.precision():
            for batch in self._tracked():
                losses = np.asarray(self._losses(self.params, self._taken(batch)), np.float64)
                if not np.all(np.isfinite(losses)):
                    msg = f"losses must be finite, got NaN or infinity in batch {len(found)}"
                    raise NonFiniteError(msg)
                self.slices.append(slice(start, start + len(losses)))
                start += len(losses)
                found.append(losses)
        if not start:
            msg = "batches must hold at least one batch with a loss, got none"
            raise ValueError(msg)
        self.recorded = np.concatenate(found)

    def _tracked(self) -> Iterable[Tree]:
        return track(self._batches, "batches") if self._progress else self._batches

    def _parameter(self, p: Any) -> Array:
        if not hasattr(p, "dtype") or not jnp.issubdtype(p.dtype, jnp.floating):
            msg = (
                "params must be a pytree of real floating arrays, got a leaf of "
                f"{getattr(p, 'dtype', type(p).__name__)}; close loss_fn over all else"
            )
            raise TypeError(msg)
        p = jnp.array(p) if isinstance(p, np.ndarray) else p  # which may be written to meanwhile
        return p.astype(jnp.float64) if self._wide else p

    def _taken(self, batch: Tree) -> Tree:
        if not self._wide:
            return batch

        def widened(x: Any) -> Any:
            is_narrow = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
            return x.astype(jnp.float64) if is_narrow else x

        with self.precision():
            return jax.tree.map(widened, batch)


def _flattened(rows: Tree) -> list[Array]:
    return [part.reshape(len(part), -1) for part in jax.tree.leaves(rows)]
