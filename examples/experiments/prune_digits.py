"""Prune an MLP on scikit-learn's digits, in PyTorch, without fine-tuning.

Run ``python examples/prune_digits.py``: for each seed splits the data, trains, takes the gradients
of 600 training images, one a row, and prunes by every method. Writes tables, a picture and all
numbers to ``docs/results``.
"""

from __future__ import annotations

import torch
from data import Split, digits
from networks import digits_mlp, track, train
from pruning_methods import METHODS, run_of
from pruning_report import Yardstick, accuracies, draw, rises
from seeds import options, save, seeds_of
from torch import nn

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
SETTINGS = {"rows": 600, "average": 1, "damping": 1e-3}
EPOCHS = 20
LONGER, LONGER_DAMPING = 80, 1e-4
"""Epochs of a second training, for the methods in one shot; its gradients are smaller."""


def prepared(seed: int, epochs: int) -> tuple[nn.Module, Split]:
    """Return a network trained from one seed, and its data."""
    torch.manual_seed(seed)
    data = digits(seed)
    model = digits_mlp()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    train(model, *data[:2], optimizer, epochs=epochs, batch=64)
    return model, data


def records_of(seed: int, epochs: int, names: list[str], settings: dict) -> list[dict]:
    """Train from one seed, prune and measure."""
    model, (x, y, x_test, y_test) = prepared(seed, epochs)
    run = run_of(model, x, y, **settings)
    measure = Yardstick(model, run, x_test, y_test, average=settings["average"])
    about = {"seed": seed, "epochs": epochs, "dense": measure.dense_accuracy}
    return [
        {**about, "method": name, "sparsity": sparsity, **measure(weights)}
        for name in track(names, f"pruning, seed {seed}")
        for sparsity, weights in zip(SPARSITIES, METHODS[name](run, SPARSITIES), strict=True)
    ]


def main(argv: list[str] | None = None) -> None:
    """Train, prune, write."""
    parser = options("pruning an MLP on the digits")
    args = parser.parse_args(argv)

    settings = SETTINGS | ({"rows": 50} if args.quick else {})
    seeds = seeds_of(args)
    in_one_shot = ["magnitude", "diagonal Fisher", "the paper's", "joint", "joint, staged"]
    records = [r for seed in seeds for r in records_of(seed, EPOCHS, list(METHODS), settings)]
    again = EPOCHS if args.quick else LONGER
    settings["damping"] = LONGER_DAMPING
    longer = [r for seed in seeds for r in records_of(seed, again, in_one_shot, settings)]
    tables = {
        "accuracy": accuracies(records),
        "rise": rises(records, 0.8),
        "longer": accuracies(longer, f"test accuracy after {again} epochs at"),
    }
    save(args.output, "digits", SETTINGS, [*records, *longer], tables)
    draw(args.output / "digits.svg", records, "Digits MLP, no fine-tuning")


if __name__ == "__main__":
    main()
