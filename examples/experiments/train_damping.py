"""A damping for the plain step of MFAC that follows its window, against a grid of fixed ones.

Run ``python examples/experiments/train_damping.py``: trains the MLP of ``train_digits.py`` by
``MFAC(params, lr, damping=λ)`` under every λ and rate of a grid, with λ kept, with λ = c tr(GGᵀ)/n
for the n gradients held, the newest among them, and with what ``mfac_core.choose_damping`` says
of them at every step; and by the scale-free step. Each rule chooses λ or c and the rate by the
training loss of one run, from a seed of its own, as the optimisers of ``train_digits.py`` do.
Writes a table and all numbers to ``docs/results``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from networks import track
from seeds import options, save, select, spread, table, unique
from torch.nn.utils import parameters_to_vector
from train_digits import digits_task
from training import TUNING_SEED, WINDOW, mfac, run, shortened

import mfac_core
from mfac_core.torch import MFAC

FIXED = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
RELATIVE = (1e-3, 1e-2, 1e-1, 1.0)
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def held(optimizer: MFAC) -> torch.Tensor:
    """Return the gradients that the next step will hold, (n, d)."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    newest = parameters_to_vector([p.grad for p in parameters])[None]
    if optimizer.window is None:
        return newest
    return torch.cat([optimizer.window.gradients[-(WINDOW - 1) :], newest])


def plain(parameters: object, lr: float, damping: float | Callable[[torch.Tensor], float]) -> MFAC:
    """Return M-FAC in its plain form, under a λ that is given or computed before each step."""
    if isinstance(damping, float):
        return MFAC(parameters, lr, window_size=WINDOW, damping=damping, momentum=0.9)
    optimizer = MFAC(parameters, lr, window_size=WINDOW, damping=1.0, momentum=0.9)

    def follow(optimizer: MFAC, *_: object) -> None:
        optimizer.damping = damping(held(optimizer))

    optimizer.register_step_pre_hook(follow)
    return optimizer


def share(rows: torch.Tensor, c: float) -> float:
    """Return c times the mean square length."""
    return max(c * float(rows.double().square().sum(1).mean()), 1e-30)


RULES = {
    "λ": {λ: λ for λ in FIXED},
    "λ = c tr(GGᵀ)/n, c": {c: partial(share, c=c) for c in RELATIVE},
    "λ by leave-one-out": {None: mfac_core.choose_damping},
}


def records_of(task: object, seeds: range, quick: bool) -> list[dict]:
    """Tune each rule, then train by it from every seed."""
    records = []
    for rule, dampings in RULES.items():
        choices = list(
            product(list(dampings)[:1] if quick else dampings, RATES[: 1 if quick else None])
        )
        tried = {
            (key, lr): run(task, partial(plain, damping=dampings[key]), lr, TUNING_SEED)["loss"]
            for key, lr in track(choices, rule)
        }
        key, lr = min(tried, key=tried.get)
        found = [run(task, partial(plain, damping=dampings[key]), lr, seed) for seed in seeds]
        name = rule if key is None else f"{rule} {key:g}"
        records += [{"rule": name, "tried": len(tried), **record} for record in found]
    for lr in (1e-2, 3e-2):
        records += [
            {"rule": "scale-free", "tried": 4, **run(task, mfac, lr, seed)} for seed in seeds
        ]
    return records


def written(records: list[dict]) -> str:
    """Write the table."""
    lines = [
        [
            rule,
            f"{lr:g}",
            spread(select(records, "loss", rule=rule, rate=lr)),
            spread(select(records, "test", rule=rule, rate=lr)),
        ]
        for rule in unique(records, "rule")
        for lr in unique([r for r in records if r["rule"] == rule], "rate")
    ]
    return table(["the step", "rate", "training loss", "test accuracy"], lines)


def main(argv: list[str] | None = None) -> None:
    """Tune, train, write."""
    args = options("the damping of the plain step").parse_args(argv)
    task, seeds = shortened(digits_task(), args)
    records = records_of(task, seeds, args.quick)
    settings = {"steps": task.steps, "window": WINDOW, "rates": RATES}
    save(args.output, "train-damping", settings, records, {"table": written(records)})


if __name__ == "__main__":
    main()
