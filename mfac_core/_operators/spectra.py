"""What the diagonal blocks of F say of λ: likelihoods from their eigenvalues, and moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array, Home, to_numpy
from mfac_core._operators.digits import finite_gram
from mfac_core._ops import blocks as ops
from mfac_core._ops.rows import column_slices, square_norms
from mfac_core._rows.base import Rows
from mfac_core._rows.plan import WIDE_BYTES, batches, read

NDArray = np.ndarray[Any, Any]

MOST_BLOCKS = 256
"""Short blocks that are asked, evenly spaced, where there are twice as many or more."""

SCORED_BYTES = 1 << 20
"""Size of the scores, by block, row and λ, that are worked on at a time."""

HOST = Home(np, "cpu")


class Stack:
    """Diagonal blocks of one length, known by their rows or by their Grams.

    Parameters
    ----------
    home : Home
        Where they are worked on.
    size : int
        B, the length of a block.
    rows : array, shape (n, m, B), or None
        The blocks' gradients.
    grams : array, shape (1, m, m), optional
        GGᵀ of a long one, where ``rows`` are None.
    """

    def __init__(self, home: Home, size: int, rows: Array, grams: Array = None) -> None:
        self._home, self._size = home, size
        self._is_alone = rows is None
        self._rows = rows
        self._m = int((grams if rows is None else rows).shape[1])
        if grams is None and size >= self._m:
            grams, self._rows = ops.square(home, rows), None
        self._grams = grams

    def moments(self) -> NDArray:
        """Return Σ tr K, Σ ‖K‖², Σ Kᵢᵢ² and Σ (tr K)² over the blocks' Grams K = GGᵀ."""
        xp = self._home.xp
        norms, matrices = self._norms(), self._smaller()
        traces = xp.sum(norms, axis=1)
        sums = traces, matrices * matrices, norms * norms, traces * traces
        return np.array([float(xp.sum(x)) for x in sums])

    def scores(self, dampings: NDArray) -> NDArray:
        """Return the leave-one-out scores of each λ, summed over the blocks.

        With GGᵀ = Q diag(s) Qᵀ; where B < m from GᵀG = V diag(s) Vᵀ and (gᵢᵀvₖ)² = Qᵢₖ²sₖ.
        """
        xp, m = self._home.xp, self._m
        s, vectors = xp.linalg.eigh(self._smaller())
        # Eigenvalues that rounding alone has made are no evidence of a direction.
        s = xp.where(s > int(s.shape[1]) * 2.0**-52 * s[:, -1:], s, 0.0)[:, :, None]
        if self._rows is not None:
            vectors = self._multiply(self._rows, vectors)
        squares, norms = vectors * vectors, self._norms()[:, :, None]
        parts, width = [], max(SCORED_BYTES // (8 * int(s.shape[0]) * m), 1)
        for some in column_slices(len(dampings), width):
            shifts = self._home.receive(m * dampings[some])
            inverse = 1.0 / (s + shifts)
            if self._rows is None:  # each by itself: for large λ nothing is left of 1 − rᵢ
                r = self._multiply(squares, shifts * inverse)
                rest = self._multiply(squares, s * inverse)
            else:  # 1/(s + mλ) is convex, and Σₖ Qᵢₖ²sₖ = ‖gᵢ‖²
                rest = self._multiply(squares, inverse)
                r = xp.clip(1.0 - rest, shifts / (shifts + norms), 1.0)
            logdet = xp.sum(xp.log1p(s / shifts), axis=(0, 1))
            rows = xp.sum(xp.log(r) + m * rest / r, axis=(0, 1)) / m
            parts.append(to_numpy(logdet + rows))
        flat = int(s.shape[0]) * self._size * np.log(dampings)
        return np.asarray(flat + np.concatenate(parts))

    def _multiply(self, a: Array, b: Array) -> Array:
        """Return products: of one long block in all threads that BLAS may have."""
        return a @ b if self._is_alone else ops.multiply(self._home, a, b)

    def _smaller(self) -> Array:
        """Return GGᵀ, or GᵀG where that is the smaller."""
        if self._grams is None:
            self._grams = ops.square(self._home, ops.transposed(self._rows))
        return self._grams

    def _norms(self) -> Array:
        """Return ‖gᵢ‖² for each row of each block, (n, m)."""
        if self._rows is None:
            return self._home.xp.linalg.diagonal(self._grams)
        return self._home.xp.sum(self._rows * self._rows, axis=2)


class Blocks:
    """The diagonal blocks of F over all parameters and ranks, or the whole of it.

    Parameters
    ----------
    rows : Rows
        G.
    sizes : sequence of int, optional
        Lengths of this rank's blocks; by default the whole of F.
    gram : array, shape (m, m), optional
        GGᵀ, where that is known.
    """

    def __init__(
        self, rows: Rows, sizes: Sequence[int] | None = None, gram: Array | None = None
    ) -> None:
        m, d = rows.shape
        self._rows, self._whole = rows, None
        self.shape = m, rows.total_columns
        if sizes is None and gram is None and rows.reduce is None and d < m:
            sizes = [d]
        self._sizes: Sequence[int] = () if sizes is None else sizes
        self.count = 1.0 if sizes is None else rows.summed_numbers(len(sizes))[0]
        if sizes is None:
            gram = to_numpy(finite_gram(rows) if gram is None else gram)
            self._whole = Stack(HOST, rows.total_columns, None, gram[None])
        self._wide: dict[int, Stack] = {}

    @property
    def length(self) -> float:
        """The mean length of a block."""
        return self.shape[1] / self.count

    def mean_square(self) -> float:
        """Return that of the gradients' entries; refuses those that are not finite, or all zero."""
        if self._whole is not None:
            return mean_square_of(self._whole.moments()[0], *self.shape)
        rows = self._rows
        with np.errstate(over="ignore", invalid="ignore"):
            squares = [
                float(np.sum(square_norms(ops.transposed(part[: rows.used, :]))))
                for _, part in rows.parts()
            ]
            total = self._finite(self._summed(np.array([np.sum(squares)])))
        return mean_square_of(total[0], *self.shape)

    def moments(self) -> NDArray:
        """See :meth:`Stack.moments`; refuses gradients that are not finite."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self._finite(self._sum(Stack.moments, 4))

    def scores(self, dampings: NDArray) -> NDArray:
        """See :meth:`Stack.scores`; of gradients that are known to be finite."""
        return self._sum(lambda stack: stack.scores(dampings), len(dampings))

    def _sum(self, ask: Callable[[Stack], NDArray], length: int) -> NDArray:
        """Return the sum of what the stacks of all ranks answer: one pass over the gradients."""
        if self._whole is not None:
            return ask(self._whole)
        total = np.zeros(length)
        for weight, answers in self._answers(ask):
            total += weight * np.sum(answers, axis=0)
        return self._summed(total)

    def _answers(self, ask: Callable[[Stack], NDArray]) -> Iterator[tuple[float, list[NDArray]]]:
        """Yield what consecutive blocks answer, and for how many each of them stands."""
        rows, start, m = self._rows, 0, self._rows.used
        for wide, group in groupby(self._sizes, lambda n: n >= m and 8 * n * m > WIDE_BYTES):
            some = list(group)
            stop = start + sum(some)
            if not wide:
                alone = rows.reduce is None and stop - start == rows.shape[1]
                here = rows if alone else rows.stretch(start, stop)
                yield self._asked(here, some, ask)
            else:
                ends = start + np.cumsum(some)
                stacks = (
                    self._wide_stack(int(end) - n, n) for n, end in zip(some, ends, strict=True)
                )
                yield 1.0, [ask(stack) for stack in stacks]
            start = stop

    def _wide_stack(self, start: int, size: int) -> Stack:
        """Return one long block, whose Gram is kept."""
        if start not in self._wide:
            gram = to_numpy(finite_gram(self._rows.stretch(start, start + size)))
            self._wide[start] = Stack(HOST, size, None, gram[None])
        return self._wide[start]

    def _asked(
        self, rows: Rows, sizes: list[int], ask: Callable[[Stack], NDArray]
    ) -> tuple[float, list[NDArray]]:
        """Return what short blocks answer, or evenly spaced ones where they are many."""
        home = ops.home(rows.like)
        step = max(len(sizes) // MOST_BLOCKS, 1)
        plan = batches(sizes, rows.used, max(ops.batch_bytes(home) // step, 1))[::step]

        def work(item: Any) -> NDArray:
            batch, block = item
            answers = [
                ask(Stack(home, size, ops.split(home, block, size, positions)))
                for size, positions in batch.groups
            ]
            return np.asarray(sum(answers[1:], start=answers[0]))

        asked = sum(batch.columns.stop - batch.columns.start for batch in plan)
        return sum(sizes) / asked, ops.each(home, read(rows, plan, home), work)

    def _summed(self, x: NDArray) -> NDArray:
        """Sum over ranks."""
        return to_numpy(self._rows.summed(x))

    def _finite(self, total: NDArray) -> NDArray:
        """Refuse what is not finite, and so on every rank."""
        if not np.all(np.isfinite(total)):
            raise ValueError(check.nonfinite_message(self._rows.nonfinite(), self._rows.used))
        return total


def mean_square_of(total: float, m: int, d: int) -> float:
    """Return Σ ‖gᵢ‖²/(md); refuses gradients that are all zero.

    Parameters
    ----------
    total : float
        The sum.
    m, d : int
        Rows and columns.

    Returns
    -------
    float
        Above zero.
    """
    if not total > 0.0:
        msg = "gradients must not all be zero for a damping to be chosen by them; give damping"
        raise ValueError(msg)
    return float(total) / (m * d)
