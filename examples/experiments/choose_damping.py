"""The damping that gradients choose for themselves, against a grid of powers of ten, by test.

Run ``python examples/experiments/choose_damping.py``: prunes the digits' MLP in one shot, predicts
what leaving an image out does, gives a network error bars, and preconditions conjugate gradients,
each under every λ of a grid and under the λ of every method of ``mfac_core.choose_damping``, which
sees the rows alone. ``--tasks cnn`` prunes the convolutional network of ``prune_fashion.py``.
Writes a table, a picture and all numbers to ``docs/results``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import prune_digits
import prune_fashion
from data import fashion_mnist
from figures import drawing
from networks import evaluate, set_weights, track
from pruning_methods import Run, run_of
from seeds import options, save, seeds_of, select, spread, table, unique
from torch import nn

import mfac_core as mfac

sys.path.append(str(Path(__file__).parents[1] / "recipes"))
import influence
import laplace
import preconditioner
import softmax
from scipy.sparse.linalg import LinearOperator, cg
from scipy.special import expit
from scipy.stats import norm

METHODS = ("leave-one-out", "ledoit-wolf", "oas")
GRID = 10.0 ** np.arange(-9, 2)
MOST = 500
"""Iterations of conjugate gradients that are waited for."""


class Task(NamedTuple):
    """Something to do under many dampings.

    Attributes
    ----------
    name : str
        For the table.
    score : str
        What is measured on data that the rows do not hold.
    rising : bool
        Whether more of it is better.
    gradients : array, shape (m, d)
        What λ is chosen by.
    block_size : int or None
        Of the blocks of F that the task takes.
    measure : callable
        From λ to the score.
    """

    name: str
    score: str
    rising: bool
    gradients: object
    block_size: int | None
    measure: Callable[[float], float]


def pruning(
    name: str, model: nn.Module, run: Run, test: tuple, sparsity: float, size: int | None
) -> Task:
    """Prune in one shot, by the joint update."""

    def measure(damping: float) -> float:
        set_weights(model, run.prune(sparsity=sparsity, damping=damping, block_size=size))
        accuracy = evaluate(model, *test)[1]
        set_weights(model, run.weights)
        return accuracy

    blocks = "the whole F" if size is None else f"blocks of {size}"
    name = f"{name}, {sparsity:.0%}, {len(run.gradients)} rows, {blocks}"
    return Task(name, "test accuracy", True, run.gradients, size, measure)


def digits(seed: int, args: argparse.Namespace) -> Iterator[Task]:
    """Yield pruning the digits' MLP, with many rows and with few, the whole F and blocks."""
    model, (x, y, *test) = prune_digits.prepared(seed, prune_digits.EPOCHS)
    for rows in (50,) if args.quick else (600, 50):
        run = run_of(model, x, y, **prune_digits.SETTINGS | {"rows": rows})
        for size in (None, 128, 16):
            yield pruning("digits", model, run, test, 0.8, size)


def cnn(seed: int, args: argparse.Namespace) -> Iterator[Task]:
    """Yield pruning the convolutional network."""
    data = fashion_mnist(args.data)
    model = prune_fashion.prepared("cnn", seed, data, args.cache, quick=args.quick)
    settings = prune_fashion.SETTINGS["cnn"] | ({"rows": 16} if args.quick else {})
    run = run_of(model, *prune_fashion.shuffled(data, seed), **settings)
    for size in (None, 1024):
        for sparsity in (0.8, 0.95):
            yield pruning("CNN", model, run, data[2:], sparsity, size)


def influences(seed: int, args: argparse.Namespace) -> Iterator[Task]:
    """Yield the correlation of predicted with real changes, of the recipe's images left out."""
    rng = np.random.default_rng(seed)
    x, y = softmax.load(rng)
    m = 600
    train, test = (x[:m], y[:m].copy()), (x[m:], y[m:])
    flipped = rng.choice(m, 60, replace=False)
    train[1][flipped] = (train[1][flipped] + rng.integers(1, 10, 60)) % 10
    weights = softmax.fit(*train, softmax.l2(influence.PENALTY))
    left_out = rng.choice(m, 5 if args.quick else 40, replace=False)
    actual = [influence.leave_out(i, weights, train, test) for i in left_out]
    g = softmax.gradients(weights, *train)
    asked = softmax.gradients(weights, *test).mean(axis=0)

    def measure(damping: float) -> float:
        predicted = g @ (mfac.InverseFisher(g, damping=damping) @ asked)
        return float(np.corrcoef(predicted[left_out], actual)[0, 1])

    yield Task("influence", "correlation with retraining", True, g, None, measure)


def error_bars(seed: int, args: argparse.Namespace) -> Iterator[Task]:
    """Yield the test likelihood of the recipe's network, trained too closely, with error bars."""
    rng = np.random.default_rng(seed)
    x, y = laplace.load_diabetes(return_X_y=True)
    order, m = rng.permutation(len(y)), 100
    x, y = x[order], y[order]
    y = (y - y[:m].mean()) / y[:m].std()
    x = np.column_stack([x / x[:m].std(axis=0), np.ones(len(y))])
    start = rng.standard_normal((x.shape[1] + 1) * laplace.HIDDEN) / np.sqrt(laplace.HIDDEN)
    weights = laplace.fit(x[:m], y[:m], 0.1, start)
    mean = laplace.outputs(weights, x[m:])[0]

    def measure(damping: float) -> float:
        variance = laplace.laplace(weights, x[:m], y[:m], x[m:], damping)[1]
        return float(-norm.logpdf(y[m:], mean, np.sqrt(laplace.NOISE**2 + variance)).mean())

    rows = laplace.jacobian(weights, x[:m]) / laplace.NOISE
    yield Task("Laplace", "test NLL", False, rows, None, measure)


def preconditioning(seed: int, args: argparse.Namespace) -> Iterator[Task]:
    """Yield the iterations for the recipe's second step of Newton's method."""
    rng = np.random.default_rng(seed)
    n = 300 if args.quick else 1000
    x, y = preconditioner.load(n, rng)
    p = np.full(n, 0.5)
    slope = x.T @ (p - y) / n
    p = expit(-x @ preconditioner.solve(x, p, slope)[0])
    g = x.T @ (p - y) / n
    gradients = preconditioner.rows(x, p, n // 4, rng)
    system = preconditioner.hessian(x, p * (1 - p))

    def measure(damping: float) -> float:
        inverse, steps = mfac.InverseFisher(gradients, damping=damping), []
        operator = LinearOperator((len(g), len(g)), matvec=system, dtype=x.dtype)
        cg(
            operator,
            g,
            rtol=preconditioner.RTOL,
            M=inverse.to_scipy(),
            maxiter=MOST,
            callback=steps.append,
        )
        return float(len(steps))

    yield Task("preconditioner", "iterations", False, gradients, None, measure)


TASKS = {
    "digits": digits,
    "influence": influences,
    "laplace": error_bars,
    "preconditioner": preconditioning,
    "cnn": cnn,
}
SHORT = list(TASKS)[:-1]
"""Those of some minutes together."""


def records_of(task: Task, seed: int, grid: np.ndarray) -> list[dict]:
    """Measure under every λ of the grid, and of every method."""
    chosen = {
        method: mfac.choose_damping(task.gradients, block_size=task.block_size, method=method)
        for method in METHODS
    }
    by = [("grid", float(damping)) for damping in grid] + list(chosen.items())
    about = {"task": task.name, "measure": task.score, "rising": task.rising, "seed": seed}
    return [
        {**about, "by": name, "damping": damping, "score": task.measure(damping)}
        for name, damping in track(by, task.name)
    ]


def best_of(records: list[dict]) -> dict:
    """Return the best record of a grid."""
    return max(records, key=lambda r: r["score"] if r["rising"] else -r["score"])


def means(records: list[dict], task: str) -> list[dict]:
    """Return one record for each λ of the grid, with the mean score over seeds."""
    found = [r for r in records if r["task"] == task and r["by"] == "grid"]
    return [
        {**found[0], "damping": damping, "score": np.mean(select(found, "score", damping=damping))}
        for damping in unique(found, "damping")
    ]


def written(records: list[dict]) -> str:
    """Write a score over seeds and the λ, or their range, that gave it."""
    dampings = sorted(
        {f"{r['damping']:.0e}": r["damping"] for r in records}.items(), key=lambda x: x[1]
    )
    between = "–".join(dict.fromkeys((dampings[0][0], dampings[-1][0])))
    return f"{spread([r['score'] for r in records])}, λ {between}"


def choices(records: list[dict]) -> str:
    """Write a table of tasks against the best of the grid and the methods' choices."""
    lines = []
    for task in unique(records, "task"):
        own = [r for r in records if r["task"] == task]
        best = best_of(means(records, task))["damping"]
        at_best = [r for r in own if r["by"] == "grid" and r["damping"] == best]
        cells = [written([r for r in own if r["by"] == method]) for method in METHODS]
        lines.append([f"{task}: {own[0]['measure']}", written(at_best), *cells])
    return table(["", "the grid's best", *METHODS], lines)


def draw(path: Path, records: list[dict]) -> None:
    """Draw each task's score against λ, and where the methods' choices lie."""
    tasks = unique(records, "task")
    rows = -(-len(tasks) // 2)
    with drawing(path, 10, 2.6 * rows) as figure:
        for place, task in enumerate(tasks, 1):
            axes = figure.add_subplot(rows, 2, place)
            own = [r for r in records if r["task"] == task]
            curve = means(records, task)
            axes.semilogx(
                [r["damping"] for r in curve], [r["score"] for r in curve], "o-", color="#999999",
                label="grid, mean over seeds",
            )  # fmt: skip
            for method, colour in zip(METHODS, ("#0072B2", "#E69F00", "#009E73"), strict=True):
                found = [r for r in own if r["by"] == method]
                points = [r["damping"] for r in found], [r["score"] for r in found]
                axes.plot(*points, "D", color=colour, ms=5, label=method)
            axes.set_title(task, fontsize="medium")
            axes.set(xlabel="λ", ylabel=own[0]["measure"])
        figure.axes[0].legend()


def main(argv: list[str] | None = None) -> None:
    """Choose, measure, write."""
    parser = options("the choice of the damping")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=SHORT)
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's four IDX files")
    parser.add_argument(
        "--cache", type=Path, default=prune_fashion.CACHE, help="folder for trained networks"
    )
    args = parser.parse_args(argv)

    grid = GRID[4::2] if args.quick else GRID
    records = [
        record
        for name in args.tasks
        for seed in seeds_of(args)
        for task in TASKS[name](seed, args)
        for record in records_of(task, seed, grid)
    ]
    name = (
        "choose-damping"
        if args.tasks == list(TASKS)[:-1]
        else "choose-damping-" + "-".join(args.tasks)
    )
    save(args.output, name, {"grid": grid.tolist()}, records, {"table": choices(records)})
    draw(args.output / f"{name}.svg", records)


if __name__ == "__main__":
    main()
