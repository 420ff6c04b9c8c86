"""Vary the size of M-FAC's window on a task, at two learning rates."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import numpy as np
from figures import drawing
from networks import track
from seeds import save, select, spread, table, unique
from training import DEFAULT, Task, mfac, run, shortened

WINDOWS = (1, 4, 16, 64, 256)
"""With one gradient F⁻¹g is a multiple of g in each unit: what is left is the step without F."""
RATES = (0.003, DEFAULT)
COLOURS = ("#56B4E9", "#0072B2")


def report_windows(name: str, task: Task, args: argparse.Namespace) -> None:
    """Train with each window from every seed; write the table, the picture and all numbers."""
    task, seeds = shortened(task, args)
    windows = WINDOWS[:2] if args.quick else WINDOWS
    records = [
        {"window": m, **run(task, functools.partial(mfac, window=m), lr, seed)}
        for m in track(windows, "windows")
        for lr in RATES
        for seed in seeds
    ]
    write(name, task, records, args.output)


def write(name: str, task: Task, records: list[dict], folder: Path) -> None:
    """Write the table, the picture and all numbers."""

    def cell(value: str, m: int, lr: float) -> str:
        return spread(select(records, value, window=m, rate=lr))

    rows = [
        [
            f"{m}",
            *(cell(value, m, lr) for value in ("test", "loss") for lr in RATES),
            f"{1000 * np.mean(select(records, 'seconds', window=m)) / task.steps:.1f}",
        ]
        for m in unique(records, "window")
    ]
    header = ["window"]
    header += [f"{what}, rate {lr}" for what in (task.measure, "training loss") for lr in RATES]
    tables = {"table": table([*header, "ms a step"], rows)}
    save(folder, name, {"rates": RATES, "steps": task.steps}, records, tables)
    draw(folder / f"{name}.svg", task, records)


def draw(path: Path, task: Task, records: list[dict]) -> None:
    """Draw the measure on test data, training loss and cost against the size of the window."""
    windows = unique(records, "window")
    with drawing(path, 11, 3.6) as figure:
        figure.suptitle(f"{task.title}, by the size of M-FAC's window")
        panels = figure.subplots(1, 3)
        for axes, value, label, scale in zip(
            panels,
            ("test", "loss", "seconds"),
            (task.measure, "training loss", "ms a step, one core"),
            (1.0, 1.0, 1000 / task.steps),
            strict=True,
        ):
            for lr, colour in zip(RATES, COLOURS, strict=True):
                runs = [
                    scale * np.array(select(records, value, window=m, rate=lr)) for m in windows
                ]
                lowest, highest = (np.array([f(some) for some in runs]) for f in (np.min, np.max))
                axes.fill_between(windows, lowest, highest, color=colour, alpha=0.15, lw=0)
                axes.plot(windows, np.mean(runs, axis=1), "o-", color=colour, label=f"rate {lr}")
            axes.set(xscale="log", xlabel="window size", ylabel=label)
            axes.set_xticks(windows, windows, minor=False)
            axes.minorticks_off()
        panels[0].legend()
