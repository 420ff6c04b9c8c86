"""Train a residual network with batch normalisation on Fashion-MNIST with M-FAC and its peers.

Run ``python examples/experiments/train_resnet.py``: images of 14 × 14 pixels, the means of two by
two, shifted and mirrored at random, and weight decay. The steps are those of two epochs of 10,000
images, or of ``--images``. It tunes, compares, and then varies the size of M-FAC's window. It needs
the four IDX files of the data set as Debian's package dataset-fashion-mnist installs them, or in
the folder ``--data``. Writes tables, pictures and all numbers to ``docs/results``.
"""

from __future__ import annotations

import torch
from data import fashion_mnist
from networks import evaluate, resnet
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad
from training import Task, report, training_options
from training_windows import report_windows

EPOCHS, IMAGES, BATCH, WIDTH, DECAY, SHIFT = 2, 10_000, 64, 8, 0.05, 1


def augmented(x: Tensor, samples: torch.Generator) -> Tensor:
    """Shift images by up to SHIFT pixels each way, and mirror half of them."""
    count, size = len(x), x.shape[-1]
    windows = pad(x, [SHIFT] * 4).unfold(2, size, 1).unfold(3, size, 1)
    down, right = torch.randint(2 * SHIFT + 1, (2, count), generator=samples)
    x = windows[torch.arange(count), :, down, right]
    mirrored = torch.rand(count, generator=samples) < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


def network() -> nn.Module:
    """Return the network; pictures of few channels are faster with these side by side."""
    return resnet(WIDTH).to(memory_format=torch.channels_last)


def resnet_task(folder: str | None, images: int = IMAGES) -> Task:
    """Return the task of telling clothes."""
    x, y, x_test, y_test = fashion_mnist(folder)
    x, x_test = avg_pool2d(x[:images], 2), avg_pool2d(x_test, 2)
    y = y[:images]

    def batch(samples: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(y), (BATCH,), generator=samples)
        return augmented(x[rows], samples), y[rows]

    weights = sum(p.numel() for p in network().parameters())
    return Task(
        f"{len(y):,} images of Fashion-MNIST, a residual network of {weights:,} parameters",
        network,
        batch,
        lambda model: evaluate(model, x_test, y_test)[1],
        "test accuracy",
        EPOCHS * len(y) // BATCH,
        weight_decay=DECAY,
    )


def main(argv: list[str] | None = None) -> None:
    """Train, compare, write."""
    parser = training_options("training a residual network on Fashion-MNIST")
    parser.add_argument("--data", help="folder of the data set")
    parser.add_argument("--images", type=int, default=IMAGES, help="how many to train on")
    args = parser.parse_args(argv)
    task = resnet_task(args.data, args.images)
    report("train-resnet", task, args)
    report_windows("train-resnet-windows", task, args)


if __name__ == "__main__":
    main()
