"""The quadratic model of the loss that pruning minimises."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mfac_core._arrays import Array
from mfac_core._operators.online import BlockFisher
from mfac_core._ops import blocks as ops
from mfac_core._rows.base import Rows
from mfac_core.pruning._kept import KeptFisher, Mask, Part, Vector
from mfac_core.pruning._patterns import Pattern


class QuadraticModel:
    """gᵀδ + ½ δᵀFδ: what the loss changes by when the weights w become w + δ.

    Over δ_S = −w_S it is lowest at δ_R = F_RR⁻¹(F_RS w_S − g_R), R the kept weights. Around that
    optimum x the gradient of the kept weights is zero, so that removing more, Q, raises the model
    by ½ x_Qᵀ([F_RR⁻¹]_QQ)⁻¹x_Q whether there was a g or not. (It is as if F⁻¹g had been taken off
    the weights at first, Newton's step, and they had then been pruned without g.)

    Every method is one pass over the gradients at most.

    Parameters
    ----------
    rows : Rows or BlockFisher
        G of F = λI + GᵀG/m.
    weights : array, shape (d,)
        w, of the gradients' library; never widened as a whole.
    gradient : array, shape (d,), or None
        g, of the gradients' library; None for zero.
    damping : float
        λ.
    sizes : sequence of int, optional
        Lengths of F's diagonal blocks; None for the whole of F.
    """

    def __init__(
        self,
        rows: Rows | BlockFisher,
        weights: Array,
        gradient: Array | None,
        damping: float,
        sizes: Sequence[int] | None,
    ) -> None:
        self._rows, self.damping, self._sizes = rows, damping, sizes
        self.home = ops.home(rows.like)
        self._weights = ops.view(self.home, weights)
        self._gradient = None if gradient is None else ops.view(self.home, gradient)
        self.kept: Mask = None
        self.fisher = KeptFisher(rows, damping, sizes)

    def damped(self, factor: float) -> QuadraticModel:
        """Return the model with ``factor`` times the damping, for the same kept weights."""
        damping = factor * self.damping
        model = QuadraticModel(self._rows, self._weights, self._gradient, damping, self._sizes)
        model.restrict(self.kept)
        return model

    def restrict(self, kept: Mask) -> None:
        """Keep these weights from now on."""
        self.kept = kept
        self.fisher.restrict(kept)

    def saliencies(self, pattern: Pattern, at: Vector | None) -> Vector:
        """Return what removing each of a pattern's groups raises the model by.

        From the optimum, or from weights that are given.
        """
        scores = pattern.scores()

        def look(part: Part, here: slice) -> object:
            x = self._best(part, here) if at is None else at[here]
            return pattern.look(scores, part, here, x)

        pattern.sum(scores, self.fisher.visit(look))  # type: ignore[arg-type]
        return scores

    def optimum(self) -> tuple[Vector, float]:
        """Return the kept weights of the lowest model, and its value there."""

        def best(part: Part, here: slice) -> tuple[Vector, float]:
            x = self._best(part, here)
            return x, self._change(part, here, x)

        return self._filled(best)

    def masked(self) -> Vector:
        """Return the weights with the removed ones set to zero."""
        return self.home.xp.where(self.kept, self._wide(slice(0, int(self.kept.shape[0]))), 0.0)

    def alone(self) -> Vector:
        """Return the same after Newton's step with g."""
        if self._gradient is None:
            return self.masked()

        def step(part: Part, here: slice) -> tuple[Vector, float]:
            w = self.home.xp.where(self.kept[here], self._wide(here), 0.0)
            return self._newton(part, here, w), 0.0

        return self._filled(step)[0]

    def without(self, x: Vector, smaller: Mask) -> Vector:
        """Return x − Σ_s (x_s/[F_RR⁻¹]_ss) F_RR⁻¹e_s, the paper's update, for kept s to remove."""
        xp = self.home.xp

        def update(part: Part, here: slice) -> tuple[Vector, float]:
            gone = self.kept[here] & ~smaller[here]
            diagonal = xp.where(self.kept[here], part.diagonal(), 1.0)
            change = part.apply(xp.where(gone, x[here] / diagonal, 0.0))
            return xp.where(smaller[here], x[here] - change, 0.0), 0.0

        return self._filled(update)[0]

    def change(self, x: Vector) -> float:
        """Return the model's value at the new weights x."""
        values = self.fisher.visit(lambda part, here: self._change(part, here, x[here]))
        return self._total(values)

    def _filled(self, work: Callable[[Part, slice], tuple[Vector, float]]) -> tuple[Vector, float]:
        """Return a vector that ``work`` returns part by part, and the sum of its numbers."""
        result = self.home.zeros(int(self.kept.shape[0]))

        def fill(part: Part, here: slice) -> float:
            result[here], number = work(part, here)
            return number

        return result, self._total(self.fisher.visit(fill))

    def _total(self, values: list[float]) -> float:
        """Return a sum over parts and ranks."""
        return self._rows.summed_numbers(float(np.sum(values)))[0]

    def _wide(self, here: slice) -> Vector:
        return self.home.receive(self._weights[here])

    def _best(self, part: Part, here: slice) -> Vector:
        return self._newton(part, here, part.joint(self._wide(here)))

    def _newton(self, part: Part, here: slice, x: Vector) -> Vector:
        """Return x_R − F_RR⁻¹g_R."""
        if self._gradient is None:
            return x
        return x - part.apply(self.home.receive(self._gradient[here]))

    def _change(self, part: Part, here: slice, x: Vector) -> float:
        """Return a part's share of the model's value at the new weights x."""
        step = x - self._wide(here)
        linear = 0.0
        if self._gradient is not None:
            linear = float(self.home.receive(self._gradient[here]) @ step)
        return linear + 0.5 * part.quadratic(step)
