"""Time a step of each optimiser on the networks of the experiments, beside the model's own pass.

Run ``python examples/benchmarks/optimizer_steps.py``: the optimisers take turns on one core, with a
window that is full, and the medians are written to ``docs/results/optimizer-steps.md``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.append(str(Path(__file__).parents[1] / "experiments"))

from networks import cnn, digits_mlp, resnet, track
from seeds import table
from train_text import LENGTH, Transformer
from training import OPTIMIZERS, WINDOW

RESULTS = Path(__file__).parents[2] / "docs" / "results"
CHARACTERS = 96

Batch = tuple[Tensor, Tensor]


def images(*shape: int) -> Batch:
    """Return a batch of noise, and labels."""
    return torch.randn(shape), torch.randint(10, shape[:1])


def text() -> Batch:
    """Return a batch of noise in the place of text."""
    ids = torch.randint(CHARACTERS, (16, LENGTH + 1))
    return ids[:, :-1], ids[:, 1:]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "MLP of the digits": (digits_mlp, lambda: images(64, 64)),
    "convolutional network": (cnn, lambda: images(64, 1, 28, 28)),
    "residual network": (lambda: resnet(8), lambda: images(64, 1, 14, 14)),
    "transformer": (lambda: Transformer(CHARACTERS), text),
}


class Run:
    """A model and its optimiser, and the seconds that its steps have taken."""

    def __init__(self, model: nn.Module, make: Callable) -> None:
        self.model = model
        self.optimizer = make(model.named_parameters(), 1e-4)
        self.passes: list[float] = []
        self.steps: list[float] = []

    def step(self, batch: Batch) -> None:
        """Take a step."""
        x, y = batch
        start = time.perf_counter()
        self.optimizer.zero_grad()
        cross_entropy(self.model(x).flatten(0, -2), y.flatten()).backward()
        between = time.perf_counter()
        self.optimizer.step()
        self.passes.append(between - start)
        self.steps.append(time.perf_counter() - between)


def measured(name: str, repeats: int) -> list[list[str]]:
    """Return the lines of a network."""
    model, batch = MODELS[name]
    torch.manual_seed(0)
    runs = {method: Run(model(), make) for method, (make, _) in OPTIMIZERS.items()}
    for method in ("M-FAC", "M-FAC, sparse"):
        for _ in range(WINDOW if repeats > 1 else 1):
            runs[method].step(batch())
    for _ in track(range(2 * repeats), name):  # the second half counts
        for run in runs.values():
            run.step(batch())
    passes = [1e3 * float(np.median(run.passes[-repeats:])) for run in runs.values()]
    own = float(np.median(passes))
    adam = own + 1e3 * float(np.median(runs["Adam"].steps[-repeats:]))
    rows, title = [], name
    for method, run in runs.items():
        step = 1e3 * float(np.median(run.steps[-repeats:]))
        rows.append([title, method, f"{own:.1f}", f"{step:.1f}", f"{(own + step) / adam:.2f}"])
        title = ""
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one step of each")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [row for name in MODELS for row in measured(name, 1 if args.quick else 30)]
    header = ["network", "optimiser", "the model's pass, ms", "step, ms", "both, beside Adam's"]
    text = table(header, rows)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "optimizer-steps.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
