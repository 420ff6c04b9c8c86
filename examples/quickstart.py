"""Check, prune and train a small network with the inverse of its empirical Fisher matrix.

From m gradients of a network with d weights, the rows of G, comes the empirical Fisher matrix

    F = λI + GᵀG / m        λ: the damping

a d × d matrix that stands in for the curvature of the loss. mfac_core multiplies by its inverse
without ever forming it. On the digits of scikit-learn this script

1. checks such products, and the diagonal of the inverse, against a dense inverse;
2. prunes trained networks in one shot, by magnitude and by the inverse Fisher;
3. compares SGD with M-FAC, which is SGD preconditioned by the inverse Fisher.

Run ``python quickstart.py``: it prints a table for each part and draws ``quickstart.png``.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.linalg import norm
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits  # comes with scikit-learn

import mfac_core as mfac
from mfac_core.testing import dense_inverse

Array = NDArray[Any]
Map = Callable[[Array], Array]
Styles = Sequence[tuple[str, str]]  # colour and marker of each curve

# Parts 1 and 2, with one gradient for each training image. At sparsities of 80 and 85 % the methods
# come in the same order for any damping from 1e-6 to 1e-4; at 95 % the largest does best.
DAMPING = 1e-4
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)

# Part 3. Where the window has no gradients the inverse Fisher is 1 / damping, so the learning rate
# goes with the damping. Both optimisers have the settings of lowest training loss (the geometric
# mean over all steps, seeds 10 to 13, the test images unseen) on these grids, the window fixed:
#   SGD    rate 0.03 0.05 0.1 0.15 0.2 0.25 0.3 0.4 0.5 0.7 1
#   M-FAC  rate / damping 0.1 0.2 0.3 0.4 0.5 0.7 1 1.5 2 3, damping 0.001 0.003 0.01 0.03 0.1 0.3 1
STEPS, BATCH, MOMENTUM = 300, 128, 0.9
SGD_RATE = 0.25
MFAC_RATE, MFAC_DAMPING, MFAC_WINDOW = 0.015, 0.03, 64

ORANGE, GREEN, BLUE = "#D55E00", "#009E73", "#0072B2"  # told apart by the colour-blind too


class Data(NamedTuple):
    """Images, one a row of ``x`` with pixels in [0, 1], and their digits ``y``."""

    x: Array
    y: Array


class Run(NamedTuple):
    """Trained weights, the training loss after each step, and the seconds spent on the steps."""

    weights: Array
    losses: list[float]
    seconds: float


class Network:
    """A ReLU network whose weights, biases included, are one flat vector of length ``d``."""

    def __init__(self, *widths: int) -> None:
        self.shapes = [(n_in + 1, n_out) for n_in, n_out in pairwise(widths)]  # + 1: the biases
        self.d = sum(rows * columns for rows, columns in self.shapes)

    def initial_weights(self, rng: np.random.Generator) -> Array:
        """Draw weights, and biases, of variance 2 / (number of inputs)."""
        layers = [rng.normal(0, np.sqrt(2 / shape[0]), shape) for shape in self.shapes]
        return np.concatenate([layer.ravel() for layer in layers]).astype(np.float32)

    def layers(self, weights: Array) -> list[Array]:
        """Cut the flat vector into a matrix for each layer; its last row holds the biases."""
        ends = np.cumsum([rows * columns for rows, columns in self.shapes])
        parts = np.split(weights, ends[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def forward(self, weights: Array, x: Array) -> tuple[list[Array], Array]:
        """Return the inputs of each layer, with a column of ones, and the class probabilities."""
        inputs = []
        for layer in self.layers(weights):
            inputs.append(np.hstack([x, np.ones((len(x), 1), x.dtype)]))
            logits = inputs[-1] @ layer
            x = np.maximum(logits, 0)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return inputs, odds / odds.sum(axis=1, keepdims=True)

    def gradients(self, weights: Array, data: Data) -> Array:
        """Return the gradient of each image's loss, one a row, by backpropagation."""
        inputs, delta = self.forward(weights, data.x)
        delta[np.arange(len(data.y)), data.y] -= 1  # the derivative by the logits
        blocks = []
        for x, layer in zip(inputs[::-1], self.layers(weights)[::-1], strict=True):
            blocks.append((x[:, :, None] * delta[:, None, :]).reshape(len(x), -1))
            delta = ((delta @ layer.T) * (x > 0))[:, :-1]  # without the column of ones
        return np.hstack(blocks[::-1])

    def loss(self, weights: Array, data: Data) -> float:
        """Return the mean cross-entropy."""
        probabilities = self.forward(weights, data.x)[1][np.arange(len(data.y)), data.y]
        return float(-np.log(np.maximum(probabilities, 1e-30)).mean())

    def accuracy(self, weights: Array, data: Data) -> float:
        """Return the share of images whose most probable digit is the right one."""
        return float(np.mean(self.forward(weights, data.x)[1].argmax(axis=1) == data.y))


def load_data(seed: int) -> tuple[Data, Data]:
    """Split the digits into 1,200 training and 597 test images."""
    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        np.float32(x / 16), y, train_size=1200, stratify=y, random_state=seed
    )
    return Data(x_train, y_train), Data(x_test, y_test)


def train(network: Network, data: Data, rate: float, precondition: Map, seed: int) -> Run:
    """Train by SGD with momentum, each batch's gradient first put through ``precondition``."""
    rng = np.random.default_rng(seed)
    weights = network.initial_weights(rng)
    velocity = np.zeros_like(weights)
    losses, seconds = [], 0.0
    for step in range(STEPS):
        start = time.perf_counter()
        batch = rng.choice(len(data.y), BATCH, replace=False)
        gradient = network.gradients(weights, Data(data.x[batch], data.y[batch])).mean(axis=0)
        velocity = MOMENTUM * velocity + precondition(gradient)
        weights = weights - rate * (1 - step / STEPS) * velocity  # the rate falls to zero
        seconds += time.perf_counter() - start
        losses.append(network.loss(weights, data))
    return Run(weights, losses, seconds)


def train_all(network: Network, data: Data, seeds: range) -> dict[str, list[Run]]:
    """Train with both optimisers from several starts."""
    runs: dict[str, list[Run]] = {"SGD": [], "M-FAC": []}
    for seed in progress(seeds, "training"):
        runs["SGD"].append(train(network, data, SGD_RATE, lambda g: g, seed))
        # Each gradient joins the window and comes back multiplied by the inverse Fisher.
        window = mfac.SlidingInverseFisher(network.d, MFAC_WINDOW, damping=MFAC_DAMPING)
        runs["M-FAC"].append(train(network, data, MFAC_RATE, window.append_matvec, seed))
    return runs


def check(gradients: Array, vectors: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Compare with a dense inverse; return its product with the last vector, and ours by dtype."""
    start = time.perf_counter()
    dense = dense_inverse(gradients, damping=DAMPING)
    exact = [dense.diagonal(), *(dense @ x for x in vectors.values())]
    rows = [("dense, float64", f"{time.perf_counter() - start:.2f}", *("" for _ in exact))]
    products = {}
    for dtype in ("float32", "float64"):
        start = time.perf_counter()
        inverse = mfac.InverseFisher(gradients.astype(dtype), damping=DAMPING)
        ours = [inverse.diagonal(), *(inverse @ x.astype(dtype) for x in vectors.values())]
        seconds = time.perf_counter() - start
        errors = [norm(a - b) / norm(b) for a, b in zip(ours, exact, strict=True)]
        rows.append((f"mfac, {dtype}", f"{seconds:.2f}", *map("{:.0e}".format, errors)))
        products[dtype] = ours[-1]
    title = "1. Inverse Fisher of {1:,} weights from {0:,} gradients: relative errors"
    print_table(title.format(*gradients.shape), ("", "seconds", "diagonal", *vectors), rows)
    return exact[-1], products


def sum_updates(weights: Array, keep: Array, inverse: mfac.InverseFisher, diagonal: Array) -> Array:
    """Prune as the M-FAC paper does: sum the updates, each best for removing one weight alone."""
    update = -(inverse @ np.where(keep, 0, weights / diagonal))
    return np.where(keep, weights + update, 0)


def joint_update(weights: Array, keep: Array, gradients: Array) -> Array:
    """Prune with the update of the kept weights that is best for all the removed ones together.

    It minimises the quadratic form of F with the removed weights changed by minus their values: a
    linear system for the kept ones, solved by the inverse Fisher of those alone.
    """
    kept, removed = gradients[:, keep], gradients[:, ~keep]
    pull = kept.T @ (removed @ weights[~keep]) / len(gradients)
    pruned = np.where(keep, weights, 0)
    pruned[keep] += mfac.InverseFisher(kept, damping=DAMPING) @ pull
    return pruned


def prune(weights: Array, gradients: Array) -> dict[str, list[Array]]:
    """Return the pruned weights by method, for each sparsity."""
    inverse = mfac.InverseFisher(gradients, damping=DAMPING)
    diagonal = inverse.diagonal()
    magnitude = np.abs(weights)
    saliency = weights**2 / (2 * diagonal)  # by F, what removing this weight alone costs
    pruned = defaultdict(list)
    for sparsity in SPARSITIES:
        keep = magnitude > np.quantile(magnitude, sparsity)
        pruned["magnitude"].append(np.where(keep, weights, 0))
        keep = saliency > np.quantile(saliency, sparsity)
        pruned["summed updates"].append(sum_updates(weights, keep, inverse, diagonal))
        pruned["joint update"].append(joint_update(weights, keep, gradients))
    return pruned


def prune_all(network: Network, runs: list[Run], data: Data, test: Data) -> dict[str, Array]:
    """Prune several networks; return the test accuracies by method, one network a row."""
    lists = defaultdict(list)
    for run in progress(runs, "pruning"):
        for method, pruned in prune(run.weights, network.gradients(run.weights, data)).items():
            lists[method].append([network.accuracy(weights, test) for weights in pruned])
    accuracies = {method: np.array(rows) for method, rows in lists.items()}
    table = [(method, *map("{:.3f}".format, a.mean(axis=0))) for method, a in accuracies.items()]
    before = np.mean([network.accuracy(run.weights, test) for run in runs])
    title = "2. One-shot pruning: test accuracy by sparsity ({:.3f} before), networks averaged: {}"
    print_table(title.format(before, len(runs)), ("", *map("{:.0%}".format, SPARSITIES)), table)
    return accuracies


def compare(network: Network, runs: dict[str, list[Run]], test: Data) -> dict[str, Array]:
    """Print how far each optimiser came and what a step cost; return the losses, one run a row."""
    losses = {name: np.array([run.losses for run in group]) for name, group in runs.items()}
    rows = []
    for name, group in runs.items():
        early, late = losses[name].mean(axis=0)[[STEPS // 3 - 1, STEPS - 1]]
        accuracy = np.mean([network.accuracy(run.weights, test) for run in group])
        ms = 1000 / STEPS * np.mean([run.seconds for run in group])
        rows.append((name, f"{early:.4f}", f"{late:.4f}", f"{accuracy:.3f}", f"{ms:.2f}"))
    header = ("", f"loss at {STEPS // 3}", f"loss at {STEPS}", "test accuracy", "ms a step")
    print_table(f"3. Training from scratch, starts averaged: {len(runs['SGD'])}", header, rows)
    return losses


def progress(items: Sequence[Any], label: str) -> Iterable[Any]:
    """Go through ``items`` behind a progress bar, if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"{label} ...", flush=True)
    else:
        items = tqdm(items, label, leave=False)
    return items


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print right-aligned columns below a title."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(f"\n{title}\n")
    for row in (header, *rows):
        print("  " + "   ".join(cell.rjust(n) for cell, n in zip(row, widths, strict=True)))


def plot_errors(axes: Axes, exact: Array, products: dict[str, Array]) -> None:
    """Draw the error of each element of a product against the size of the element."""
    sizes = np.abs(exact)
    axes.loglog(np.sort(sizes), np.sort(sizes), "--", color="grey", label="error = element")
    for (dtype, product), colour in zip(products.items(), (ORANGE, BLUE), strict=True):
        axes.plot(sizes, np.abs(product - exact), ".", ms=4, color=colour, label=dtype)


def plot_means(axes: Axes, x: Sequence[float], curves: dict[str, Array], styles: Styles) -> None:
    """Draw the mean of each array's rows, and their range as a band."""
    for (name, rows), (colour, marker) in zip(curves.items(), styles, strict=True):
        axes.fill_between(x, rows.min(axis=0), rows.max(axis=0), color=colour, alpha=0.12, lw=0)
        axes.plot(x, rows.mean(axis=0), marker=marker, color=colour, label=name)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the three parts and draw the picture."""
    parser = argparse.ArgumentParser(description="mfac_core on the digits of scikit-learn")
    parser.add_argument("--output", type=Path, default="quickstart.png", help="the picture's file")
    parser.add_argument("--seed", type=int, default=0, help="of the data split and the training")
    parser.add_argument("--quick", action="store_true", help="train from one start only")
    args = parser.parse_args(argv)

    data, test = load_data(args.seed)
    network = Network(64, 32, 24, 10)
    with threadpool_limits(limits=1):  # matrices this small gain little from more threads
        runs = train_all(network, data, range(args.seed, args.seed + (1 if args.quick else 5)))
        weights = runs["SGD"][0].weights
        x = np.random.default_rng(args.seed).standard_normal(network.d, np.float32)
        g = network.gradients(weights, test).mean(axis=0)
        vectors = {"random x": x, "test gradient g": g}
        exact, products = check(network.gradients(weights, data), vectors)
        accuracies = prune_all(network, runs["SGD"], data, test)
        losses = compare(network, runs, test)

    figure = Figure(figsize=(15, 5), layout="constrained")
    figure.suptitle(f"The inverse Fisher of a network with {network.d:,} weights", fontsize=14)
    left, middle, right = figure.subplots(1, 3)
    plot_errors(left, exact, products)
    left.set(title="1. $F^{-1}g$ against a dense inverse", xlabel="size of element", ylabel="error")
    plot_means(middle, SPARSITIES, accuracies, ((ORANGE, "o"), (GREEN, "s"), (BLUE, "^")))
    middle.set(title="2. One-shot pruning", xlabel="sparsity", ylabel="test accuracy")
    middle.xaxis.set_major_formatter("{x:.0%}")
    plot_means(right, range(1, STEPS + 1), losses, ((ORANGE, ""), (BLUE, "")))
    right.set(title="3. Training from scratch", xlabel="step", ylabel="training loss", yscale="log")
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.legend()
    output = args.output.with_suffix(args.output.suffix or ".png")
    figure.savefig(output, dpi=150)
    print(f"\nPicture: {output}")


if __name__ == "__main__":
    main()
