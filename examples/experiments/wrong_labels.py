"""Find wrong labels by the self-influence of samples on a small CNN, under many dampings.

Run ``python examples/experiments/wrong_labels.py``: gives a tenth of 2,000 images of Fashion-MNIST
a wrong label, trains a convolutional network of 98,442 parameters on them, for a short time and for
longer ones, and counts the wrong labels among the first 200 samples by gᵢᵀF⁻¹gᵢ, for powers of ten
of λ and for what ``mfac_core.choose_damping`` says; beside them by the sample's own loss and by
‖gᵢ‖. Writes a table and all numbers to ``docs/results``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from data import Split, fashion_mnist
from networks import cnn, evaluate, train
from seeds import options, save, seeds_of, select, table, unique
from torch.nn.functional import cross_entropy

import mfac_core as mfac
from mfac_core.influence import Influence
from mfac_core.torch import per_sample_gradients

SAMPLES, SHARE, EPOCHS = 2000, 0.1, (5, 10, 30)
GRID = tuple(10.0**k for k in range(2, -8, -1))
METHODS = ("leave-one-out", "ledoit-wolf", "oas")


def spoiled(
    data: Split, seed: int, samples: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return images, labels, and which of these are wrong."""
    rng = torch.Generator().manual_seed(seed)
    some = torch.randperm(len(data[1]), generator=rng)[:samples]
    x, y = data[0][some], data[1][some].clone()
    wrong = torch.randperm(samples, generator=rng)[: int(SHARE * samples)]
    y[wrong] = (y[wrong] + torch.randint(1, 10, wrong.shape, generator=rng)) % 10
    return x, y, wrong


def records_of(seed: int, epochs: int, data: Split, samples: int) -> list[dict]:
    """Train once, and look for the wrong labels in every way."""
    x, y, wrong = spoiled(data, seed, samples)
    torch.manual_seed(seed)
    model = cnn()
    sgd = torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True)
    train(model, x, y, sgd, epochs=epochs, batch=64, peak=0.05)
    test = evaluate(model, *data[2:])[1]
    with torch.no_grad():
        losses = cross_entropy(model(x), y, reduction="none")
    g = per_sample_gradients(model, cross_entropy, x, y)
    inverse = mfac.InverseFisher(g, damping="auto")
    gram = inverse.gram.double().numpy()
    eigenvalues, vectors = np.linalg.eigh(gram)
    # Rows of length m with the same Gram: self-influence is the same, and another λ costs no pass.
    rows = vectors * np.sqrt(np.clip(eigenvalues, 0.0, None))
    chosen = {"leave-one-out": inverse.damping}

    def found(scores: np.ndarray) -> int:
        return len(set(np.argsort(-scores)[: len(wrong)]) & set(wrong.tolist()))

    records = []

    def record(by: str, scores: np.ndarray, damping: float | None = None) -> None:
        about = {"seed": seed, "epochs": epochs, "test": test, "wrong": len(wrong)}
        records.append({**about, "by": by, "damping": damping, "found": found(scores)})

    record("its own loss", losses.numpy())
    record("‖g‖", np.diag(gram))
    for damping in GRID:
        influence = Influence(rows, damping=damping)
        record(f"self-influence, λ {damping:.0e}", influence.self_influence(), damping)
    for method in METHODS:
        if method not in chosen:
            chosen[method] = mfac.choose_damping(g, method=method)
        influence = Influence(rows, damping=chosen[method])
        record(f"self-influence, `{method}`", influence.self_influence(), chosen[method])
    return records


def findings(records: list[dict]) -> str:
    """Write the table of what was found, and under which λ where that was chosen."""
    lines = []
    for by in unique(records, "by"):
        cells = [by]
        for epochs in unique(records, "epochs"):
            found = select(records, "found", by=by, epochs=epochs)
            used = select(records, "damping", by=by, epochs=epochs)
            cells.append(", ".join(str(n) for n in found))
            if "`" in by:
                cells[-1] += ", λ " + ", ".join(f"{x:.0e}" for x in used)
        lines.append(cells)
    number = records[0]["wrong"]
    header = [f"wrong labels among the first {number} by"]
    return table([*header, *(f"{n} epochs" for n in unique(records, "epochs"))], lines)


def main(argv: list[str] | None = None) -> None:
    """Spoil, train, search, write."""
    parser = options("wrong labels")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's four IDX files")
    args = parser.parse_args(argv)
    data = fashion_mnist(args.data)
    samples, lengths = (200, (1,)) if args.quick else (SAMPLES, EPOCHS)
    records = [
        record
        for seed in seeds_of(args)
        for epochs in lengths
        for record in records_of(seed, epochs, data, samples)
    ]
    settings = {"samples": SAMPLES, "share": SHARE, "epochs": EPOCHS}
    save(args.output, "wrong-labels", settings, records, {"table": findings(records)})


if __name__ == "__main__":
    main()
