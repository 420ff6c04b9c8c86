"""Many small networks trained at once, each without some of the samples."""

from __future__ import annotations

import torch
from networks import track
from torch import nn
from torch.nn.functional import cross_entropy

Weights = dict[str, torch.Tensor]
"""The parameters of K networks by name, (K, *shape)."""


def start_of(model: nn.Module, number: int) -> Weights:
    """Return the model's parameters, K times."""
    return {n: p.detach().repeat(number, *[1] * p.ndim) for n, p in model.named_parameters()}


def retrained(
    model: nn.Module,
    start: Weights,
    stays: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    penalty: float,
    epochs: int,
    rate: float = 0.05,
    batch: int = 100,
    seed: int = 0,
) -> Weights:
    """Minimise (1/m) Σ_{i stays} ℓᵢ(w) + penalty ‖w‖²/2 for each row of ``stays`` (K, m).

    By momentum 0.9 and a rate that falls to zero. All networks see the same batches in the same
    order, so that they differ by nothing but the samples that are left out.
    """

    def objective(weights: Weights, some: torch.Tensor, labels: torch.Tensor, stay: torch.Tensor):
        logits = torch.func.functional_call(model, weights, (some,))
        losses = cross_entropy(logits, labels, reduction="none")
        norm = sum(w.square().sum() for w in weights.values())
        return (losses * stay).mean() + penalty / 2 * norm

    gradients = torch.func.vmap(torch.func.grad(objective), in_dims=(0, None, None, 0))
    weights = {n: w.clone() for n, w in start.items()}
    momentum = {n: torch.zeros_like(w) for n, w in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(y) // batch)
    taken = 0
    for _ in track(range(epochs), "retraining"):
        for rows in torch.randperm(len(y), generator=generator)[: len(y) // batch * batch].split(
            batch
        ):
            found = gradients(weights, x[rows], y[rows], stays[:, rows])
            for name, g in found.items():
                momentum[name].mul_(0.9).add_(g)
                weights[name].sub_(momentum[name], alpha=rate * (1 - taken / steps))
            taken += 1
    return weights


def margins(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return log p/(1 − p) for the probabilities p of the right classes."""
    right = logits.gather(-1, y[..., None])[..., 0]
    others = logits.scatter(-1, y[..., None], -torch.inf)
    return right - others.logsumexp(-1)


@torch.no_grad()
def outputs(model: nn.Module, weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """Return the logits of all networks, (K, samples, classes)."""

    def one(weights: Weights) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (x,))

    return torch.func.vmap(one)(weights)
