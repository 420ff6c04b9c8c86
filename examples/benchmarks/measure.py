"""Clocks, memory and gradients, as the benchmarks share them."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy

Act = Callable[[], object]
NDArray = np.ndarray[Any, Any]

SETTLING = 0.03
"""Seconds for which one library's threads may go on spinning and keep the cores from another's."""


def medians(*acts: Act, repeats: int, warm: bool = True) -> list[float]:
    """Return the median seconds of each act, all of them taken in turn and each when warm.

    Acts of minutes need no warming: without it, each is done ``repeats`` times and no more.
    """
    times: list[list[float]] = [[] for _ in acts]
    for _ in range(repeats):
        for act, seconds in zip(acts, times, strict=True):
            settled = time.perf_counter() + SETTLING
            while warm and time.perf_counter() < settled:
                act()
            start = time.perf_counter()
            act()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def peak_memory(act: Act) -> int | None:
    """Return the bytes an act takes at its most, beyond those held before; glibc only."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what is free: to be seen if taken again
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except (AttributeError, OSError, TypeError):
        return None
    before = _resident("VmRSS")
    result = act()  # held until the mark is read
    peak = _resident("VmHWM") - before
    del result
    return max(peak, 0)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def unit_rows(rng: np.random.Generator, m: int, d: int) -> NDArray:
    """Return m independent float32 rows of norm about 1."""
    rows = rng.standard_normal((m, d), dtype=np.float32)
    rows /= np.float32(np.sqrt(d))
    return rows


def correlated_rows(rng: np.random.Generator, m: int, d: int, spread: float = 1e3) -> NDArray:
    """Return m float32 rows of mean squared norm about 1, near a space of fewer dimensions.

    Their singular values fall geometrically, the last to 1/spread of the first.
    """
    sizes = spread ** -np.linspace(0, 1, m)
    sizes *= np.sqrt(m) / np.linalg.norm(sizes)
    rotation = np.linalg.qr(rng.standard_normal((m, m)))[0]
    return (rotation * sizes).astype(np.float32) @ unit_rows(rng, m, d)


def network_rows(m: int, channels: int, seed: int = 0) -> NDArray:
    """Return m float32 rows of a residual network, each the gradient of 16 images' loss.

    The network is trained for some steps on images of ten noisy patterns: some batches are then
    fitted well and others not, and the rows' lengths lie far apart, as those of real networks do.
    """
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy

    from mfac_core.torch import gradient_rows

    class Residual(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.inner = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x + self.inner(x))

    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, stride=2, padding=1),
        *(Residual(channels) for _ in range(3)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    )
    patterns = torch.randn(10, 3, 16, 16)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(10, (16,))
        return patterns[labels] + 1.5 * torch.randn(16, 3, 16, 16), labels

    def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss_fn(model, batch()).backward()
        optimizer.step()
    rows: NDArray = gradient_rows(model.eval(), loss_fn, [batch() for _ in range(m)]).numpy()
    return rows


def two_passes(g: NDArray, rng: np.random.Generator) -> Act:
    """Return the least any product with F⁻¹ must do: G x, then Gᵀ c."""
    x = rng.standard_normal(g.shape[1], dtype=np.float32)
    c = rng.standard_normal(g.shape[0], dtype=np.float32)
    return lambda: (g @ x, g.T @ c)


def woodbury(g: NDArray, damping: float) -> Callable[[NDArray], NDArray]:
    """Return x ↦ F⁻¹x by the Woodbury identity in the dtype of g, as one writes it by hand."""
    m = len(g)
    factor = scipy.linalg.cho_factor(g.dtype.type(m * damping) * np.eye(m, dtype=g.dtype) + g @ g.T)
    return lambda x: (x - g.T @ scipy.linalg.cho_solve(factor, g @ x)) / g.dtype.type(damping)


def relative_error(result: Any, exact: NDArray) -> float:
    """Return ‖result − exact‖/‖exact‖."""
    difference = np.asarray(result, dtype=np.float64) - exact
    return float(np.linalg.norm(difference) / np.linalg.norm(exact))
