"""Small networks, how to train them, and how to reach their weights as one flat vector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import vector_to_parameters
from torch.optim.swa_utils import update_bn

import mfac_core.torch


def digits_mlp() -> nn.Module:
    """Return an MLP for the digits, 64-128-32-10, with 12,608 weights."""
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def cnn() -> nn.Module:
    """Return a convolutional network for images of 28 × 28, with 98,192 weights."""
    widths = (1, 16, 32, 64)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(64 * 9, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def small_cnn() -> nn.Module:
    """Return a convolutional network for images of 28 × 28, with 11,018 parameters."""
    widths = (1, 8, 16, 32)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 10))


class Residual(nn.Module):
    """Two convolutions with batch normalisation, and a way past them."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.past = nn.Sequential()
        if before != after:
            self.past.append(nn.Conv2d(before, after, 1, stride, bias=False))
            self.past.append(nn.BatchNorm2d(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activations."""
        return torch.relu(self.body(x) + self.past(x))


def resnet(width: int = 24, channels: int = 1) -> nn.Module:
    """Return a residual network with batch normalisation for 28 × 28; 214,296 weights at 24."""
    a, b, c = width, 2 * width, 4 * width
    return nn.Sequential(
        nn.Conv2d(channels, a, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(a),
        nn.ReLU(),
        Residual(a, a, 1),
        Residual(a, b, 2),
        Residual(b, b, 1),
        Residual(b, c, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(c, 10),
    )


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """Return what pruning removes: the weights of linear and convolutional layers, no biases."""
    return [p for p in model.parameters() if p.ndim > 1]


def train(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    batch: int,
    peak: float | None = None,
) -> None:
    """Minimise the cross-entropy; with ``peak`` the rate rises to it in a fifth, and falls to 0."""
    scheduler = None
    if peak is not None:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            peak,
            total_steps=epochs * (len(y) // batch),
            pct_start=0.2,
            cycle_momentum=False,
        )
    model.train()
    for _ in track(range(epochs), "training"):
        for rows in torch.randperm(len(y))[: len(y) // batch * batch].split(batch):
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    model.eval()


def gradient_rows(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, *, average: int = 1
) -> torch.Tensor:
    """Return gradients by the prunable weights, one a row, each the mean of ``average`` samples.

    Shape (m, d) for m·average samples.
    """
    batches = list(zip(x.split(average), y.split(average), strict=True))
    return mfac_core.torch.gradient_rows(
        model,
        lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
        batches,
        parameters=weights_of(model),
    )


@torch.no_grad()
def set_weights(model: nn.Module, weights: torch.Tensor) -> None:
    """Copy a flat vector into the prunable weights."""
    vector_to_parameters(weights.clone(), weights_of(model))


@torch.no_grad()
def evaluate(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Return the mean cross-entropy and the accuracy."""
    logits = torch.cat([model(some) for some in x.split(250)])
    correct = (logits.argmax(1) == y).float().mean()
    return float(cross_entropy(logits, y)), float(correct)


@contextmanager
def statistics_of(model: nn.Module, x: torch.Tensor) -> Iterator[None]:
    """Take the statistics of batch normalisation from ``x`` meanwhile."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    update_bn(x.split(500), model)
    yield
    model.load_state_dict(before)


def track(items: Sequence, label: str) -> Iterator:
    """Go through ``items`` behind a progress bar, if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iter(items)
    return iter(tqdm(items, label, leave=False))
