"""Prune networks by :class:`mfac_core.torch.Pruner` as it stands, beside the paper's settings.

Run ``python examples/experiments/prune_defaults.py --network cnn`` or ``--network resnet``: prunes
the networks of ``prune_fashion.py`` in 16 steps with fresh gradients, without fine-tuning, once
with no argument but the model, the loss and the data, and once by the paper's update as its authors
set it: blocks of 128, 64 rows of 32 images, λ 1e-5. Writes a table and all numbers to
``docs/results``.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from data import Split, fashion_mnist
from networks import evaluate
from prune_fashion import arguments, prepared
from pruning_report import accuracies
from seeds import save, seeds_of
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from mfac_core.pruning import exponential_schedule
from mfac_core.torch import Pruner

STEPS = {0.5: 4, 0.7: 3, 0.8: 2, 0.9: 4, 0.95: 3}
"""The sparsities to look at, and in how many steps each is reached from the one before."""
PAPER = {"update": "independent", "damping": 1e-5, "block_size": 128, "rows": 64}
METHODS = {"the paper's, its settings": PAPER, "Pruner(model, loss_fn, batches)": {}}
BATCH = 32


def loss_fn(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    """Return the mean loss of a batch."""
    return cross_entropy(model(batch[0]), batch[1])


def records_of(network: str, seed: int, data: Split, cache: Path, quick: bool) -> list[dict]:
    """Prune the network of one seed by each method."""
    x, y, x_test, y_test = data
    records = []
    for method, settings in METHODS.items():
        model = prepared(network, seed, data, cache, quick=quick)
        torch.manual_seed(seed)
        images = TensorDataset(x, y)
        batches = DataLoader(images, batch_size=BATCH, shuffle=True, drop_last=True)
        pruner = Pruner(model, loss_fn, batches, **settings | ({"rows": 4} if quick else {}))
        for (before, after), steps in zip(pairwise((0.0, *STEPS)), STEPS.values(), strict=True):
            for share in exponential_schedule(after, 1 if quick else steps, initial=before):
                step = pruner.step(share)
            loss, accuracy = evaluate(model, x_test, y_test)
            records.append(
                {
                    "network": network, "seed": seed, "method": method, "sparsity": after,
                    "accuracy": accuracy, "loss": loss, "statistics": step.statistics,
                }
            )  # fmt: skip
    return records


def main(argv: list[str] | None = None) -> None:
    """Train, prune, write."""
    args = arguments("pruning by the defaults", argv)
    data = fashion_mnist(args.data)
    records = []
    for seed in seeds_of(args):
        records += records_of(args.network, seed, data, args.cache, args.quick)
    tables = {"accuracy": accuracies(records)}
    save(args.output, f"defaults-{args.network}", {"batch": BATCH}, records, tables)


if __name__ == "__main__":
    main()
