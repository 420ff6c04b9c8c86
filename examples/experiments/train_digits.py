"""Train an MLP on scikit-learn's digits with M-FAC and its peers.

Run ``python examples/experiments/train_digits.py``: it tunes, compares, and then varies the size of
M-FAC's window. Writes tables, pictures and all numbers to ``docs/results``.
"""

from __future__ import annotations

import torch
from data import digits
from networks import digits_mlp, evaluate
from torch import Tensor
from training import Task, report, training_options
from training_windows import report_windows

STEPS, BATCH = 300, 64


def digits_task() -> Task:
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
        STEPS,
    )


def main(argv: list[str] | None = None) -> None:
    """Train, compare, write."""
    args = training_options("training an MLP on the digits").parse_args(argv)
    report("train-digits", digits_task(), args)
    report_windows("train-digits-windows", digits_task(), args)


if __name__ == "__main__":
    main()
