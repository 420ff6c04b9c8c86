"""What pruning did: measured as records, and shown as tables and a picture.

A record is a dict with ``seed``, ``method``, ``sparsity`` and what :class:`Yardstick` measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from figures import drawing
from networks import evaluate, gradient_rows, set_weights
from pruning_methods import Run
from seeds import select, spread, table, unique
from torch import nn

STYLES = {
    "magnitude": ("#999999", "o", "-"),
    "diagonal Fisher": ("#E69F00", "o", "-"),
    "the paper's": ("#009E73", "o", "-"),
    "joint": ("#0072B2", "o", "-"),
    "joint, `loss=`": ("#56B4E9", "s", "-"),
    "joint, staged": ("#CC79A7", "o", "-"),
    "the paper's, recomputed": ("#009E73", "^", "--"),
    "joint, recomputed": ("#0072B2", "^", "--"),
}
"""Colour, marker and line of each method."""


class Yardstick:
    """Measures pruned weights on samples that pruning has not seen."""

    def __init__(
        self, model: nn.Module, run: Run, x: torch.Tensor, y: torch.Tensor, *, average: int
    ) -> None:
        self.model, self.run, self.x, self.y, self.average = model, run, x, y, average
        some = len(run.gradients) * average
        set_weights(model, run.weights)
        self.rows = gradient_rows(model, x[:some], y[:some], average=average)
        self.dense_loss, self.dense_accuracy = evaluate(model, x, y)
        self.dense_calibration = run.loss(run.weights)

    def __call__(self, weights: torch.Tensor) -> dict[str, float]:
        """Return the test accuracy, and by how much which loss has risen.

        ``rise`` is that of the test loss, ``calibration`` that of the calibration loss, and
        ``predicted`` the quadratic model's ½ δᵀFδ with rows of test samples. The
        mean of b gradients has 1/b of their covariance, so that there F is multiplied by b.
        """
        calibration = self.run.loss(weights) - self.dense_calibration
        loss, accuracy = evaluate(self.model, self.x, self.y)
        products = self.rows @ (weights - self.run.weights)
        predicted = 0.5 * self.average * float((products**2).mean())
        rise = loss - self.dense_loss
        return {
            "accuracy": accuracy,
            "rise": rise,
            "calibration": calibration,
            "predicted": predicted,
        }


def accuracies(
    records: Sequence[dict], corner: str = "test accuracy at", value: str = "accuracy"
) -> str:
    """Write a table of methods against sparsities."""
    sparsities = unique(records, "sparsity")

    def cell(method: str, sparsity: float) -> str:
        return spread(select(records, value, method=method, sparsity=sparsity))

    rows = [[m, *(cell(m, s) for s in sparsities)] for m in unique(records, "method")]
    return table([corner, *(f"{s:.0%}" for s in sparsities)], rows)


def rises(records: Sequence[dict], sparsity: float) -> str:
    """Write a table of predicted and real rises of the loss at one sparsity."""
    header = [f"rise of the loss at {sparsity:.0%}", "predicted, test rows", "test", "calibration"]

    def cell(method: str, value: str) -> str:
        return spread(select(records, value, method=method, sparsity=sparsity))

    values = ("predicted", "rise", "calibration")
    rows = [[m, *(cell(m, value) for value in values)] for m in unique(records, "method")]
    return table(header, rows)


def draw(path: Path, records: Sequence[dict], title: str) -> None:
    """Draw the mean over seeds of each method's accuracies, with their range as a band."""
    with drawing(path, 7, 4.5) as figure:
        axes = figure.subplots()
        sparsities = unique(records, "sparsity")
        for method in unique(records, "method"):
            colour, marker, line = STYLES[method]
            runs = [select(records, "accuracy", method=method, sparsity=s) for s in sparsities]
            mean, low, high = (f(np.array(runs), axis=1) for f in (np.mean, np.min, np.max))
            axes.fill_between(sparsities, low, high, color=colour, alpha=0.12, lw=0)
            label = method.replace("`", "")
            axes.plot(sparsities, mean, line, marker=marker, ms=4, color=colour, label=label)
        axes.set(xlabel="sparsity", ylabel="test accuracy", title=title)
        axes.set_xticks(sparsities, [f"{s:.0%}" for s in sparsities])
        axes.legend()
