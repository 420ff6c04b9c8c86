"""Vary the size of M-FAC's window on a task, at the default learning rate."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import numpy as np
from networks import track
from pruning_report import save, select, spread, table
from training import DEFAULT, Task, mfac, run, shortened

WINDOWS = (1, 4, 16, 64, 256, 1024)
"""With one gradient F⁻¹g is a multiple of g: what is left is the scale-free step alone."""


def report_windows(name: str, task: Task, args: argparse.Namespace) -> None:
    """Train with each window from every seed; write the table, the picture and all numbers."""
    task, seeds = shortened(task, args)
    records = [
        {"window": m, **run(task, functools.partial(mfac, window=m), DEFAULT, seed)}
        for m in track(WINDOWS, "windows")
        for seed in seeds
    ]
    rows = [
        [
            f"{m}",
            spread(select(records, "test", window=m)),
            spread(select(records, "loss", window=m)),
            f"{1000 * np.mean(select(records, 'seconds', window=m)) / task.steps:.1f}",
        ]
        for m in WINDOWS
    ]
    header = ["window", task.measure, "training loss", "ms a step"]
    tables = {"table": table(header, rows)}
    save(args.output, name, {"rate": DEFAULT, "steps": task.steps}, records, tables)
    draw(args.output / f"{name}.png", task, records)


def draw(path: Path, task: Task, records: list[dict]) -> None:
    """Draw the measure on test data, training loss and cost against the size of the window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    figure.suptitle(f"{task.title}, by the size of M-FAC's window")
    for axes, value, label, scale in zip(
        figure.subplots(1, 3),
        ("test", "loss", "seconds"),
        (task.measure, "training loss", "ms a step, one core"),
        (1.0, 1.0, 1000 / task.steps),
        strict=True,
    ):
        runs = scale * np.array([select(records, value, window=m) for m in WINDOWS])
        axes.fill_between(WINDOWS, runs.min(1), runs.max(1), color="#0072B2", alpha=0.15, lw=0)
        axes.plot(WINDOWS, runs.mean(1), "o-", color="#0072B2")
        axes.set(xscale="log", xlabel="window size", ylabel=label)
        axes.set_xticks(WINDOWS, WINDOWS, minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
