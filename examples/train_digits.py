"""Train an MLP on scikit-learn's digits with SGD, Adam, AdamW and M-FAC.

Run ``python examples/train_digits.py``: it tunes, compares, and then varies the size of M-FAC's
window. Writes tables, pictures and all numbers to ``docs/results``.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from datasets import digits
from networks import digits_mlp, evaluate, track
from pruning_report import save, select, spread, table
from torch import Tensor
from training import DEFAULT, POINTS, Task, mfac, options, report, run

STEPS, BATCH = 300, 64
WINDOWS = (4, 16, 64, 256, 1024)


def digits_task(steps: int) -> Task:
    """Return the task of telling the digits."""
    x, y, x_test, y_test = digits()

    def batch(samples: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(y), (BATCH,), generator=samples)
        return x[rows], y[rows]

    return Task(
        "Digits, an MLP of 12,608 weights",
        digits_mlp,
        batch,
        lambda model: evaluate(model, x_test, y_test)[1],
        "test accuracy",
        steps,
    )


def draw(path: Path, records: list[dict], steps: int) -> None:
    """Draw test accuracy, training loss and cost against the size of the window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    figure.suptitle("Digits, by the size of M-FAC's window")
    for axes, value, label, scale in zip(
        figure.subplots(1, 3),
        ("test", "loss", "seconds"),
        ("test accuracy", "training loss", "ms a step, one core"),
        (1.0, 1.0, 1000 / steps),
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


def main(argv: list[str] | None = None) -> None:
    """Train, compare, write."""
    args = options("training an MLP on the digits").parse_args(argv)
    task = digits_task(POINTS if args.quick else STEPS)
    report("train-digits", task, args)
    seeds = range(args.seed, args.seed + (1 if args.quick else args.seeds))
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
    header = ["window", "test accuracy", "training loss", "ms a step"]
    tables = {"table": table(header, rows)}
    save(args.output, "train-digits-windows", {"rate": DEFAULT}, records, tables)
    draw(args.output / "train-digits-windows.png", records, task.steps)


if __name__ == "__main__":
    main()
