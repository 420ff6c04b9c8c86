"""The quadratic model of the loss that pruning minimises."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mfac_core._rows.base import Rows
from mfac_core.pruning._kept import KeptFisher, Mask, Vector


class QuadraticModel:
    """gᵀδ + ½ δᵀFδ: what the loss changes by when the weights w become w + δ.

    Over δ_S = −w_S it is lowest at δ_R = F_RR⁻¹(F_RS w_S − g_R), R the kept weights. Around that
    optimum x the gradient of the kept weights is zero, so that removing more, Q, raises the model
    by ½ x_Qᵀ([F_RR⁻¹]_QQ)⁻¹x_Q whether there was a g or not. (It is as if F⁻¹g had been taken off
    the weights at first, Newton's step, and they had then been pruned without g.)

    Parameters
    ----------
    rows : Rows
        G of F = λI + GᵀG/m.
    weights : array, shape (d,)
        w, NumPy float64.
    gradient : array, shape (d,), or None
        g, NumPy float64; None for zero.
    damping : float
        λ.
    sizes : sequence of int, optional
        Lengths of F's diagonal blocks; None for the whole of F.
    """

    def __init__(
        self,
        rows: Rows,
        weights: Vector,
        gradient: Vector | None,
        damping: float,
        sizes: Sequence[int] | None,
    ) -> None:
        self._rows, self._damping, self._sizes = rows, damping, sizes
        self._gradient = gradient
        self.weights = weights
        self.kept = np.ones(len(weights), dtype=np.bool_)
        self.fisher = KeptFisher(rows, damping, sizes)

    def damped(self, factor: float) -> QuadraticModel:
        """Return the model with ``factor`` times the damping, for the same kept weights."""
        damping = factor * self._damping
        model = QuadraticModel(self._rows, self.weights, self._gradient, damping, self._sizes)
        model.restrict(self.kept)
        return model

    def restrict(self, kept: Mask) -> None:
        """Keep these weights from now on."""
        self.kept = kept
        self.fisher.restrict(kept)

    def alone(self) -> Vector:
        """Return the weights with the removed ones set to zero."""
        return np.where(self.kept, self.weights, 0.0)

    def optimum(self) -> Vector:
        """Return the kept weights of the lowest model."""
        return self.newton(self.fisher.joint(self.weights))

    def newton(self, x: Vector) -> Vector:
        """Return x_R − F_RR⁻¹g_R."""
        return x if self._gradient is None else x - self.fisher.apply(self._gradient)

    def without(self, x: Vector, smaller: Mask) -> Vector:
        """Return x − Σ_s (x_s/[F_RR⁻¹]_ss) F_RR⁻¹e_s, the paper's update, for kept s to remove."""
        diagonal = np.where(self.kept, self.fisher.diagonal(), 1.0)
        update = self.fisher.apply(np.where(self.kept & ~smaller, x / diagonal, 0.0))
        return np.where(smaller, x - update, 0.0)

    def change(self, x: Vector) -> float:
        """Return the model's value at the new weights x."""
        step = x - self.weights
        linear = 0.0 if self._gradient is None else float(self._gradient @ step)
        return linear + 0.5 * self.fisher.quadratic(step)
