"""Optimisers of others beside SGD, Adam and M-FAC: Muon, SOAP and Shampoo.

Muon is PyTorch's. SOAP and Shampoo are those of the package pytorch_optimizer, which the extra
``benchmarks`` brings; without it they are left out, and a line says so.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

Named = Iterable[tuple[str, Tensor]]

RATES = (0.001, 0.003, 0.01, 0.03)
EVERY = 10
"""Steps between two of SOAP's eigenbases, as it comes, and of Shampoo's roots."""


class Muon(Optimizer):
    """Muon for the matrices, AdamW at the same rate and decay for all else.

    Embeddings, biases and scales are AdamW's, as the documentation of ``torch.optim.Muon`` has it;
    its update is brought to the size of AdamW's. Convolutions count as matrices with a row a
    filter, as its authors have them: torch's takes only matrices, so these are copies.
    """

    def __init__(self, named: Named, lr: float, weight_decay: float = 0.01) -> None:
        named = list(named)
        super().__init__([p for _, p in named], {})
        self.weights = [p for name, p in named if p.ndim > 1 and not is_embedding(name)]
        self.matrices = [nn.Parameter(p.detach().flatten(1).clone()) for p in self.weights]
        others = [p for name, p in named if p.ndim < 2 or is_embedding(name)]
        options = {"weight_decay": weight_decay}
        self.parts = [
            torch.optim.Muon(self.matrices, lr, adjust_lr_fn="match_rms_adamw", **options),
            AdamW(others, lr, **options),
        ]
        self.all = [p for _, p in named]
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for p in self.all:
            p.grad = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step of both."""
        for matrix, p in zip(self.matrices, self.weights, strict=True):
            matrix.grad = p.grad.flatten(1)
        for part in self.parts:
            part.step()
        for matrix, p in zip(self.matrices, self.weights, strict=True):
            p.copy_(matrix.view(p.shape))


def is_embedding(name: str) -> bool:
    """Whether a parameter is of a token or a position."""
    return name.startswith(("embedding", "position"))


def peers() -> dict[str, tuple]:
    """Return how to make each, and the rates to choose from."""
    found: dict[str, tuple] = {"Muon and AdamW": (Muon, RATES)}
    try:
        from pytorch_optimizer import SOAP, ScalableShampoo
        from pytorch_optimizer.optimizer.shampoo import LayerWiseGrafting
    except ImportError:
        print("SOAP and Shampoo are left out: pip install pytorch_optimizer")
        return found

    def soap(named: Named, lr: float, weight_decay: float = 0.01) -> Optimizer:
        return SOAP(named, lr, weight_decay=weight_decay, precondition_frequency=EVERY)

    def shampoo(named: Named, lr: float, weight_decay: float = 0.0) -> Optimizer:
        """Of the length of RMSprop's steps, and so at rates of Adam's size."""
        return ScalableShampoo(
            named,
            lr,
            weight_decay=weight_decay,
            decoupled_weight_decay=True,
            graft_type=LayerWiseGrafting.RMSPROP,
            moving_average_for_momentum=True,
            preconditioning_compute_steps=EVERY,
        )

    return found | {"SOAP": (soap, RATES), "Shampoo": (shampoo, RATES)}
