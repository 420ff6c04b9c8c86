"""Train a network with M-FAC and other optimisers, each tuned with the same effort, and compare.

Every optimiser has four learning rates to choose from. One run with each, from a seed of its own,
decides by the training loss over the last tenth of the steps; the seeds that are reported come
after. The rate falls to zero linearly in all runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import drawing
from networks import track
from seeds import options, save, seeds_of, select, spread, table, unique
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, AdamW, Optimizer
from training_peers import RATES, Named, peers

from mfac_core.torch import MFAC

WINDOW, DENSITY, DEFAULT = 64, 0.01, 0.0125
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
    weight_decay: float | None = None
    """Of all optimisers, decoupled; each has its own by default, which is 0 or 0.01."""
    tuning_steps: int | None = None
    """Of the runs that choose a rate; as many as those that are reported by default."""


def sgd(parameters: Named, lr: float, weight_decay: float = 0.0) -> Optimizer:
    """Return SGD with momentum.

    Its decay is part of the gradient: a hundredth does as much, at a rate that is ten times larger,
    under a momentum that sums ten steps.
    """
    return SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay / 100)


def mfac(
    parameters: Named,
    lr: float,
    weight_decay: float = 0.0,
    *,
    window: int = WINDOW,
    density: float | None = None,
) -> Optimizer:
    """Return M-FAC as it comes, in its scale-free form."""
    return MFAC(parameters, lr, window_size=window, density=density, weight_decay=weight_decay)


def sparse(parameters: Named, lr: float, weight_decay: float = 0.0) -> Optimizer:
    """Return M-FAC with a sparse window."""
    return mfac(parameters, lr, weight_decay, density=DENSITY)


Make = Callable[..., Optimizer]

OPTIMIZERS: dict[str, tuple[Make, tuple[float, ...]]] = {
    "SGD, momentum 0.9": (sgd, (0.03, 0.1, 0.3, 1.0)),
    "Adam": (Adam, RATES),
    "AdamW": (AdamW, RATES),
    **peers(),
    "M-FAC": (mfac, RATES),
    "M-FAC, sparse": (sparse, RATES),
}

COLOURS = {
    "SGD, momentum 0.9": "#999999",
    "Adam": "#E69F00",
    "AdamW": "#CC79A7",
    "Muon and AdamW": "#56B4E9",
    "SOAP": "#D55E00",
    "Shampoo": "#000000",
    "M-FAC": "#0072B2",
    "M-FAC, sparse": "#009E73",
}


def run(task: Task, make: Make, lr: float, seed: int) -> dict[str, Any]:
    """Train once; return the loss in POINTS means, the result on test data, and the time.

    Time is that of one core, in seconds for all steps: the processor's, not the wall's, so that
    other work on the machine does not count.
    """
    torch.manual_seed(seed)
    samples = torch.Generator().manual_seed(seed)
    model = task.model()
    options = {} if task.weight_decay is None else {"weight_decay": task.weight_decay}
    optimizer = make(model.named_parameters(), lr, **options)
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
    model.eval()
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


def compare(
    task: Task, methods: Sequence[str], seeds: range, rates_tried: int | None
) -> Iterator[list[dict]]:
    """Tune each optimiser, then train with it from every seed; M-FAC also as it comes."""
    short = replace(task, steps=task.tuning_steps or task.steps)
    for name in methods:
        make, rates = OPTIMIZERS[name]
        tried = rates[:rates_tried]
        best = tried[0]
        if len(tried) > 1:
            tuning = [run(short, make, lr, TUNING_SEED) for lr in track(tried, f"tuning {name}")]
            best = min(tuning, key=lambda record: record["loss"])["rate"]
        chosen = [run(task, make, best, seed) for seed in track(seeds, name)]
        yield [{"method": name, **record} for record in chosen]
        if "M-FAC" in name:
            if best != DEFAULT:
                chosen = [run(task, make, DEFAULT, seed) for seed in track(seeds, name)]
            yield [{"method": f"{name}, default rate", **record} for record in chosen]


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
        for name in [name for name in COLOURS if select(records, "losses", method=name)]:
            colour = COLOURS[name]
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
    short = replace(task, steps=POINTS, tuning_steps=POINTS)
    return short if args.quick else task, seeds_of(args)


def kept(path: Path, methods: Sequence[str]) -> list[dict]:
    """Return the records of earlier runs that are of other optimisers than these."""
    if not path.exists():
        return []
    records = json.loads(path.read_text(encoding="utf-8"))["records"]
    return [r for r in records if r["method"].removesuffix(", default rate") not in methods]


def report(name: str, task: Task, args: argparse.Namespace) -> None:
    """Compare the optimisers on a task; write the table, the picture and all numbers."""
    task, seeds = shortened(task, args)
    # AdamW is Adam with a decay that is not part of the gradient.
    fitting = [x for x in OPTIMIZERS if x != "Adam" or task.weight_decay is None]
    methods = [x for x in fitting if args.only is None or x in args.only]
    settings = {"steps": task.steps, "window": WINDOW, "density": DENSITY}
    settings["rates"] = {name: rates for name, (_, rates) in OPTIMIZERS.items()}
    settings["weight_decay"] = task.weight_decay
    records = [] if args.only is None else kept(args.output / f"{name}.json", methods)
    for found in compare(task, methods, seeds, rates_tried=1 if args.quick else None):
        records += found  # written as they come: a run may take hours
        records.sort(
            key=lambda r: list(OPTIMIZERS).index(r["method"].removesuffix(", default rate"))
        )
        save(args.output, name, settings, records, {"table": results(task, records)})
    draw(args.output / f"{name}.svg", task, records)


def training_options(description: str) -> argparse.ArgumentParser:
    """Return a parser of what every script of training takes."""
    parser = options(description)
    names = ", ".join(OPTIMIZERS)
    parser.add_argument(
        "--only", nargs="+", help=f"run these of {names}, and keep what there is of the others"
    )
    return parser
