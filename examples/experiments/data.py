"""Real images within reach: scikit-learn's digits, Fashion-MNIST and CIFAR-10 from their files.

Each function returns torch tensors ``x_train, y_train, x_test, y_test``.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the files."""

Split = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def digits(seed: int = 0) -> Split:
    """Split the 1,797 handwritten digits of scikit-learn into 1,200 to train on and 597 to test.

    Parameters
    ----------
    seed : int, default 0
        Of the split, in which every digit has its share of both parts.

    Returns
    -------
    tuple of torch.Tensor
        x_train (1200, 64) and x_test (597, 64), float32 in [0, 1]: images of 8 × 8 pixels, a row
        each. y_train (1200,) and y_test (597,), int64: 0 to 9.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        np.float32(x / 16), y, train_size=1200, stratify=y, random_state=seed
    )
    return tuple(torch.from_numpy(part) for part in (x_train, y_train, x_test, y_test))


def fashion_mnist(folder: str | Path | None = None) -> Split:
    """Read Fashion-MNIST: 60,000 images of clothes to train on and 10,000 to test.

    Parameters
    ----------
    folder : path, optional
        Holds the usual four IDX files, gzipped or not. By default the folder of Debian's package
        dataset-fashion-mnist.

    Returns
    -------
    tuple of torch.Tensor
        x_train (60000, 1, 28, 28) and x_test (10000, 1, 28, 28), float32, of mean 0 and standard
        deviation 1 over all training pixels. y_train (60000,) and y_test (10000,), int64: 0 to 9.

    Raises
    ------
    FileNotFoundError
        If a file is missing; the message says what to install or to pass.
    """
    folder = FASHION_MNIST if folder is None else Path(folder)
    x_train, x_test = (_idx(folder, f"{part}-images-idx3-ubyte") for part in ("train", "t10k"))
    y_train, y_test = (_idx(folder, f"{part}-labels-idx1-ubyte") for part in ("train", "t10k"))
    mean, deviation = x_train.mean(), x_train.std()
    images = (np.float32((x - mean) / deviation)[:, None] for x in (x_train, x_test))
    x_train, x_test = (torch.from_numpy(x) for x in images)
    return x_train, torch.from_numpy(y_train).long(), x_test, torch.from_numpy(y_test).long()


def cifar10(folder: str | Path) -> Split:
    """Read CIFAR-10: 50,000 colour images to train on and 10,000 to test.

    Parameters
    ----------
    folder : path
        Holds the six files of the binary version, ``data_batch_1.bin`` to 5 and ``test_batch.bin``.

    Returns
    -------
    tuple of torch.Tensor
        x_train (50000, 3, 32, 32) and x_test (10000, 3, 32, 32), float32, of mean 0 and standard
        deviation 1 over all training pixels. y_train (50000,) and y_test (10000,), int64: 0 to 9.
    """

    def records(*names: str) -> np.ndarray:
        files = [np.fromfile(Path(folder) / f"{name}.bin", np.uint8) for name in names]
        return np.concatenate(files).reshape(-1, 1 + 3 * 32 * 32)

    train, test = records(*(f"data_batch_{i}" for i in range(1, 6))), records("test_batch")
    mean, deviation = train[:, 1:].mean(), train[:, 1:].std()
    x_train, x_test = (
        torch.from_numpy(np.float32((part[:, 1:] - mean) / deviation)).view(-1, 3, 32, 32)
        for part in (train, test)
    )
    y_train, y_test = (torch.from_numpy(part[:, 0].astype(np.int64)) for part in (train, test))
    return x_train, y_train, x_test, y_test


def is_cifar10(folder: str | Path | None) -> bool:
    """Whether a folder holds CIFAR-10's files."""
    return folder is not None and (Path(folder) / "test_batch.bin").exists()


def _idx(folder: Path, name: str) -> np.ndarray:
    """Read one IDX file of unsigned bytes."""
    for path, opened in ((folder / f"{name}.gz", gzip.open), (folder / name, open)):
        if path.exists():
            with opened(path, "rb") as file:
                data = file.read()
            # Two zero bytes, the type, the number of axes, and 4 bytes for the length of each.
            shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
            return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape).copy()
    raise FileNotFoundError(
        f"no {name} or {name}.gz in {folder}: install Debian's package dataset-fashion-mnist, "
        "or pass the folder of the four IDX files of Fashion-MNIST with --data"
    )
