"""The damping of :class:`mfac_core.torch.Pruner`: a rule and a choice, beside a grid.

Run ``python examples/experiments/pruner_damping.py --network cnn`` or ``--network resnet``: prunes
the networks of ``prune_fashion.py`` in 4 steps with fresh gradients, without fine-tuning, under
every power of ten of a grid, kept for all steps, under the rule, and under what
``mfac_core.choose_damping`` says of the rows of each step. Writes a table and all numbers to
``docs/results``.
"""

from __future__ import annotations

from pathlib import Path

import torch
from data import Split, fashion_mnist
from networks import evaluate
from prune_defaults import BATCH, loss_fn
from prune_fashion import arguments, prepared
from pruning_report import accuracies
from seeds import save, seeds_of
from torch.utils.data import DataLoader, TensorDataset

from mfac_core.torch import Pruner

SPARSITIES = (0.5, 0.8, 0.9, 0.95)
ROWS = 64
GRIDS = {"cnn": range(-8, -2), "resnet": range(-6, -3)}
"""Powers of ten for λ; fewer for the network whose passes take longer."""
CHOICES = ("auto", "leave-one-out")


def records_of(network: str, seed: int, data: Split, cache: Path, quick: bool) -> list[dict]:
    """Prune the network of one seed under each damping."""
    x, y, x_test, y_test = data
    records = []
    grid = [10.0**k for k in GRIDS[network]]
    for damping in (*CHOICES[1:], *grid[:1]) if quick else (*CHOICES, *grid):
        model = prepared(network, seed, data, cache, quick=quick)
        torch.manual_seed(seed)
        images = TensorDataset(x, y)
        batches = DataLoader(images, batch_size=BATCH, shuffle=True, drop_last=True)
        pruner = Pruner(model, loss_fn, batches, rows=4 if quick else ROWS, damping=damping)
        for share in SPARSITIES:
            step = pruner.step(share)
            loss, accuracy = evaluate(model, x_test, y_test)
            about = {"network": network, "seed": seed, "damping": damping, "sparsity": share}
            records.append({**about, "accuracy": accuracy, "loss": loss, "used": step.damping})
    return records


def written(records: list[dict]) -> list[dict]:
    """Name the rows of the table: λ, or how it was chosen and what it then was."""
    named = []
    for record in records:
        damping = record["damping"]
        if isinstance(damping, float):
            method = f"λ {damping:.0e}"
        else:
            used = [r["used"] for r in records if r["damping"] == damping]
            method = f'`"{damping}"`, λ {min(used):.0e}–{max(used):.0e}'
        named.append({**record, "method": method})
    return named


def main(argv: list[str] | None = None) -> None:
    """Train, prune, write."""
    args = arguments("the damping of the Pruner", argv)
    data = fashion_mnist(args.data)
    records = []
    for seed in seeds_of(args):
        records += records_of(args.network, seed, data, args.cache, args.quick)
    tables = {"table": accuracies(written(records))}
    save(
        args.output,
        f"pruner-damping-{args.network}",
        {"batch": BATCH, "rows": ROWS},
        records,
        tables,
    )


if __name__ == "__main__":
    main()
