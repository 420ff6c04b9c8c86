"""Memory that gradients take which are never stored, beside that of the stored ones.

A network of two linear layers with some ten million parameters, and 1,024 samples: the inverse
Fisher matrix of ``ModelGradients`` is set up and multiplied by a vector. Run ``python
examples/benchmarks/model_gradients.py``.
"""

from __future__ import annotations

import argparse

import torch
from measure import peak_memory
from torch import nn
from torch.nn.functional import cross_entropy

import mfac_core as mfac
from mfac_core.torch import ModelGradients

BATCH = 32


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return a loss for each sample."""
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def product(width: int, m: int, memory: int) -> tuple[int, int | None]:
    """Return the number of parameters, and the bytes that set-up and a product take beyond them."""
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    batches = [(torch.randn(BATCH, width), torch.randint(10, (BATCH,))) for _ in range(m // BATCH)]
    d = sum(p.numel() for p in model.parameters())

    def act() -> torch.Tensor:
        rows = ModelGradients(model, loss_fn, batches, memory=memory)
        return mfac.InverseFisher(rows, damping=1e-2) @ torch.ones(d)

    return d, peak_memory(act)


def main(argv: list[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="memory of gradients that are never stored")
    parser.add_argument("-m", type=int, default=1024, help="samples")
    parser.add_argument("--width", type=int, default=3162, help="of the layers")
    parser.add_argument("--memory", type=int, default=1 << 26, help="the budget, in bytes")
    parser.add_argument("--quick", action="store_true", help="small")
    args = parser.parse_args(argv)
    m, width = (64, 100) if args.quick else (args.m, args.width)
    torch.manual_seed(0)
    product(10, BATCH, args.memory)  # what is loaded on first use
    d, taken = product(width, m, args.memory)
    print("| samples | parameters | gradients, stored | budget | set-up and a product take |")
    print("| --- | --- | --- | --- | --- |")
    sizes = (4 * m * d, args.memory, taken)
    cells = ["not known here" if size is None else f"{size / 1e9:.2f} GB" for size in sizes]
    print(f"| {m:,} | {d:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
