"""Prune a convolutional and a residual network on Fashion-MNIST, in PyTorch, without fine-tuning.

Run ``python examples/prune_fashion.py --network cnn`` (98,192 weights) or ``--network resnet``
(214,296 weights, with batch normalisation): for each seed trains on all 60,000 images, takes
gradients averaged over a few images each, and prunes by every method. Writes tables, a picture and
all numbers to ``docs/results``. Trained networks are kept in ``--cache``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from data import Split, fashion_mnist
from networks import cnn, evaluate, resnet, statistics_of, track, train
from pruning_methods import METHODS, run_of, two_of_four
from pruning_report import Yardstick, accuracies, draw, rises
from seeds import options, save, seeds_of
from torch import nn

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
NETWORKS = {"cnn": cnn, "resnet": resnet}
TRAINING = {
    "cnn": {"epochs": 5, "peak": 0.05, "batch": 128},
    "resnet": {"epochs": 4, "peak": 0.1, "batch": 128},
}
SETTINGS = {
    "cnn": {"rows": 256, "average": 16, "damping": 1e-2, "damping_in_steps": 1e-4},
    "resnet": {"rows": 256, "average": 16, "damping": 1e-4},
}
RISE = {"cnn": 0.95, "resnet": 0.8}
"""Sparsity at which the predicted and the real rise of the loss are compared."""
CACHE = Path(tempfile.gettempdir()) / "mfac_core-examples"


def prepared(network: str, seed: int, data: Split, cache: Path, *, quick: bool) -> nn.Module:
    """Return a network trained from one seed, now or by an earlier run."""
    torch.manual_seed(seed)
    x, y, _, _ = data
    model = NETWORKS[network]()
    options = TRAINING[network]
    if quick:
        train(model, x[:2000], y[:2000], _sgd(model), **{**options, "epochs": 1})
        return model
    file = cache / f"{network}-{seed}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    train(model, x, y, _sgd(model), **options)
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True)


def shuffled(data: Split, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the training images and labels in random order."""
    order = torch.randperm(len(data[1]), generator=torch.Generator().manual_seed(seed))
    return data[0][order], data[1][order]


def records_of(network: str, seed: int, model: nn.Module, data: Split, quick: bool) -> list[dict]:
    """Prune one network and measure, by sparsity and by the pattern 2:4."""
    settings = {**SETTINGS[network], **({"rows": 16} if quick else {})}
    sparsities = SPARSITIES[2:5:2] if quick else SPARSITIES
    x_test, y_test = (part[: 1000 if quick else None] for part in data[2:])
    x, y = shuffled(data, seed)
    run = run_of(model, x, y, **settings)
    measure = Yardstick(model, run, x_test, y_test, average=settings["average"])
    about = {"network": network, "seed": seed, "dense": measure.dense_accuracy}

    def record(method: str, sparsity: float, weights: torch.Tensor, pattern: str) -> dict:
        result = {**about, "method": method, "sparsity": sparsity, "pattern": pattern}
        result |= measure(weights)
        if network == "resnet":
            with statistics_of(model, x[: settings["rows"] * settings["average"]]):
                result["settled"] = evaluate(model, x_test, y_test)[1]
        return result

    records = []
    for method in track(list(METHODS), f"pruning, seed {seed}"):
        curve = METHODS[method](run, sparsities)
        records += [record(method, s, w, "any") for s, w in zip(sparsities, curve, strict=True)]
    return records + [record(m, 0.5, w, "2:4") for m, w in two_of_four(run).items()]


def write(network: str, records: list[dict], folder: Path) -> None:
    """Write tables, a picture and all numbers."""
    free = [r for r in records if r["pattern"] == "any"]
    fixed = [r for r in records if r["pattern"] == "2:4"]
    tables = {
        "accuracy": accuracies(free),
        "rise": rises(free, RISE[network]),
        "pattern": accuracies(fixed, corner="test accuracy with 2 of every 4 kept, at"),
    }
    if network == "resnet":
        tables["settled"] = accuracies(free, value="settled")
    settings = SETTINGS[network] | TRAINING[network]
    save(folder, f"fashion-{network}", settings, records, tables)
    draw(folder / f"fashion-{network}.svg", free, f"Fashion-MNIST, {network}, no fine-tuning")


def arguments(description: str, argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments of a script that prunes one of the networks."""
    parser = options(description)
    parser.add_argument("--network", choices=list(NETWORKS), default="cnn")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's four IDX files")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for trained networks")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train, prune, write."""
    args = arguments("pruning on Fashion-MNIST", argv)
    data = fashion_mnist(args.data)
    records = []
    for seed in seeds_of(args):
        model = prepared(args.network, seed, data, args.cache, quick=args.quick)
        records += records_of(args.network, seed, model, data, args.quick)
    write(args.network, records, args.output)


if __name__ == "__main__":
    main()
