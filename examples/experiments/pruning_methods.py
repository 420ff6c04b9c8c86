"""Ways to prune a network, each a function from a :class:`Run` and sparsities to weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from networks import evaluate, gradient_rows, set_weights, weights_of
from torch import nn
from torch.nn.utils import parameters_to_vector

from mfac_core.pruning import exponential_schedule, gradual, prune


@dataclass
class Run:
    """A trained network, as pruning sees it.

    Attributes
    ----------
    weights : torch.Tensor, shape (d,)
        Before pruning.
    gradients : torch.Tensor, shape (m, d)
        At these weights.
    fresh : callable
        From other weights, of shape (d,), to gradients there.
    loss : callable
        From weights to the loss on calibration data.
    damping : float
        λ.
    block_size : int, list of int or None
        Length or lengths of the diagonal blocks of the Fisher matrix; None for the whole of it.
    damping_in_steps : float or None
        λ where gradients are recomputed; None for the same.
    """

    weights: torch.Tensor
    gradients: torch.Tensor
    fresh: Callable[[torch.Tensor], torch.Tensor]
    loss: Callable[[torch.Tensor], float]
    damping: float
    block_size: int | list[int] | None = None
    damping_in_steps: float | None = None

    def prune(self, **options: object) -> torch.Tensor:
        """Prune by :func:`mfac_core.pruning.prune` with the run's Fisher matrix, in one stage."""
        options = {"stages": 1, "damping": self.damping, "block_size": self.block_size, **options}
        return prune(self.weights, self.gradients, **options).weights


def run_of(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    rows: int,
    average: int,
    damping: float,
    block_size: int | None = None,
    damping_in_steps: float | None = None,
) -> Run:
    """Return a run whose gradients are of the first rows · average samples.

    Each row is the mean over ``average`` samples. The calibration loss is that of 2,000 samples,
    or all that there are: not of the rows' alone, to which the update fits too well.
    """
    known = x[:2000], y[:2000]
    x, y = x[: rows * average], y[: rows * average]

    def fresh(weights: torch.Tensor) -> torch.Tensor:
        set_weights(model, weights)
        return gradient_rows(model, x, y, average=average)

    def loss(weights: torch.Tensor) -> float:
        set_weights(model, weights)
        return evaluate(model, *known)[0]

    weights = parameters_to_vector(weights_of(model)).detach()
    return Run(weights, fresh(weights), fresh, loss, damping, block_size, damping_in_steps)


Curve = Callable[[Run, Sequence[float]], list[torch.Tensor]]
"""From sparsities to the weights at each."""


def magnitude(run: Run, sparsities: Sequence[float]) -> list[torch.Tensor]:
    """Remove the smallest weights."""
    return [_remove_lowest(run.weights, run.weights.abs(), s) for s in sparsities]


def diagonal_fisher(run: Run, sparsities: Sequence[float]) -> list[torch.Tensor]:
    """Remove the weights of lowest ½ F_ii w_i²."""
    scores = run.weights**2 * _mean_squares(run.gradients)
    return [_remove_lowest(run.weights, scores, s) for s in sparsities]


def paper(run: Run, sparsities: Sequence[float]) -> list[torch.Tensor]:
    """Sum the updates of single weights, as the M-FAC paper does, in one shot."""
    return [run.prune(sparsity=s, update="independent") for s in sparsities]


def joint(run: Run, sparsities: Sequence[float]) -> list[torch.Tensor]:
    """Choose by the same saliencies in one shot, and update jointly."""
    return [run.prune(sparsity=s) for s in sparsities]


def joint_on_the_loss(run: Run, sparsities: Sequence[float]) -> list[torch.Tensor]:
    """Choose the step of the joint update by the calibration loss."""
    return [run.prune(sparsity=s, loss=run.loss) for s in sparsities]


def joint_staged(run: Run, sparsities: Sequence[float]) -> list[torch.Tensor]:
    """Choose in stages, always by the same gradients."""
    mask = torch.ones(len(run.weights), dtype=torch.bool)
    results = []
    for before, sparsity in pairwise((0.0, *sparsities)):
        pruned = prune(
            run.weights, run.gradients, mask=mask, sparsity=sparsity,
            stages=len(steps(before, sparsity)), damping=run.damping, block_size=run.block_size,
        )  # fmt: skip
        mask = pruned.mask
        results.append(pruned.weights)
    return results


def paper_recomputed(run: Run, sparsities: Sequence[float]) -> list[torch.Tensor]:
    """Take the paper's update a little at a time, with fresh gradients each time."""
    return _recomputed(run, sparsities, update="independent")


def joint_recomputed(run: Run, sparsities: Sequence[float]) -> list[torch.Tensor]:
    """Take the joint update a little at a time, with fresh gradients each time."""
    return _recomputed(run, sparsities, update="joint")


METHODS: dict[str, Curve] = {
    "magnitude": magnitude,
    "diagonal Fisher": diagonal_fisher,
    "the paper's": paper,
    "joint": joint,
    "joint, `loss=`": joint_on_the_loss,
    "joint, staged": joint_staged,
    "the paper's, recomputed": paper_recomputed,
    "joint, recomputed": joint_recomputed,
}


def two_of_four(run: Run) -> dict[str, torch.Tensor]:
    """Keep two of every four adjacent weights, by each method that fits the pattern."""
    diagonal = run.weights**2 * _mean_squares(run.gradients)
    pattern = {"pattern": "2:4"}
    return {
        "magnitude": _keep_two(run.weights, run.weights.abs()),
        "diagonal Fisher": _keep_two(run.weights, diagonal),
        "the paper's": run.prune(**pattern, update="independent"),
        "joint": run.prune(**pattern),
        "joint, `loss=`": run.prune(**pattern, loss=run.loss),
        "joint, staged": run.prune(**pattern, stages=4),
    }


def steps(before: float, after: float) -> list[float]:
    """Return sparsities that end in ``after``, each keeping at least 3/4 of what was left."""
    kept = (1 - after) / (1 - before)
    count = math.ceil(math.log(kept) / math.log(0.75))
    return exponential_schedule(after, count, initial=before)


def _recomputed(run: Run, sparsities: Sequence[float], update: str) -> list[torch.Tensor]:
    parts = [steps(before, after) for before, after in pairwise((0.0, *sparsities))]
    schedule = [sparsity for part in parts for sparsity in part]
    states = gradual(
        run.weights, lambda weights, mask: run.fresh(weights), sparsity=schedule, update=update,
        damping=run.damping_in_steps or run.damping, block_size=run.block_size,
    )  # fmt: skip
    return [state.weights for state in states if schedule[state.step - 1] in sparsities]


def _mean_squares(gradients: torch.Tensor) -> torch.Tensor:
    """Return the Fisher matrix's diagonal, without a copy of the gradients."""
    return torch.linalg.vector_norm(gradients, dim=0, dtype=torch.float32) ** 2 / len(gradients)


def _remove_lowest(weights: torch.Tensor, scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    pruned = weights.clone()
    pruned[scores.argsort()[: round(sparsity * len(scores))]] = 0
    return pruned


def _keep_two(weights: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    lowest = scores.reshape(-1, 4).argsort(dim=1)[:, :2]
    return weights.reshape(-1, 4).scatter(1, lowest, 0.0).flatten()
