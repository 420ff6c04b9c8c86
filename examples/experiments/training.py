"""Train a network with SGD, Adam, AdamW and M-FAC, each tuned with the same effort, and compare.

Every optimiser has four learning rates to choose from. One run with each, from a seed of its own,
decides by the training loss over the last tenth of the steps; the seeds that are reported come
after. The rate falls to zero linearly in all runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import drawing
from networks import track
from seeds import save, seeds_of, select, spread, table, unique
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW, Optimizer

from mfac_core.torch import MFAC

WINDOW, DENSITY, DEFAULT = 64, 0.01, 0.01
TUNING_SEED = 1000
POINTS = 30
"""Means of the training loss that a run is recorded by."""


@dataclass(frozen=True)
class Task:
    """What is learned: a model, batches of random samples, and a measure on test data."""

    title: str
    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    test: Callable[[nn.Module], float]
    measure: str
    steps: int


def sgd(parameters: Iterable[Tensor], lr: float) -> Optimizer:
    """Return SGD with momentum."""
    return SGD(parameters, lr, momentum=0.9)


def mfac(
    parameters: Iterable[Tensor], lr: float, *, window: int = WINDOW, density: float | None = None
) -> Optimizer:
    """Return M-FAC in its scale-free form."""
    return MFAC(parameters, lr, window_size=window, momentum=0.9, density=density)


def sparse(parameters: Iterable[Tensor], lr: float) -> Optimizer:
    """Return M-FAC with a sparse window."""
    return mfac(parameters, lr, density=DENSITY)


Make = Callable[[Iterable[Tensor], float], Optimizer]

OPTIMIZERS: dict[str, tuple[Make, tuple[float, ...]]] = {
    "SGD, momentum 0.9": (sgd, (0.03, 0.1, 0.3, 1.0)),
    "Adam": (Adam, (0.001, 0.003, 0.01, 0.03)),
    "AdamW": (AdamW, (0.001, 0.003, 0.01, 0.03)),
    "M-FAC": (mfac, (0.003, DEFAULT, 0.03, 0.1)),
    "M-FAC, sparse": (sparse, (0.003, DEFAULT, 0.03, 0.1)),
}

COLOURS = ("#999999", "#E69F00", "#CC79A7", "#0072B2", "#009E73")


def run(task: Task, make: Make, lr: float, seed: int) -> dict[str, Any]:
    """Train once; return the loss in POINTS means, the result on test data, and the time.

    Time is that of one core, in seconds for all steps: the processor's, not the wall's, so that
    other work on the machine does not count.
    """
    torch.manual_seed(seed)
    samples = torch.Generator().manual_seed(seed)
    model = task.model()
    optimizer = make(model.parameters(), lr)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, task.steps)
    losses, seconds = [], 0.0
    for _ in range(task.steps):
        x, y = task.batch(samples)
        start = time.process_time()
        optimizer.zero_grad()
        loss = cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        optimizer.step()
        seconds += time.process_time() - start
        scheduler.step()
        losses.append(loss.item())
    means = [float(np.mean(some)) for some in np.array_split(losses, POINTS)]
    last = float(np.mean(losses[-max(1, task.steps // 10) :]))
    with torch.no_grad():
        result = task.test(model)
    return {
        "seed": seed,
        "rate": lr,
        "loss": last if np.isfinite(last) else float("inf"),
        "test": result,
        "seconds": seconds,
        "losses": means,
    }


def compare(task: Task, seeds: range, rates_tried: int | None) -> list[dict]:
    """Tune each optimiser, then train with it from every seed; M-FAC also as it comes."""
    records = []
    for name, (make, rates) in OPTIMIZERS.items():
        tuning = [
            run(task, make, lr, TUNING_SEED) for lr in track(rates[:rates_tried], f"tuning {name}")
        ]
        best = min(tuning, key=lambda record: record["loss"])["rate"]
        chosen = [run(task, make, best, seed) for seed in track(seeds, name)]
        records += [{"method": name, **record} for record in chosen]
        if "M-FAC" in name:
            if best != DEFAULT:
                chosen = [run(task, make, DEFAULT, seed) for seed in track(seeds, name)]
            records += [{"method": f"{name}, default rate", **record} for record in chosen]
    return records


def results(task: Task, records: list[dict]) -> str:
    """Write the table of optimisers."""
    rows = []
    for name in unique(records, "method"):
        seconds = np.mean(select(records, "seconds", method=name))
        rows.append(
            [
                name,
                f"{select(records, 'rate', method=name)[0]:g}",
                spread(select(records, "loss", method=name)),
                spread(select(records, "test", method=name)),
                f"{1000 * seconds / task.steps:.1f}",
            ]
        )
    return table(["optimiser", "rate", "training loss", task.measure, "ms a step"], rows)


def draw(path: Path, task: Task, records: list[dict]) -> None:
    """Draw the tuned runs: the training loss by step and by time, mean and range over seeds."""
    with drawing(path, 11, 4.2) as figure:
        figure.suptitle(task.title)
        by_step, by_time = figure.subplots(1, 2, sharey=True)
        for name, colour in zip(OPTIMIZERS, COLOURS, strict=True):
            losses = np.array(select(records, "losses", method=name))
            ends = (np.arange(POINTS) + 1) / POINTS
            seconds = np.mean(select(records, "seconds", method=name))
            for axes, length in ((by_step, task.steps), (by_time, seconds)):
                x = ends * length
                axes.fill_between(x, losses.min(0), losses.max(0), color=colour, alpha=0.15, lw=0)
                axes.plot(x, losses.mean(0), color=colour, label=name)
        by_step.set(xlabel="step", ylabel="training loss", yscale="log")
        by_time.set(xlabel="seconds of one core")
        by_step.legend()


def shortened(task: Task, args: argparse.Namespace) -> tuple[Task, range]:
    """Return the task, of a few steps where a quick run is wanted, and the seeds."""
    torch.set_num_threads(1)
    return replace(task, steps=POINTS) if args.quick else task, seeds_of(args)


def report(name: str, task: Task, args: argparse.Namespace) -> None:
    """Compare the optimisers on a task; write the table, the picture and all numbers."""
    task, seeds = shortened(task, args)
    records = compare(task, seeds, rates_tried=1 if args.quick else None)
    settings = {"steps": task.steps, "window": WINDOW, "density": DENSITY}
    settings["rates"] = {name: rates for name, (_, rates) in OPTIMIZERS.items()}
    save(args.output, name, settings, records, {"table": results(task, records)})
    draw(args.output / f"{name}.svg", task, records)
