"""Train a residual network with batch normalisation on images with M-FAC and its peers.

Run ``python examples/experiments/train_resnet.py``: Fashion-MNIST at 14 × 14 pixels, the means of
two by two, shifted and mirrored at random, and weight decay. The steps are those of two epochs of
10,000 images. It tunes, compares, and then varies the size of M-FAC's window. With ``--full`` all
images are trained on; rates are then chosen by runs of as many steps as before, and the window
stays. It needs the four IDX files of the data set as Debian's package dataset-fashion-mnist
installs them, or in the folder ``--data``; where that holds the binary files of CIFAR-10, these are
taken. Writes tables, pictures and all numbers to ``docs/results``.
"""

from __future__ import annotations

import functools

import torch
from data import cifar10, fashion_mnist, is_cifar10
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


def network(channels: int) -> nn.Module:
    """Return the network; pictures of few channels are faster with these side by side."""
    return resnet(WIDTH, channels).to(memory_format=torch.channels_last)


def resnet_task(folder: str | None, images: int | None = IMAGES) -> Task:
    """Return the task of telling clothes, or what is on the images of CIFAR-10."""
    name, read = ("CIFAR-10", cifar10) if is_cifar10(folder) else ("Fashion-MNIST", fashion_mnist)
    x, y, x_test, y_test = read(folder)
    x, x_test = avg_pool2d(x[:images], 2), avg_pool2d(x_test, 2)
    y = y[:images]
    make = functools.partial(network, x.shape[1])

    def batch(samples: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(y), (BATCH,), generator=samples)
        return augmented(x[rows], samples), y[rows]

    weights = sum(p.numel() for p in make().parameters())
    return Task(
        f"{len(y):,} images of {name}, a residual network of {weights:,} parameters",
        make,
        batch,
        lambda model: evaluate(model, x_test, y_test)[1],
        "test accuracy",
        EPOCHS * len(y) // BATCH,
        weight_decay=DECAY,
        tuning_steps=EPOCHS * min(len(y), IMAGES) // BATCH,
    )


def main(argv: list[str] | None = None) -> None:
    """Train, compare, write."""
    parser = training_options("training a residual network on images")
    parser.add_argument("--data", help="folder of the data set")
    parser.add_argument("--full", action="store_true", help="train on all images")
    args = parser.parse_args(argv)
    task = resnet_task(args.data, None if args.full else IMAGES)
    name = "train-resnet-full" if args.full else "train-resnet"
    report(name, task, args)
    if not args.full:
        report_windows(f"{name}-windows", task, args)


if __name__ == "__main__":
    main()
