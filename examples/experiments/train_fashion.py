"""Train a convolutional network on Fashion-MNIST with M-FAC and its peers.

Run ``python examples/experiments/train_fashion.py``: it tunes and compares. The steps are those of
one epoch. It needs the four IDX files of the data set as Debian's package dataset-fashion-mnist
installs them, or in the folder ``--data``. Writes a table, a picture and all numbers to
``docs/results``.
"""

from __future__ import annotations

import torch
from data import fashion_mnist
from networks import cnn, evaluate
from torch import Tensor
from training import Task, report, training_options

STEPS, BATCH = 938, 64


def main(argv: list[str] | None = None) -> None:
    """Train, compare, write."""
    parser = training_options("training a convolutional network on Fashion-MNIST")
    parser.add_argument("--data", help="folder of the data set")
    args = parser.parse_args(argv)
    x, y, x_test, y_test = fashion_mnist(args.data)

    def batch(samples: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(y), (BATCH,), generator=samples)
        return x[rows], y[rows]

    task = Task(
        "Fashion-MNIST, a convolutional network of 98,442 parameters",
        cnn,
        batch,
        lambda model: evaluate(model, x_test, y_test)[1],
        "test accuracy",
        STEPS,
    )
    report("train-fashion", task, args)


if __name__ == "__main__":
    main()
