"""Train a convolutional network on Fashion-MNIST with SGD, Adam, AdamW and M-FAC.

Run ``python examples/train_fashion.py``, with the four IDX files of the data set as Debian's
package dataset-fashion-mnist installs them, or in the folder ``--data``. Writes a table, a picture
and all numbers to ``docs/results``.
"""

from __future__ import annotations

import torch
from datasets import fashion_mnist
from networks import evaluate
from torch import Tensor, nn
from training import Task, options, report

STEPS, BATCH = 500, 64


def small_cnn() -> nn.Module:
    """Return a convolutional network for images of 28 × 28, with 26,826 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 49, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def main(argv: list[str] | None = None) -> None:
    """Train, compare, write."""
    parser = options("training a convolutional network on Fashion-MNIST")
    parser.add_argument("--data", help="folder of the data set")
    args = parser.parse_args(argv)
    x, y, x_test, y_test = fashion_mnist(args.data)

    def batch(samples: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(y), (BATCH,), generator=samples)
        return x[rows], y[rows]

    task = Task(
        "Fashion-MNIST, a convolutional network of 26,826 weights",
        small_cnn,
        batch,
        lambda model: evaluate(model, x_test, y_test)[1],
        "test accuracy",
        STEPS,
    )
    report("train-fashion", task, args)


if __name__ == "__main__":
    main()
